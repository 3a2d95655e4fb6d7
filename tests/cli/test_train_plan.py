"""`moestro train` before it trains: what follows from the text, which setting wins, and the plan."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import Call, last_json

from moestro.cli.plan import MOST_STEPS, describe_duration, describe_skipped, settle_length
from moestro.config import load_file
from moestro.sizes import TOKENS_PER_PARAMETER
from moestro.training import plan, speed

SMALL = ("model.hidden_dim=32", "model.num_heads=2", "model.dense_dim=32", "model.num_experts=4", "model.top_k=2",
         "model.expert_dim=16", "train.batch_size=2", "train.seq_len=32", "train.threads=1")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    for name in ("law", "tales"):
        (texts / name).mkdir(parents=True)
        for number in range(4):
            lines = (f"{name} {number} says {place}: the cat ran over the moon.\n" for place in range(200))
            (texts / name / f"{number}.txt").write_text("".join(lines))
    (texts / "scan.pdf").write_bytes(b"%PDF")
    return texts


@pytest.mark.parametrize(
    ("given", "from_text", "added"),
    [
        ((), False, ()),
        (("train.steps=5",), False, ("train.minutes=0",)),
        (("train.steps=5",), True, ("train.minutes=0",)),
        (("train.minutes=5",), False, (f"train.steps={MOST_STEPS}",)),
        (("train.minutes=5",), True, ()),
        (("train.minutes=5", "train.steps=5"), False, ()),
    ],
)
def test_what_is_given_beats_what_a_preset_says(
    given: tuple[str, ...], from_text: bool, added: tuple[str, ...]
) -> None:
    assert settle_length(given, from_text=from_text) == (*given, *added)


def test_explicit_steps_beat_the_minutes_of_a_preset(call: Call, tmp_path: Path) -> None:
    config = tmp_path / "timed.toml"
    config.write_text("[train]\nsteps = 9\nminutes = 0.001\n[model]\nvocab_size = 8192\n")
    tree = last_json(call("train", "--config", config, "--steps", 7, "--dry-run", "--quiet", "--json"))
    assert (tree["config"]["train"]["steps"], tree["config"]["train"]["minutes"], tree["plan"]["steps"]) == (7, 0, 7)
    tree = last_json(call("train", "--config", config, "--minutes", 2, "--dry-run", "--quiet", "--json"))
    assert (tree["config"]["train"]["steps"], tree["config"]["train"]["minutes"]) == (MOST_STEPS, 2)


def test_size_and_steps_follow_from_text_and_time(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "time_step", lambda config: 1e-3)
    monkeypatch.setattr("moestro.training.precision.resolve_precision", lambda config: "fp32")
    tree = last_json(call("train", "--data", folder, "--dry-run", "--json"))
    config, made = tree["config"], tree["plan"]
    assert config["train"]["minutes"] == 30 and config["train"]["precision"] == "fp32"
    assert config["model"]["num_layers"] == 2 and config["model"]["vocab_size"] == 512
    assert made["steps"] == config["train"]["steps"] == 200 and made["passes"] > 4  # the least that teach anything
    assert any("passes over little text" in line for line in made["warnings"])
    code, out, err = call("train", "--data", folder, "--minutes", 0.001, "--dry-run")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0 and "8 files" in lines["text"] and "2 domains" in lines["text"]
    assert "1 .pdf (convert" in lines["left"] and "of 4,096 tokens" in lines["training"]
    assert 50 < int(lines["training"].split()[1]) <= 60 and "train.minutes" in lines["time"]  # some is for evaluations
    assert "GiB" in lines["memory"] and lines["run"].endswith("runs/texts") and "Measuring" in err


def test_a_depth_trains_for_its_parameters_as_far_as_the_text_goes(call: Call, folder: Path) -> None:
    tree = last_json(call("train", "--data", folder, "--depth", 3, "--dry-run", "--json", "--quiet", *SMALL))
    assert tree["config"]["train"]["minutes"] == 0 and tree["plan"]["seconds"] is None
    assert tree["plan"]["tokens"] == TOKENS_PER_PARAMETER * 3 * (4 * 32 * 32 + 3 * 32 * 16 * (2 + 1))
    wide = last_json(call("train", "--data", folder, "--depth", 3, "--dry-run", "--json", "--quiet", *SMALL[-3:]))
    assert wide["plan"]["tokens"] == plan.MOST_PASSES * wide["plan"]["text_tokens"] // 64 * 64


def test_counts_of_the_plan_are_those_of_the_run(call: Call, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asked = ("train", "--data", folder, "--steps", 2, "--out", run, "--json", *SMALL)
    planned = last_json(call(*asked, "--dry-run"))
    assert not run.exists()
    assert last_json(call(*asked))["step"] == 2
    counts = json.loads((run / "data" / "shards" / "index.json").read_text())["domains"]
    trained = sum(domain["train"]["tokens"] for domain in counts)
    held_out = sum(domain["valid"]["tokens"] for domain in counts)
    assert planned["plan"]["text_tokens"] == pytest.approx(trained, rel=0.1)
    assert planned["plan"]["held_out_tokens"] == pytest.approx(held_out, rel=0.1)
    saved = load_file(run / "settings.json")
    assert saved["model"] == planned["config"]["model"] and saved["train"]["steps"] == 2

    more = last_json(call("train", "--data", folder, "--out", run, "--resume", "--json", "--steps", 4))
    assert more["step"] == 4 and load_file(run / "settings.json")["model"] == saved["model"]


def test_all_files_that_cannot_be_read_are_listed_below_one_line(call: Call, folder: Path, tmp_path: Path) -> None:
    (folder / "a.json").write_text("{")
    (folder / "b\x1b[2J.jsonl").write_text('{"body": 1}\n')
    code, out, err = call("train", "--data", folder, "--out", tmp_path / "run")
    first, *listed = err.splitlines()
    assert (code, out) == (2, "") and first.startswith("moestro: 2 of 10 files cannot be read")
    assert len(listed) == 2 and "a.json" in listed[0] and "b\\x1b[2J.jsonl, line 1" in listed[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["📚 한글", 'a "quoted" \\ name', "del\x7f", "~tilde"])
def test_folders_of_any_name_are_found(
    call: Call, folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder.rename(tmp_path / name)
    asked = ("--data", name, "--steps", 1, "--dry-run", "--quiet", "--json")
    assert last_json(call("train", *asked, *SMALL))["config"]["data"]["source"] == name
    compared = call("compare", "--data", name, "--routers", "dense", "--dry-run", "--budget", "1ktok", "--json")
    assert last_json(compared)["cells"]


def test_a_folder_whose_name_is_no_text_is_trained_on(call: Call, folder: Path, tmp_path: Path) -> None:
    name = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J"))
    folder.rename(name)
    result = call("train", "--data", name, "--steps", 1, "--out", tmp_path / "run", "--json", *SMALL)
    assert last_json(result)["step"] == 1 and "\x1b" not in result[1] + result[2]
    assert "caf\\udce9\\x1b[2J" in result[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoding", "nonsense"), "data.encoding"),
        (("--text-field", "body"), "moestro: "),
        (("model.top_k=1",), "model.router.normalize=false"),
    ],
)
def test_what_cannot_be_trained_on_is_said_before_anything_is_written(
    call: Call, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one two"}\n')
    code, out, err = call("train", "--data", text, "--out", tmp_path / "run", "--steps", 1, *options)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err and not (tmp_path / "run").exists()


def test_processes_that_train_together_do_not_choose_a_size_each(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = call("train", "--data", folder)
    assert code == 2 and "--depth or --preset" in err


def test_counts_and_durations_as_people_say_them() -> None:
    assert describe_skipped({".pdf": 2, "hidden": 1200}) == "2 .pdf (convert it to text first), 1,200 hidden"
    assert describe_skipped({f".{n}": 1 for n in range(10)}).endswith(".7, 2 others")
    assert [describe_duration(seconds) for seconds in (42, 1800, 7200)] == ["42 seconds", "30 minutes", "2.0 hours"]
