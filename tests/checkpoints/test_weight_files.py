"""Which files of a directory are its weights: index, shards, second sets, files that are none, rotation."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3ForCausalLM

from moestro.checkpoints import files as reading
from moestro.checkpoints import weight_files
from moestro.checkpoints.files import ModelFiles, load_model, read_model
from moestro.checkpoints.packed import PackedFiles
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.engine.language_model import load, pack
from moestro.errors import CheckpointError

Make = Callable[..., Config]
Tensors = dict[str, torch.Tensor]
NORM = "model.norm.weight"


@pytest.fixture
def single(make_config: Make, tmp_path: Path) -> Path:
    write_random_model(make_config("model.init_std=0.2").model, tmp_path / "model", seed=3, dtype="fp32")
    return tmp_path / "model"


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same model in three shards with an index."""
    tensors = load_file(single / "model.safetensors")
    (single / "model.safetensors").unlink()
    write_shards(single, tensors, 3)
    return single


def write_shards(directory: Path, tensors: Tensors, count: int) -> None:
    index = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::count]}
        save_file(part, directory / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def edit(path: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / str(index["weight_map"][name])


def refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        ModelFiles(directory)
    assert "\n" not in caught.value.command_line_text
    return str(caught.value)


def test_a_tensor_that_its_shard_lacks_is_named(sharded: Path) -> None:
    shard = shard_of(sharded, NORM)
    edit(shard, lambda tensors: tensors.pop(NORM))
    assert f"says that {shard.name} has {NORM}, but it has not" in refused(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    here = shard_of(sharded, NORM)
    there = next(path for path in sorted(sharded.glob("model-*")) if path != here)
    value = load_file(here)[NORM]
    edit(here, lambda tensors: tensors.pop(NORM))
    edit(there, lambda tensors: tensors.update({NORM: value}))
    assert f"says that {here.name} has {NORM}, but it has not" in refused(sharded)


def test_a_tensor_that_the_index_does_not_name_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    edit(shard, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    message = refused(sharded)
    assert "extra.weight" in message and "does not name" in message and shard.name in message


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    value = load_file(shard_of(sharded, NORM))[NORM]
    for shard in sharded.glob("model-*.safetensors"):
        edit(shard, lambda tensors: tensors.update({NORM: value}))
    assert f"repeats {NORM}" in refused(sharded)


def test_missing_shards_are_named_and_so_is_a_download_that_was_cut_off(sharded: Path) -> None:
    shard = shard_of(sharded, NORM)
    shard.unlink()
    assert refused(sharded).endswith(f"lacks {shard.name}, which its index names")
    cache = sharded / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").touch()
    assert "download was cut off" in refused(sharded)


def test_shards_without_an_index_are_read_if_all_are_there(sharded: Path) -> None:
    expected = load_model(sharded).state_dict()
    (sharded / "model.safetensors.index.json").unlink()
    files = ModelFiles(sharded)
    assert any("read by their names" in text for text in files.notices)
    assert all(torch.equal(value, expected[name]) for name, value in read_model(files).state_dict().items())
    (sharded / "model-00002-of-00003.safetensors").unlink()
    assert "has 2 of 3 shards; it lacks number 2" in refused(sharded)


def test_shards_of_two_sets_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "model-00001-of-00002.safetensors")
    assert "several sets (model-…-of-2, model-…-of-3)" in refused(sharded)


def test_two_sets_of_weights_are_refused(sharded: Path) -> None:
    whole: Tensors = {}
    for shard in sharded.glob("model-*.safetensors"):
        whole |= load_file(shard)
    save_file({name: value + 1 for name, value in whole.items()}, sharded / "model.safetensors", {"format": "pt"})
    assert "holds two sets of weights" in refused(sharded)
    (sharded / "model.safetensors.index.json").unlink()
    assert "holds model.safetensors and, without an index, model-00001-of-00003.safetensors" in refused(sharded)


def test_a_stale_index_is_passed_over_as_transformers_does(sharded: Path) -> None:
    whole: Tensors = {}
    for shard in sorted(sharded.glob("model-*.safetensors")):
        whole |= load_file(shard)
        shard.unlink()
    save_file(whole, sharded / "model.safetensors", {"format": "pt"})
    theirs = DeepseekV3ForCausalLM.from_pretrained(sharded).state_dict()
    files = ModelFiles(sharded)
    assert len(files.notices) == 1 and "model.safetensors is read" in files.notices[0]
    assert torch.equal(read_model(files).embed.weight, theirs["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "extra.gguf", "pytorch_model.bin", "model.fp16.safetensors"]
)
def test_weights_beside_those_that_are_read_are_named(single: Path, name: str) -> None:
    (single / name).write_bytes(b"something else")
    notices = ModelFiles(single).notices
    assert len(notices) == 1 and name in notices[0] and "not read" in notices[0]


def test_an_adapter_is_refused_because_transformers_would_apply_it(single: Path) -> None:
    (single / "adapter_config.json").write_text("{}")
    assert "adapter (adapter_config.json), which is not applied here" in refused(single)


@pytest.mark.parametrize(
    ("name", "said"),
    [("pytorch_model.bin", "is pickled and is never loaded"), ("model.gguf", "is for llama.cpp"),
     ("weights.safetensors", "but weights.safetensors: rename")],
)  # fmt: skip
def test_a_directory_with_other_weights_alone_says_what_it_has(single: Path, name: str, said: str) -> None:
    (single / "model.safetensors").rename(single / name)
    assert said in refused(single)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize(
    ("replace", "said"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git lfs pull"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.mkdir(), "is a directory, not a file"),
        (os.mkfifo, "is a pipe or a device, not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a pipe or a device, not a file"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory (a broken link)"),
    ],
    ids=["lfs", "empty", "directory", "pipe", "device", "broken link"],
)  # fmt: skip
def test_what_is_no_file_with_something_in_it_is_named(
    single: Path, name: str, replace: Callable[[Path], object], said: str
) -> None:
    path = single / name
    path.unlink()
    replace(path)
    message = refused(single)
    assert said in message and str(path) in message


def test_a_file_that_may_not_be_read_is_named(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_file = Path.open

    def deny(path: Path, *arguments: object, **options: object) -> object:
        if path.name == "model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, *arguments, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", deny)
    assert "Permission denied: change its permissions" in refused(single)


def test_a_file_that_is_cut_off_says_how_much_is_there(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1000])
    assert f"is cut off: it has {len(data) - 1000:,} of {len(data):,} bytes" in refused(single)
    path.write_bytes(data[:20])
    assert "is damaged or incomplete" in refused(single)


def test_fp64_is_named(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.update({NORM: tensors[NORM].double()}))
    assert f"{NORM} holds 64-bit numbers: save it as float32 or bfloat16" in refused(single)


def test_names_with_control_characters_do_not_reach_the_terminal(single: Path) -> None:
    edit(single / "model.safetensors", lambda tensors: tensors.update({"model.\x1b[31mred": torch.ones(1)}))
    message = refused(single)
    assert "\x1b" not in message and "[31mred" in message


@pytest.mark.parametrize("fate", ["renamed", "deleted", "replaced"])
def test_a_directory_can_be_rotated_away_while_it_is_read(
    single: Path, tmp_path: Path, fate: str, monkeypatch: pytest.MonkeyPatch, make_config: Make
) -> None:
    """Nothing has been read yet but headers, and every file is mapped again after each tensor."""
    monkeypatch.setattr(reading, "REMAP_BYTES", 0)
    expected = load_model(single).state_dict()
    files = ModelFiles(single)
    rotate(single, tmp_path, fate, make_config)
    assert all(torch.equal(value, expected[name]) for name, value in read_model(files).state_dict().items())


def rotate(directory: Path, tmp_path: Path, fate: str, make_config: Make) -> None:
    if fate == "deleted":
        shutil.rmtree(directory)
    else:
        directory.rename(tmp_path / "old")
    if fate == "replaced":
        write_random_model(make_config("model.init_std=0.2").model, directory, seed=4, dtype="fp32")


@pytest.mark.parametrize("is_packed", [False, True], ids=["plain", "packed"])
def test_a_loaded_model_writes_the_same_when_its_directory_is_gone(
    tiny_run: Path, tmp_path: Path, is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "REMAP_BYTES", 0)
    checkpoint = sorted((tiny_run / "checkpoints").glob("step-*"))[-1]
    if is_packed:
        pack(checkpoint, tmp_path / "model")
    else:
        shutil.copytree(checkpoint, tmp_path / "model")
    expected = load(tmp_path / "model").generate([0, 5, 9], max_tokens=12).ids
    model = load(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert model.generate([0, 5, 9], max_tokens=12).ids == expected
    assert isinstance(model.source, PackedFiles) == is_packed


def test_held_files_are_closed(single: Path) -> None:
    descriptors = len(os.listdir("/dev/fd"))
    held = weight_files.HeldFiles([single / "model.safetensors"])
    assert len(os.listdir("/dev/fd")) == descriptors + 1
    del held
    assert len(os.listdir("/dev/fd")) == descriptors
