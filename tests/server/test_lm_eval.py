"""The requests that lm-eval-harness's `local-completions` makes, and what it computes from the answers.

The harness itself brings fifty packages, one of them with an OpenMP runtime of its own beside torch's; where it is
installed, the last test runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from live import Live

from moestro.data.tokenizer import Tokenizer
from moestro.engine.language_model import LanguageModel
from moestro.model.attention import AttentionBatch


def score(model: LanguageModel, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [N-1, V] by the whole model at once."""
    with torch.no_grad():
        output = model.model(torch.tensor(ids), AttentionBatch.causal(1, len(ids)), logits=True)
        return output.logits.log_softmax(-1)[:-1]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_of_ids(
    live: Live, language_model: LanguageModel, tokenizer: Tokenizer, max_tokens: int
) -> None:
    """A batch of (context, continuation) as ids; the harness sums token_logprobs[context:-1] (with max_tokens 1)."""
    pairs = [("the cat", " sat on the mat"), ("on", " hill"), ("the dog ran", " over the hill and the moon")]
    encoded = [(tokenizer.encode(a), tokenizer.encode(b)) for a, b in pairs]
    with torch.no_grad():  # make one continuation the likeliest one, so that both answers occur
        for _ in range(3):
            ids = encoded[1][0] + encoded[1][1]
            encoded[1][1].append(int(score(language_model, [*ids, 0])[-1].argmax()))
    encoded[1] = (encoded[1][0] + encoded[1][1][:-3], encoded[1][1][-3:])
    body = {
        "model": "tiny",
        "prompt": [context + continuation for context, continuation in encoded],
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    reply = live.http.post("/v1/completions", json=body).json()
    greedy = []
    for choice, (context, continuation) in zip(reply["choices"], encoded, strict=True):
        scores, last = choice["logprobs"], -1 if max_tokens else None
        found = scores["token_logprobs"][len(context) : last]
        expected = score(language_model, context + continuation)[len(context) - 1 :]
        wanted = [float(row[id]) for row, id in zip(expected, continuation, strict=True)]
        assert found == pytest.approx(wanted, abs=1e-4)
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        tops = scores["top_logprobs"][len(context) : last]
        greedy.append(all(a == max(top.values()) for a, top in zip(found, tops, strict=True)))
        assert greedy[-1] == all(int(row.argmax()) == id for row, id in zip(expected, continuation, strict=True))
        count = len(context) + len(continuation)
        text = tokenizer.decode(context + continuation)
        if "\ufffd" not in text and not {*continuation} & {*tokenizer.specials.values()}:  # whose tokens spell more
            assert "".join(scores["tokens"][:count]) == text
        assert choice["text"].startswith(tokenizer.decode(context + continuation))
        for name, place in list(zip(scores["tokens"], scores["text_offset"], strict=True))[:count]:
            assert choice["text"][place : place + len(name)] == name
    assert greedy == [False, True, False]


def test_generation_until_a_string(live: Live, language_model: LanguageModel, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cat")
    text = language_model.generate(ids, max_tokens=20).text
    body = {"prompt": [ids], "model": "tiny", "max_tokens": 20, "temperature": 0, "stop": [text[7:9]], "seed": 1234}
    (choice,) = live.http.post("/v1/completions", json=body).json()["choices"]
    assert choice["text"] == text[: text.find(text[7:9])]


def test_a_text_is_repeated_with_its_scores(live: Live, language_model: LanguageModel, tokenizer: Tokenizer) -> None:
    body = {"prompt": "the cat sat", "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 0, "n": 2}
    whole = live.http.post("/v1/completions", json=body).json()
    assert whole["choices"][0]["text"].startswith("the cat sat")
    assert whole["choices"][0]["text"] == whole["choices"][1]["text"]
    ids = [tokenizer.bos_id, *tokenizer.encode("the cat sat")]
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == len(ids) + 3 == whole["usage"]["prompt_tokens"] + 3
    with live.http.stream("POST", "/v1/completions", json={**body, "n": 1, "stream": True}) as reply:
        chunks = [json.loads(line[6:])["choices"][0] for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(chunk["text"] for chunk in chunks) == whole["choices"][0]["text"]
    merged: dict[str, list[Any]] = {name: [] for name in chunks[0]["logprobs"]}
    for chunk in chunks:
        for name, values in chunk["logprobs"].items():
            merged[name] += values
    assert merged == whole["choices"][0]["logprobs"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_itself(live: Live, tokenizer_path: Path, tmp_path: Path) -> None:
    documents = [{"q": "the cat sat on the", "a": [" mat", " moon"], "y": n % 2} for n in range(6)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, documents)))
    (tmp_path / "task.yaml").write_text(
        f"task: tiny\ndataset_path: json\ndataset_kwargs: {{data_files: {tmp_path}/data.json}}\n"
        "test_split: train\noutput_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: a\ndoc_to_target: y\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    )
    arguments = f"base_url={live.url}/v1/completions,model=tiny,tokenizer={tokenizer_path.parent}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", arguments]
    done = subprocess.run(
        [*command, "--tasks", "tiny", "--include_path", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny" in done.stdout and "0.5" in done.stdout
