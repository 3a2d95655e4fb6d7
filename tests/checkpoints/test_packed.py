"""Packed in memory, from files, or saved and mapped: the same bits; what is damaged is named; memory stays bounded."""

from __future__ import annotations

import json
import resource
import tracemalloc
import weakref
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from fused_experts import fuse
from safetensors.torch import load_file, save_file
from torch.profiler import ProfilerActivity, profile

from moestro.checkpoints import files as weights
from moestro.checkpoints import packed as packed_directory
from moestro.checkpoints.files import ModelFiles, load_model, parameter_shapes
from moestro.checkpoints.packed import PackedFiles
from moestro.checkpoints.packing import pack_model, write_parts
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.data.tokenizer import Tokenizer
from moestro.engine.engine import Engine
from moestro.engine.language_model import LanguageModel, load, pack
from moestro.engine.runtime import Runtime
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import CheckpointError, ConfigError
from moestro.model.parts import served_parts
from moestro.ops.serving.formats import FORMATS

Make = Callable[..., Config]
T = TypeVar("T")
SCHEMES = {
    "v3 with q-lora, groups and mtp": ["model.q_lora_rank=12", "model.num_groups=4", "model.top_k_groups=2"],
    "v2": [
        "model.router.score=softmax", "model.router.group_score=max", "model.router.normalize=false",
        "model.router.bias=none", "model.mtp_depth=0",
    ],
    "hash": [
        "model.router.selection=hash", "model.router.score=constant", "model.router.bias=none",
        "model.router.balance=[]",
    ],
    "dense": ["model.num_experts=0", "model.num_shared_experts=0", "model.mtp_depth=0"],
    "tied, no shared expert": ["model.tie_embeddings=true", "model.num_shared_experts=0"],
    "mha": ["model.attention=mha", "model.num_heads=4"],
    "gqa": ["model.attention=gqa", "model.num_heads=4", "model.num_kv_heads=2"],
}  # fmt: skip
V3 = SCHEMES["v3 with q-lora, groups and mtp"]


