"""What `import moestro` gives: clean names, calls beside packages of the same name, routes and log-probabilities."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moestro
from moestro.errors import ConfigError, DataError
from moestro.model.attention import AttentionBatch

PROGRAM = """
import sys, moestro
assert set(dir(moestro)) == set(moestro.__all__), dir(moestro)
assert "torch" not in sys.modules
from moestro import *
assert callable(train) and callable(compare) and Config().model
import moestro.compare.plan, moestro.report.html
assert callable(moestro.compare) and callable(moestro.report) and moestro.compare.plan.make_plan
print(sorted(moestro.__all__))
"""


def test_names_are_clean_and_packages_can_be_called() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"compare", "evaluate", "load", "report", "train"} <= set(eval_list(done.stdout))
    for name in moestro.__all__:
        assert getattr(moestro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'annotation'"):
        _ = moestro.annotation  # type: ignore[attr-defined]


def eval_list(text: str) -> list[str]:
    found: list[str] = json.loads(text.replace("'", '"'))
    return found


def test_routes_and_log_probabilities_are_those_of_the_whole_text(tiny_run: Path) -> None:
    language_model = moestro.load(tiny_run)
    written = language_model.generate("the cat", max_tokens=6, temperature=1.0, seed=3, logprobs=2, routes=True)
    ids = [*written.prompt_ids, *written.ids]
    with torch.no_grad():
        output = language_model.model(torch.tensor(ids), AttentionBatch.causal(1, len(ids)), logits=True)
    assert written.routes is not None and written.logprobs is not None
    experts = torch.stack([routes.ids for routes in output.routes], 1)[:-1]  # [tokens, layers, experts]
    assert written.routes.shape == experts.shape
    assert torch.equal(written.routes.long().sort(-1).values, experts.sort(-1).values)
    expected = output.logits.log_softmax(-1)
    start = len(written.prompt_ids)
    for place, (id, score) in enumerate(zip(written.ids, written.logprobs, strict=True)):
        row = expected[start + place - 1]
        assert score.token == id and score.logprob == pytest.approx(float(row[id]), abs=1e-4)
        assert [token for token, _ in score.top] == row.topk(2).indices.tolist()
    plain = language_model.generate("the cat", max_tokens=6, temperature=1.0, seed=3)
    assert (plain.ids, plain.routes, plain.logprobs) == (written.ids, None, None)


def test_evaluate_takes_a_path_or_a_model(tiny_run: Path, text_file: Path) -> None:
    record = moestro.evaluate(tiny_run)
    assert record == moestro.evaluate(moestro.load(tiny_run))
    assert record["bits_per_byte"] == pytest.approx(record["loss"] * record["tokens"] / math.log(2) / record["bytes"])
    assert moestro.evaluate(tiny_run, text_file, max_tokens=40)["tokens"] == 40
    for settings in ({"seq_len": 1}, {"max_tokens": 0}, {"split": "test"}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            moestro.evaluate(tiny_run, **settings)  # type: ignore[arg-type]
    language_model = moestro.load(tiny_run)
    made = moestro.LanguageModel(language_model.model, language_model.tokenizer, language_model.stop_ids)
    with pytest.raises(DataError, match="was not loaded from a run"):
        moestro.evaluate(made)


def test_report_writes_what_the_directory_holds(tiny_run: Path, tmp_path: Path) -> None:
    assert moestro.report(str(tiny_run), tmp_path / "r.html") == tmp_path / "r.html"
    with pytest.raises(moestro.MoestroError, match="is not a run"):
        moestro.report(tmp_path)
