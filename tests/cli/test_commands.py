"""The commands as a user calls them: JSON on the last line, one clear line and exit 2 for mistakes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Call, last_json

from moestro.config import Config
from moestro.errors import MoestroError
from moestro.ops import library


@pytest.fixture(scope="module")
def config_file(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(make_config().model_dump(mode="json")))
    return path


def test_train_generate_evaluate_inspect_and_resume(call: Call, config_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = ("train", "--config", config_file, "--out", run, "--json")
    tree = last_json(call(*train, "train.steps=3"))
    assert (tree["run"], tree["step"], tree["steps"], tree["finished"]) == (str(run), 3, 3, True)
    assert Path(tree["report"]).is_file() and tree["bits_per_byte"] > 0

    tree = last_json(call("eval", run, "--json"))
    assert {"bits_per_byte", "loss", "tokens", "domains"} <= tree.keys()
    assert tree["domains"]["words"]["tokens"] == tree["tokens"] > 0

    tree = last_json(call("generate", run, "--prompt", "the cat", "--max-tokens", 5, "--json"))
    assert {"text", "tokens", "finish_reason"} <= tree.keys() and tree["tokens"] <= 5
    again = last_json(call("generate", run, "--prompt", "the cat", "--max-tokens", 5, "--json"))
    assert again["ids"] == tree["ids"]

    tree = last_json(call("inspect", run, "--json"))
    assert tree["model"]["hidden_dim"] == 32 and tree["parameters"]["total"] > tree["parameters"]["active"]

    code, _, err = call(*train)
    assert code == 2 and "--resume" in err
    assert last_json(call("train", "--out", run, "--resume", "--json"))["step"] == 3


def test_eval_reads_text_that_is_given(call: Call, tiny_run: Path, text_file: Path) -> None:
    whole = last_json(call("eval", tiny_run, "--data", text_file, "--json"))
    some = last_json(call("eval", tiny_run, "--data", text_file, "--split", "valid", "--json"))
    few = last_json(call("eval", tiny_run, "--data", text_file, "--max-tokens", 40, "--json"))
    assert whole["tokens"] > some["tokens"] > 0 and few["tokens"] <= 80
    code, out, _ = call("eval", tiny_run)
    assert code == 0 and "bits per byte" in out


def test_presets_can_be_inspected(call: Call) -> None:
    tree = last_json(call("inspect", "deepseek-v3", "--json"))
    assert tree["parameters"]["total"] == 671_026_419_200
    assert tree["cache_bytes_per_token"]["bf16"] == 70_272 and tree["flops_per_token"] > 0
    code, out, _ = call("inspect", "deepseek-v3")
    assert code == 0 and "671.03B" in out


def test_a_dry_run_writes_nothing(call: Call, tmp_path: Path) -> None:
    tree = last_json(call("train", "--preset", "small", "--out", tmp_path / "run", "--dry-run", "--quiet", "--json"))
    assert tree["config"]["model"]["hidden_dim"] == 512 and not (tmp_path / "run").exists()


def test_init_makes_a_model_that_writes(call: Call, tmp_path: Path) -> None:
    arguments = (
        "init",
        "--preset",
        "demo",
        "--out",
        tmp_path / "model",
        "--seed",
        1,
        "--json",
        "model.num_layers=2",
    )
    tree = last_json(call(*arguments))
    assert tree["bytes"] == pytest.approx(2 * tree["parameters"], rel=0.01)
    written = last_json(call("generate", tmp_path / "model", "--prompt", "Once", "--max-tokens", 3, "--json"))
    assert 1 <= written["tokens"] <= 3
    assert call(*arguments)[0] == 2


def test_latents_cached_in_fp8(call: Call, tiny_run: Path) -> None:
    """The text may well be the same; the scores are not quite."""
    scores = [
        last_json(call("eval", tiny_run, *cache, "--json")) for cache in ((), ("--cache", "auto"), ("--cache", "fp8"))
    ]
    plain, same, coded = (score["bits_per_byte"] for score in scores)
    assert plain == same != coded == pytest.approx(plain, rel=0.02)
    written = last_json(call("generate", tiny_run, "--prompt", "the", "--max-tokens", 5, "--cache", "fp8", "--json"))
    assert 1 <= written["tokens"] <= 5
    cached = last_json(call("inspect", tiny_run, "--json"))["cache_bytes_per_token"]
    assert cached["fp8"] == 2 * (16 + 4 + 2 * 4) and f"{cached['fp8']} B fp8" in call("inspect", tiny_run)[1]


def test_packed_weights_answer_as_what_they_were_packed_from(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    tree = last_json(call("pack", tiny_run, "--weights", "int8", "--out", packed, "--json"))
    assert (tree["model"], tree["weights"], tree["dtype"]) == (str(packed), "int8", "fp32")
    assert last_json(call("inspect", packed, "--json"))["packed"]["bytes"] > tree["bytes"] > 0
    assert "int8 for fp32" in call("inspect", packed)[1]
    asked = ("--prompt", "the cat", "--max-tokens", 9, "--temperature", 1, "--json")
    expected = last_json(call("generate", tiny_run, *asked, "--weights", "int8"))
    assert last_json(call("generate", packed, *asked))["ids"] == expected["ids"]

    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 9)
    scores = [
        last_json(call("eval", model, "--data", text, "--split", "all", *weights, "--json"))
        for model, weights in ((tiny_run, ("--weights", "int8")), (packed, ()), (packed, ("--weights", "int8")))
    ]
    assert scores[0] == scores[1] == scores[2]

    for arguments, named in (
        (("generate", packed, "--prompt", "x", "--weights", "int4"), "holds int8 weights, not int4"),
        (("chat", packed, "--dtype", "bf16"), "packed for fp32, not bf16"),
        (("pack", packed, "--out", tmp_path / "again"), "packed already"),
        (("pack", tiny_run, "--out", packed), "exists"),
        (("ablate", packed, "--data", text), "packed for serving"),
    ):
        code, out, err = call(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and named in err


def test_fp8_weights_are_served_as_they_are(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    fp8, packed, asked = tmp_path / "fp8", tmp_path / "packed", ("--prompt", "the cat", "--max-tokens", 6, "--json")
    call("convert", tiny_run, fp8, "--to", "fp8")
    ids = last_json(call("generate", fp8, *asked))["ids"]
    kept = last_json(call("pack", fp8, "--out", packed, "--json"))
    assert kept["weights"] == "fp8" and last_json(call("generate", packed, *asked))["ids"] == ids
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 9)
    bits = [
        last_json(call("eval", fp8, "--data", text, "--split", "all", *options, "--json"))["bits_per_byte"]
        for options in ((), ("--weights", "bf16"), ("--weights", "int8"), ("--activations", "fp8", "--cache", "fp8"))
    ]
    assert bits[0] != bits[3] and all(one == pytest.approx(bits[0], rel=0.01) for one in bits)
    code, _, err = call("generate", tiny_run, *asked, "--activations", "fp8")
    assert code == 2 and "activations in fp8 need weights in fp8, and these are fp32" in err
    assert call("generate", tiny_run, *asked, "--weights", "fp8", "--activations", "fp8")[0] == 0


def test_fp8_weights_are_written_inspected_and_used(call: Call, tiny_run: Path, tmp_path: Path) -> None:
    fp8, text = tmp_path / "fp8", tmp_path / "text.txt"
    tree = last_json(call("convert", tiny_run, fp8, "--to", "fp8", "--scale", "ue8m0", "--json"))
    assert (tree["model"], tree["weights"], tree["kept"]) == (str(fp8), "fp8", 0) and tree["rounded"] > 50
    files = last_json(call("inspect", fp8, "--json"))["files"]
    assert files["format"] == "fp8, blocks 128 x 128, ue8m0 scales"
    assert sum(files["stored"].values()) == tree["bytes"]
    shown = call("inspect", fp8)[1]
    assert "ue8m0 scales" in shown and "dequantised for the absorbed form of MLA" in shown
    assert "fp32" in call("inspect", tiny_run)[1] and "files" not in last_json(call("inspect", "demo", "--json"))
    assert "files" not in last_json(call("inspect", fp8, "model.top_k=1", "--json"))

    assert "bf16 weights" in call("convert", fp8, tmp_path / "bf16", "--to", "bf16")[1]
    text.write_text("the cat sat on the mat\n" * 9)
    scores = [
        last_json(call("eval", model, "--data", text, "--split", "all", "--json"))["bits_per_byte"]
        for model in (tiny_run, fp8, tmp_path / "bf16")
    ]
    assert scores[1] == pytest.approx(scores[0], rel=0.05) and scores[2] == pytest.approx(scores[1], rel=0.01)
    assert last_json(call("train", "--from", fp8, "--dry-run", "--json"))["config"]["model"]["hidden_dim"] == 32
    assert last_json(call("generate", fp8, "--prompt", "the cat", "--max-tokens", 3, "--json"))["ids"]

    call("pack", tiny_run, "--weights", "int8", "--out", tmp_path / "packed")
    code, _, err = call("convert", tmp_path / "packed", tmp_path / "x", "--to", "fp8")
    assert code == 2 and "packed for serving" in err


def test_doctor_measures(call: Call) -> None:
    tree = last_json(call("doctor", "--seconds", "0.5", "--json"))
    assert tree["machine"]["cores"] >= 1 and tree["measured"]["fp32_gflops"] > 0
    assert isinstance(tree["problems"], list)
    assert tree["native"] == library.current_isa()


def test_doctor_looks_at_openmp_when_the_kernels_are_loaded(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro import machine

    asked, describe = [], machine.describe_machine
    monkeypatch.setattr(library, "current_isa", lambda: asked.append("kernels") or "avx2")
    monkeypatch.setattr(machine, "describe_machine", lambda: asked.append("machine") or describe())
    assert last_json(call("doctor", "--seconds", "0.5", "--json"))["native"] == "avx2"
    assert asked == ["kernels", "machine"]


def test_doctor_says_how_to_build_kernels(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from moestro import machine

    described = dataclasses.replace(machine.describe_machine(), instruction_sets=("avx2",))
    monkeypatch.setattr(machine, "describe_machine", lambda: described)
    monkeypatch.setattr(library, "current_isa", lambda: "")
    monkeypatch.setattr(machine, "how_to_build", lambda: "type this")
    problems = last_json(call("doctor", "--seconds", "0.5", "--json"))["problems"]
    assert "native kernels are not built: install a C++ compiler, then: type this" in problems


def test_prompts_come_from_standard_input(call: Call, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("the dog"))
    code, out, _ = call("generate", tiny_run, "--prompt", "-", "--max-tokens", 2)
    assert code == 0 and out.startswith("the dog")


def test_chat_answers_lines(call: Call, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/new\nagain\n"))
    code, out, err = call("chat", tiny_run, "--max-tokens", 4)
    assert code == 0 and out.count("\n") >= 2 and err == "(a new conversation)\n"


MISTAKES = [
    ("train", "--config", "nowhere.toml"),
    ("train", "--preset", "nothing"),
    ("train", "--preset", "demo", "--depth", "4"),
    ("train", "--depth", "900"),
    ("train", "--data", "/nowhere/texts", "--out", "{tmp}/a", "--quiet"),
    ("train", "model.hiden_dim=3"),
    ("train", "train.steps=soon"),
    ("train", "train.precision=fp4"),
    ("train", "fp8.transpose=none"),
    ("train", "steps"),
    ("train", "--no-such-flag"),
    ("generate", "/nowhere", "--prompt", "x"),
    ("generate", "{tmp}", "--prompt", "x"),
    ("generate", "{run}"),
    ("generate", "{run}", "--prompt", "x", "--max-tokens", "100000"),
    ("generate", "{run}", "--prompt", "x", "--max-tokens", "0"),
    ("generate", "{run}", "--prompt", "x", "--temperature", "-1"),
    ("generate", "{run}", "--prompt", "x", "--top-p", "2"),
    ("generate", "{run}", "--prompt", "x", "--dtype", "fp4"),
    ("generate", "{run}", "--prompt", "x", "--cache", "bf16"),
    ("chat", "{run}", "--cache", "int8"),
    ("eval", "{run}", "--cache", ""),
    ("generate", "{run}", "--prompt", "x", "--max-tokens", "2", "--seed", "99999999999999999999"),
    ("init", "--preset", "demo", "--out", "{tmp}/x", "--seed", "99999999999999999999"),
    ("eval", "{run}", "--data", "/nowhere"),
    ("eval", "{run}", "--split", "test"),
    ("eval", "{run}", "--seq-len", "0"),
    ("eval", "{run}", "--max-tokens", "-3"),
    ("eval", "{run}/checkpoints/step-00000099"),
    ("inspect", "nothing"),
    ("inspect", "demo", "model.top_k=99"),
    ("init", "--preset", "nothing", "--out", "{tmp}/x"),
    ("init", "--preset", "demo", "--out", "{run}"),
    ("init", "--preset", "demo", "--out", "{tmp}/file/x"),
    ("pack", "/nowhere", "--out", "{tmp}/x"),
    ("pack", "{run}", "--out", "{run}"),
    ("pack", "{run}", "--out", "{tmp}/file/x"),
    ("pack", "{run}", "--out", "{tmp}/x", "--weights", "int2"),
    ("convert", "/nowhere", "{tmp}/x", "--to", "fp8"),
    ("convert", "{run}", "{tmp}/x"),
    ("convert", "{run}", "{tmp}/x", "--to", "int8"),
    ("convert", "{run}", "{tmp}/x", "--to", "fp8", "--scale", "fp64"),
    ("convert", "{run}", "{tmp}/x", "--to", "bf16", "--scale", "ue8m0"),
    ("convert", "{run}", "{run}", "--to", "fp8"),
    ("convert", "{run}", "{tmp}/file/x", "--to", "fp8"),
    ("report", "{tmp}"),
    ("report", "/nowhere"),
    ("report", "{run}", "--out", "{tmp}/file/report.html"),
    ("chat", "/nowhere"),
    ("doctor", "--seconds", "1000"),
    ("nonsense",),
]


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_mistakes_are_one_line_and_exit_2(
    call: Call, tiny_run: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = call(*(a.format(run=tiny_run, tmp=tmp_path) for a in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("moestro: ") and err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err


def test_errors_of_the_package_share_one_root() -> None:
    import moestro.errors as errors

    assert all(issubclass(e, MoestroError) for e in (errors.ConfigError, errors.DataError, errors.CheckpointError))


def test_help_does_not_wait_for_torch() -> None:
    program = """
