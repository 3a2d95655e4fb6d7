"""Conversion to FP8 and bf16, read back by torch's and transformers' readers and by a few lines of plain Python."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from fused_experts import fuse
from quantised_files import (
    DEEPSEEK,
    ODD_SIDES,
    Tensors,
    all_tensors,
    edit_tensors,
    in_blocks,
    is_matrix_of_block,
    quantise,
)
from safetensors.torch import load_file
from transformers import DeepseekV3ForCausalLM
from transformers.quantizers import quantizer_finegrained_fp8

from moestro.checkpoints import convert as converting
from moestro.checkpoints.convert import Precision, convert
from moestro.checkpoints.files import ModelFiles, load_model
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.errors import CheckpointError, ConfigError
from moestro.model.attention import AttentionBatch

Make = Callable[..., Config]
WHOLE_BLOCKS = [
    "model.hidden_dim=128", "model.num_heads=2", "model.kv_lora_rank=64", "model.nope_dim=64", "model.rope_dim=64",
    "model.v_dim=64", "model.expert_dim=128", "model.dense_dim=256", "model.init_std=0.1",
]  # fmt: skip


@pytest.fixture(scope="module")
def plain(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    write_random_model(make_config(*ODD_SIDES).model, directory, seed=3, dtype="fp32")
    return directory


def to(source: Path, out: Path, precision: Precision = "fp8", scale: Any = None) -> Path:
    convert(ModelFiles(source), out, precision, scale)
    return out


def values_of(directory: Path) -> Tensors:
    """Every tensor of a directory in fp32, codes by the rule for a block of 128 x 128."""
    stored = all_tensors(directory)
    values = {name: tensor.float() for name, tensor in stored.items() if not name.endswith("_scale_inv")}
    for name in values:
        scales = stored.get(f"{name}_scale_inv")
        for i, j in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist() if scales is not None else []:
            values[name][i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scales[i, j]
    return values


def config_of(directory: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((directory / "config.json").read_text("utf-8"))
    return tree


def test_the_official_layout_is_written(plain: Path, tmp_path: Path) -> None:
    done = convert(ModelFiles(plain), tmp_path / "fp8", "fp8")
    before, after = load_file(plain / "model.safetensors"), all_tensors(tmp_path / "fp8")
    assert after.keys() == before.keys() | {f"{n}_scale_inv" for n in before if is_matrix_of_block(n)}
    for name, tensor in before.items():
        if is_matrix_of_block(name):
            codes, scales, _ = in_blocks(128, 128)(tensor)
            assert torch.equal(after[name].view(torch.uint8), codes.view(torch.uint8)), name
            assert torch.equal(after[f"{name}_scale_inv"], scales), name
        else:
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            assert after[name].dtype == dtype and torch.equal(after[name], tensor.to(dtype)), name
    assert config_of(tmp_path / "fp8") == config_of(plain) | {
        "torch_dtype": "bfloat16",
        "quantization_config": DEEPSEEK,
    }
    count = sum(map(is_matrix_of_block, before))
    assert (done.rounded, done.kept, done.nbytes) == (count, 0, sum(t.nbytes for t in after.values()))
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "fp8" / name).is_file() == (plain / name).is_file()


def test_ue8m0_is_the_least_power_of_two_that_suffices(plain: Path, tmp_path: Path) -> None:
    after = all_tensors(to(plain, tmp_path / "fp8", scale="ue8m0"))
    for name, tensor in load_file(plain / "model.safetensors").items():
        if is_matrix_of_block(name):
            codes, scales, _ = in_blocks(128, 128, power=True)(tensor)
            assert torch.equal(after[f"{name}_scale_inv"], scales), name
            assert torch.equal(after[name].view(torch.uint8), codes.view(torch.uint8)), name
    assert config_of(tmp_path / "fp8")["quantization_config"] == DEEPSEEK | {"scale_fmt": "ue8m0"}


@pytest.mark.parametrize("scale", ["fp32", "ue8m0"])
def test_codes_are_kept_bit_for_bit(plain: Path, tmp_path: Path, scale: str) -> None:
    first = to(plain, tmp_path / "first", scale=scale)
    done = convert(ModelFiles(first), tmp_path / "again", "fp8")  # in the same scales
    once, again = all_tensors(first), all_tensors(tmp_path / "again")
    assert once.keys() == again.keys() and done.rounded == 0
    assert all(torch.equal(t.view(torch.uint8), again[n].view(torch.uint8)) for n, t in once.items())
    assert config_of(first) == config_of(tmp_path / "again")


def test_other_codes_are_rounded_from_the_values(plain: Path, tmp_path: Path) -> None:
    first = to(plain, tmp_path / "fp32")
    done = convert(ModelFiles(first), tmp_path / "ue8m0", "fp8", "ue8m0")
    assert done.kept == 0
    values, after = values_of(first), all_tensors(tmp_path / "ue8m0")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    codes, scales, _ = in_blocks(128, 128, power=True)(values[name])
    assert torch.equal(after[f"{name}_scale_inv"], scales)
    assert torch.equal(after[name].view(torch.uint8), codes.view(torch.uint8))
    back = convert(ModelFiles(tmp_path / "ue8m0"), tmp_path / "fp32-again", "fp8", "fp32")
    assert back.rounded == 0  # powers of two are fp32 scales as they are


def test_bf16_holds_the_values_of_codes(plain: Path, tmp_path: Path) -> None:
    fp8 = to(plain, tmp_path / "fp8")
    bf16 = to(fp8, tmp_path / "bf16", "bf16")
    values, after = values_of(fp8), all_tensors(bf16)
    assert after.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(after[name].float(), tensor if "bias" in name else tensor.bfloat16().float()), name
    assert "quantization_config" not in config_of(bf16) and not (bf16 / "model.safetensors.index.json").exists()
    one, other = load_model(fp8).state_dict(), load_model(bf16).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_in_one_tensor_are_written_one_by_one(plain: Path, tmp_path: Path) -> None:
    fused = to(plain, tmp_path / "fused", "bf16")
    edit_tensors(fused, fuse)
    one, other = all_tensors(to(plain, tmp_path / "a", "bf16")), all_tensors(to(fused, tmp_path / "b", "bf16"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all_tensors(to(fused, tmp_path / "c")).keys() == all_tensors(to(plain, tmp_path / "d")).keys()


def test_cuts_between_rows_of_codes(plain: Path, tmp_path: Path) -> None:
    fused = to(plain, tmp_path / "fused", "bf16")
    edit_tensors(fused, fuse)
    names = ("experts.gate_up_proj", "experts.down_proj")

    def stack(x: torch.Tensor) -> tuple[torch.Tensor, ...]:  # gate and up, of 64 rows each, share a block
        return tuple(map(torch.stack, zip(*map(in_blocks(128, 128), x), strict=True)))

    values = quantise(fused, DEEPSEEK, stack, chosen=lambda name: name.endswith(names))  # type: ignore[arg-type]
    after = all_tensors(to(fused, tmp_path / "bf16", "bf16"))
    for kind, rows in (("gate", slice(0, 64)), ("up", slice(64, 128))):
        expected = values["model.layers.1.mlp.experts.gate_up_proj"][3, rows].bfloat16()
        assert torch.equal(after[f"model.layers.1.mlp.experts.3.{kind}_proj.weight"], expected)
    to(fused, tmp_path / "fp8")
    load_model(tmp_path / "fp8")


def test_models_of_our_own_are_written_too(make_config: Make, tmp_path: Path) -> None:
    config = make_config("model.attention=mha").model
    write_random_model(config, tmp_path / "own", seed=0, dtype="fp32")
    assert config_of(tmp_path / "own")["model_type"] == "moestro"
    to(tmp_path / "own", tmp_path / "fp8")
    files = ModelFiles(tmp_path / "fp8")
    assert files.config == config and files.stored_format("layers.0.attention.kv.weight") == "fp8"


def test_a_matrix_and_its_scales_are_in_one_file(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converting, "SHARD_BYTES", 50_000)
    out = to(plain, tmp_path / "fp8")
    files = json.loads((out / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]
    assert len(set(files.values())) > 10
    scales = [name for name in files if name.endswith("_scale_inv")]
    assert scales and all(files[name] == files[name.removesuffix("_scale_inv")] for name in scales)
    load_model(out)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("shard_bytes", [50_000, 10**9])
def test_torch_reads_what_is_written(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    monkeypatch.setattr(converting, "SHARD_BYTES", shard_bytes)
    out = to(plain, tmp_path / "fp8")
    expected = values_of(out)
    found = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=dcp.QuantizedHuggingFaceStorageReader(str(out)), no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_transformers_computes_the_same(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sides of whole blocks only: transformers refuses 576 rows in 5 blocks, and takes 192 in 2 for blocks of 96."""
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)  # only asked for
    write_random_model(make_config(*WHOLE_BLOCKS).model, tmp_path / "plain", seed=1, dtype="fp32")
    out = to(tmp_path / "plain", tmp_path / "fp8")
    theirs = DeepseekV3ForCausalLM.from_pretrained(out, dtype=torch.bfloat16, attn_implementation="eager")
    theirs = theirs.float().eval()  # values of codes, rounded to bf16
    ours, tokens = load_model(to(out, tmp_path / "bf16", "bf16"), torch.float32), torch.arange(40) * 7 % 300
    with torch.no_grad():
        logits = ours(tokens, AttentionBatch.causal(1, 40), logits=True).logits
        torch.testing.assert_close(logits, theirs(tokens[None]).logits[0], rtol=1e-4, atol=1e-4)
    assert logits.std() > 0.1