def write_model(directory: Path, config: Config, tokenizer: Tokenizer, dtype: str = "bf16") -> Path:
    """A model of random weights, with biases that are not zero."""
    write_random_model(config.model, directory, seed=3, dtype=dtype)
    tokenizer.save(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = torch.randn(len(tensors[name]), generator=torch.Generator().manual_seed(7)) * 0.2 - 0.5
    save_file(tensors, path)
    return directory


@pytest.fixture
def directory(make_config: Make, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", make_config("model.init_std=0.2", *V3), tokenizer)


@pytest.fixture
def packed(directory: Path, tmp_path: Path) -> Path:
    pack(directory, tmp_path / "packed", weights="int8")
    return tmp_path / "packed"


def equal(one: Runtime, other: Runtime) -> bool:
    names = list(one.tensors)
    return names == list(other.tensors) and all(torch.equal(one.tensors[n], other.tensors[n]) for n in names)


def answers(language_model: LanguageModel) -> list[Any]:
    """Greedy and sampled tokens with log-probabilities, drafts of the MTP modules included."""
    params = [SamplingParams(max_tokens=12, logprobs=3), SamplingParams(max_tokens=12, temperature=1.0, logprobs=3)]
    engine = Engine(language_model.runtime, language_model.tokenizer, language_model.stop_ids, memory_bytes=1 << 22)
    completions = engine.run([Request([0, 20, 30, 41], one) for one in params])
    return [(c.ids, c.logprobs, c.drafts) for (c,) in completions]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("overrides", SCHEMES.values(), ids=SCHEMES)
def test_packed_in_memory_from_files_and_saved_are_the_same_bits(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path, overrides: list[str], format: str
) -> None:
    directory = write_model(tmp_path / "model", make_config("model.init_std=0.2", *overrides), tokenizer)
    held, original = Runtime(pack_model(load_model(directory), format)), load(directory, weights=format)
    pack(directory, tmp_path / "packed", weights=format)
    mapped = load(tmp_path / "packed")
    assert equal(held, original.runtime) and equal(held, mapped.runtime)
    assert (mapped.weights, mapped.runtime.format, mapped.runtime.dtype) == (format, format, torch.bfloat16)
    assert mapped.config == original.config
    assert (mapped.runtime.routed_bytes, mapped.runtime.other_bytes) == (held.routed_bytes, held.other_bytes)
    assert answers(mapped) == answers(original)
    assert mapped.generate("the cat", max_tokens=9) == original.generate("the cat", max_tokens=9)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["fp32", "bf16"])
def test_every_spelling_of_the_files_is_packed_alike(
    make_config: Make,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: str,
    dtype: str,
) -> None:
    """Experts one by one and fused, one file and many, each opened again after a few tensors."""
    directory = write_model(tmp_path / "model", make_config("model.init_std=0.2", *V3), tokenizer, stored)
    expected = Runtime(pack_model(load_model(directory, weights.DTYPES[dtype]), "int4"))
    assert expected.dtype == weights.DTYPES[dtype]
    monkeypatch.setattr(weights, "REMAP_BYTES", 3000)
    assert equal(load(directory, dtype, weights="int4").runtime, expected)
    tensors = load_file(directory / "model.safetensors")
    fuse(tensors)
    (directory / "model.safetensors").unlink()
    weights.write_tensors(directory, iter(tensors.items()), shard_bytes=20_000)
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    assert equal(load(directory, dtype, weights="int4").runtime, expected)


def test_tensors_begin_at_multiples_of_64_and_stay_in_the_file(packed: Path) -> None:
    path = packed / "packed.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    spans = sorted(tensor["data_offsets"] for tensor in json.loads(data[8 : 8 + length]).values())
    assert (8 + length) % 64 == 0
    assert [first for first, _ in spans] == [0, *(last for _, last in spans[:-1])]  # no holes
    assert spans[-1][1] == len(data) - 8 - length
    files = PackedFiles(packed)
    runtime = Runtime(pack_model(files))
    assert sum(tensor.nbytes % 64 > 0 for tensor in files.tensors.values()) > 1
    for name, tensor in files.tensors.items():
        assert tensor.data_ptr() % (tensor.element_size() if tensor.nbytes % 64 else 64) == 0, name
    for part in (runtime.head, runtime.blocks[0].attention.down, runtime.blocks[1].ffn.experts):  # type: ignore[attr-defined,union-attr]
        for key in set(part.names) - {"sizes"}:
            assert getattr(part, key).data_ptr() in {tensor.data_ptr() for tensor in files.tensors.values()}


def test_large_models_are_written_in_shards(
    directory: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_directory, "SHARD_BYTES", 30_000)
    size = pack(directory, tmp_path / "sharded", weights="int8")
    assert size.nbytes == sum(tensor.nbytes for tensor in load(packed).runtime.tensors.values())
    names = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"packed-00001-of-{len(names):05d}.safetensors"
    assert equal(load(tmp_path / "sharded").runtime, load(packed).runtime)
    (tmp_path / "sharded" / names[1]).unlink()
    with pytest.raises(CheckpointError, match=f"{names[1]} is missing"):
        load(tmp_path / "sharded")


def test_packing_holds_one_part_at_a_time(directory: Path) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def save(tensors: Mapping[str, torch.Tensor]) -> None:
        assert not any(ref() is not None for ref in alive)
        alive[:] = [weakref.ref(tensor) for tensor in tensors.values()]

    assert write_parts(ModelFiles(directory), "int8", save) > 0
    assert alive


def test_every_parameter_is_in_a_part(make_config: Make) -> None:
    """But those that only training needs."""
    for overrides in (*SCHEMES.values(), ["model.router.noise=learned"]):
        config = make_config(*overrides).model
        used = {parameter for part in served_parts(config) for parameter in part.parameters}
        left = parameter_shapes(config).keys() - used
        assert all(name.endswith("router.noise") for name in left), left
        assert used <= parameter_shapes(config).keys()
        names = [part.name for part in served_parts(config)]
        assert len(set(names)) == len(names)


def test_absent_mtp_modules_stay_absent(directory: Path, tmp_path: Path) -> None:
    """transformers drops them and goes on naming them in config.json, which is copied."""
    path = directory / "model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if not name.startswith("model.layers.2.")}, path)
    pack(directory, tmp_path / "packed")
    assert load(tmp_path / "packed").config.mtp_depth == 0
    assert answers(load(tmp_path / "packed")) == answers(load(directory))


def rewrite(packed: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Another set of tensors, of which packed.json knows the size."""
    path = packed / "packed.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    change_json(packed / "packed.json", files={path.name: path.stat().st_size})


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE: list[tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = [
    (lambda t: t.pop("layers.1.ffn.experts.down"), r"lacks layers\.1\.ffn\.experts\.down"),
    (lambda t: t.pop("layers.0.attention.down.sizes"), r"lacks layers\.0\.attention\.down\.sizes"),
    (lambda t: t.pop("norm.weight"), r"lacks norm\.weight"),
    (lambda t: t.update(extra=torch.ones(2)), "unexpected tensors: extra"),
    (lambda t: t.update({"norm.weight": torch.ones(5)}), r"norm\.weight is fp32 x 5; config"),
    (lambda t: t.update({"head.panels": t["head.panels"][:2].clone()}), "head is damaged"),
    (lambda t: t.update({"head.sizes": t["head.sizes"] + torch.tensor([0, 1, 0])}), "head is int8 x 301 x 32"),
    (lambda t: t.update({"head.sizes": torch.ones(3)}), "head is damaged"),
    (lambda t: t.update({"head.sizes": torch.ones(1, 3, dtype=torch.int64)}), "head is damaged"),
    (lambda t: t.update({"layers.1.ffn.experts.down": torch.tensor(3, dtype=torch.uint8)}), "experts is damaged"),
]


@pytest.mark.parametrize(("change", "named"), DAMAGE, ids=[named for _, named in DAMAGE])
def test_tensors_that_do_not_fit_are_named(packed: Path, change: Callable[..., Any], named: str) -> None:
    rewrite(packed, change)
    with pytest.raises(CheckpointError, match=named):
        _ = load(packed).runtime


def test_damaged_directories_are_named(packed: Path) -> None:
    path, info = packed / "packed.safetensors", packed / "packed.json"
    data, text = path.read_bytes(), info.read_text()
    for broken in (data[:-1], data[: len(data) // 2], b""):
        path.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"packed\.safetensors has .* bytes instead of"):
            load(packed)
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(CheckpointError, match=r"packed\.safetensors is damaged"):
        load(packed)
    path.write_bytes(data)
    for values, named in (
        ({"version": 2}, "version 2, and this reads moestro-packed version 1"),
        ({"format": "other"}, "is other version 1"),
        ({"weights": "int2"}, "is damaged"),
        ({"dtype": None}, "is damaged"),
        ({"files": {}}, "is damaged"),
        ({"files": {"../packed.safetensors": 3}}, "is damaged"),
        ({"files": {path.name: "3"}}, "is damaged"),
    ):
        change_json(info, **values)
        with pytest.raises(CheckpointError, match=named):
            load(packed)
        info.write_text(text)
    change_json(packed / "config.json", n_shared_experts=2)
    with pytest.raises(CheckpointError, match=r"shared\.gate_up is int8 x 32 x 32; config\.json asks for int8 x 64"):
        _ = load(packed).runtime


def test_other_weights_and_precisions_than_the_packed_ones_are_refused(packed: Path, tmp_path: Path) -> None:
    assert load(packed, "bf16", weights="int8").runtime.format == "int8"
    with pytest.raises(ConfigError, match="holds int8 weights, not bf16"):
        load(packed, weights="bf16")
    with pytest.raises(ConfigError, match="packed for bf16, not fp32"):
        load(packed, "fp32")
    with pytest.raises(ConfigError, match="packed already"):
        pack(packed, tmp_path / "again")
    with pytest.raises(CheckpointError, match="needs the original"):
        _ = load(packed).model


def test_a_full_disk_leaves_nothing(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "folder" / "packed"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*packed: File too large"):
            pack(directory, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(out.parent.iterdir()) == []
    pack(directory, out)
    assert [path.name for path in out.parent.iterdir()] == ["packed"]
    assert not list(out.glob("*.tmp"))


def test_a_packed_directory_is_on_disk_by_name(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, bool]] = []
    monkeypatch.setattr(packed_directory, "sync", lambda path: synced.append((path, (tmp_path / "out").is_dir())))
    pack(directory, tmp_path / "out")
    assert synced == [(tmp_path, True)]


def test_what_exists_is_not_touched(directory: Path, tmp_path: Path) -> None:
    for name, make in (("folder", Path.mkdir), ("file", Path.touch), ("link", lambda p: p.symlink_to("nowhere"))):
        make(tmp_path / name)
        with pytest.raises(ConfigError, match="exists"):
            pack(directory, tmp_path / name)
    assert not list((tmp_path / "folder").iterdir()) and not (tmp_path / "file").read_bytes()


def peak_bytes(directory: Path, work: Callable[[], T]) -> tuple[int, T]:
    """The most that a call holds at once: each allocation of torch, but no mapped file, and those of Python on top."""
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            result = work()
        python_peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    mapped = {path.stat().st_size for path in directory.glob("*.safetensors")}
    return max(accumulate(change for change in changes if abs(change) not in mapped)) + python_peak, result


def test_loading_needs_little_more_than_the_packed_weights(
    make_config: Make, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Whole, this model takes 108 MB in bf16, and 57 MB packed."""
    sizes = ["hidden_dim=512", "expert_dim=512", "num_experts=32", "num_layers=3", "vocab_size=2048", "mtp_depth=0"]
    large = write_model(tmp_path / "large", make_config(*(f"model.{size}" for size in sizes)), tokenizer)
    peak, runtime = peak_bytes(large, lambda: load(large, weights="int8").runtime)
    packed = sum(tensor.nbytes for tensor in runtime.tensors.values())
    assert packed > 50e6
    assert packed <= peak < 1.1 * packed
    pack(large, tmp_path / "packed", weights="int8")
    peak, runtime = peak_bytes(tmp_path / "packed", lambda: load(tmp_path / "packed").runtime)
    assert sum(tensor.nbytes for tensor in runtime.tensors.values()) == packed
    assert peak < 1e6