import sys
from moestro.cli import main
commands = "train eval generate chat report inspect init pack convert doctor compare ablate serve"
for command in ("", *commands.split()):
    sys.argv = ["moestro", *command.split(), "--help"]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, command
heavy = {"torch", "numpy", "pyarrow", "transformers", "datasets", "llguidance", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "--resume" in done.stdout


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "moestro", "generate", "/nowhere", "--prompt", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "/nowhere" in done.stderr


def test_max_tokens_and_split_hold_for_the_whole_domain(call: Call, tiny_run: Path, text_file: Path) -> None:
    few = last_json(call("eval", tiny_run, "--data", text_file, "--max-tokens", 4000, "--json"))
    assert few["tokens"] == 4000
    held_out, whole = (last_json(call("eval", tiny_run, "--split", s, "--json"))["tokens"] for s in ("valid", "all"))
    assert whole > 2 * held_out


def test_a_run_has_the_name_of_the_folder_even_if_that_is_dots(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "books" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "books" / "inner")
    code, _, err = call("train", "--data", "..", "--quiet")
    assert code == 2 and "below .." in err and not Path("runs").exists()
    (tmp_path / "books" / "words.txt").write_text("one two three four five six seven\n" * 40)
    code, out, _ = call("train", "--data", "..", "--steps", 1, "--dry-run", "train.batch_size=1", "train.seq_len=16")
    assert code == 0 and any(line.split() == ["run", "runs/books"] for line in out.splitlines())


def test_input_that_is_no_text_is_one_line(call: Call, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    for command in (("generate", tiny_run, "--prompt", "-"), ("chat", tiny_run)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), "utf-8"))
        code, _, err = call(*command)
        assert code == 2 and "not valid UTF-8" in err and err.count("\n") == 1