def test_weights_that_are_no_numbers_are_named(plain: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    source = to(plain, tmp_path / "bf16", "bf16")
    edit_tensors(source, lambda tensors: tensors[name][300, 200].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=f"{name} holds an infinity or a NaN"):
        to(source, tmp_path / "fp8")
    assert list(tmp_path.iterdir()) == [source]


def test_places_in_use_and_unknown_precisions_are_refused(plain: Path, tmp_path: Path) -> None:
    for precision, scale, named in (("fp4", None, "fp4"), ("fp8", "e5", "e5"), ("bf16", "fp32", "no scales")):
        with pytest.raises(ConfigError, match=named):
            to(plain, tmp_path / "out", precision, scale)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exists"):
        to(plain, plain)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
def test_an_interrupted_conversion_leaves_nothing(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    def fail(*_: Any, **__: Any) -> Iterator[Any]:
        assert not list((tmp_path).rglob("config.json"))  # nothing there looks like a model
        raise failure

    monkeypatch.setattr(converting, "convert_config", fail)
    expected = CheckpointError if isinstance(failure, OSError) else failure
    with pytest.raises(expected) as caught:
        to(plain, tmp_path / "out")
    assert not isinstance(failure, OSError) or "No space left on device; nothing is left" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_line(plain: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*out.*too large.*nothing is left") as caught:
            to(plain, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
