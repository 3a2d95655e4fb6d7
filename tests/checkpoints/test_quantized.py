"""Quantised directories: every published form read as what its codes stand for, and one clear line for the rest."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_experts import fuse
from quantised_files import (
    DEEPSEEK,
    ODD_SIDES,
    Quantise,
    Tensors,
    compressed,
    edit_config,
    edit_tensors,
    exponents,
    half,
    in_blocks,
    in_groups,
    is_matrix_of_block,
    quantise,
)
from safetensors.torch import load_file, save_file

from moestro.checkpoints.files import ModelFiles, load_model
from moestro.checkpoints.quantized import Scheme, read_scales, read_scheme
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.errors import CheckpointError
from moestro.ops.serving.codes import Codes

Make = Callable[..., Config]
POWERS = DEEPSEEK | {"scale_fmt": "ue8m0"}
FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}
KV = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"  # 576 rows
FORMS: dict[str, tuple[dict[str, Any], Quantise, str]] = {
    "deepseek-v3": (DEEPSEEK, in_blocks(128, 128), "_scale_inv"),
    "deepseek-v3.1": (POWERS, in_blocks(128, 128, power=True), "_scale_inv"),
    "e8m0": (
        POWERS,
        in_blocks(128, 128, power=True, store=lambda s: exponents(s).view(torch.float8_e8m0fnu)),
        "_scale_inv",
    ),
    "bytes": (POWERS | {"weight_block_size": [64, 32]}, in_blocks(64, 32, power=True, store=exponents), "_scale_inv"),
    "blocks": (
        compressed("float-quantized", **FP8, strategy="block", block_structure=[128, 128]),
        in_blocks(128, 128, store=half),
        "_scale",
    ),
    "rows": (compressed("float-quantized", **FP8, strategy="channel"), in_blocks(1, 0, store=half), "_scale"),
    "matrices": (
        compressed("float-quantized", **FP8, strategy="tensor"),
        in_blocks(0, 0, store=lambda s: s[0]),
        "_scale",
    ),
    "int4": (compressed("pack-quantized", **INT4, strategy="group", group_size=32), in_groups(32), "_scale"),
    "int4-rows": (compressed("pack-quantized", **INT4, strategy="channel"), in_groups(0), "_scale"),
}


@pytest.fixture(scope="module")
def plain(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    write_random_model(make_config(*ODD_SIDES).model, directory, seed=3, dtype="bf16")
    return directory


@pytest.fixture
def directory(plain: Path, tmp_path: Path) -> Path:
    """A directory of its own, still plain."""
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def fp8(directory: Path) -> Path:
    quantise(directory, DEEPSEEK, in_blocks(128, 128))
    return directory


def save_values(directory: Path, values: Tensors, dtype: torch.dtype) -> Path:
    """A plain directory with given values, those of matrices rounded to `dtype`."""
    other = directory.with_name(f"values-{dtype}".replace("torch.", ""))
    shutil.copytree(directory, other)
    edit_config(other, lambda tree: tree.pop("quantization_config"))
    save_file({name: t.to(dtype) if is_matrix_of_block(name) else t for name, t in values.items()},
              other / "model.safetensors")  # fmt: skip
    return other


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_its_codes_stand_for(directory: Path, form: str) -> None:
    config, encode, suffix = FORMS[form]
    values = quantise(directory, config, encode, suffix=suffix)
    model, expected = load_model(directory), load_model(save_values(directory, values, torch.bfloat16))
    assert model.dtype == torch.bfloat16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    wide = load_model(directory, torch.float32)
    expected = load_model(save_values(directory, values, torch.float32), torch.float32)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(wide.state_dict()[name], tensor), name


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_given_in_the_order_of_rows(directory: Path, form: str) -> None:
    config, encode, suffix = FORMS[form]
    values = quantise(directory, config, encode, suffix=suffix)
    files = ModelFiles(directory)
    kind = "int4" if form.startswith("int4") else "fp8"
    pair = files.codes("layers.1.ffn.experts.gate_up", 5)
    assert pair is not None and [part.format for part in pair] == [kind, kind]
    for part, name in zip(pair, ("gate", "up"), strict=True):
        assert torch.equal(part.values(), values[f"model.layers.1.mlp.experts.5.{name}_proj.weight"])
        assert part.scales.dtype == torch.float32
    (kv,) = files.codes("mtp.0.block.attention.kv_down.weight") or []
    assert torch.equal(kv.values(), values["model.layers.2.self_attn.kv_a_proj_with_mqa.weight"])
    assert files.codes("embed.weight") is files.codes("layers.1.ffn.router.weight") is None
    assert files.codes("layers.1.ffn.router.bias") is None
    assert files.stored_format("layers.1.ffn.experts.down") == kind and files.stored_format("embed.weight") is None
    sizes = files.stored_formats
    assert sizes.keys() == {kind, "bf16", "fp32"} and sizes["fp32"] == 2 * 8 * 4  # biases of routers
    assert sum(sizes.values()) == sum(
        t.nbytes for n, t in load_file(directory / "model.safetensors").items() if not n.endswith("_shape")
    )


def test_as_kimi_k2_thinking_only_experts_are_codes(directory: Path) -> None:
    config = FORMS["int4"][0] | {
        "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"]
    }
    values = quantise(directory, config, in_groups(32), suffix="_scale", chosen=lambda name: ".mlp.experts." in name)
    files = ModelFiles(directory)
    assert files.stored_format("layers.1.ffn.experts.gate_up") == "int4"
    assert files.stored_format("layers.1.attention.out.weight") is None
    assert torch.equal(
        files.parts("layers.1.attention.out.weight")[0], values["model.layers.1.self_attn.o_proj.weight"]
    )


def test_a_parameter_of_codes_and_values_has_no_format(fp8: Path, plain: Path) -> None:
    name = "model.layers.1.mlp.experts.5.up_proj.weight"

    def mix(tensors: Tensors) -> None:
        tensors[name] = load_file(plain / "model.safetensors")[name]
        del tensors[f"{name}_scale_inv"]

    edit_tensors(fp8, mix)
    files = ModelFiles(fp8)
    assert files.stored_format("layers.1.ffn.experts.gate_up") is None
    assert files.codes("layers.1.ffn.experts.gate_up", 5) is None
    assert [type(rows) for rows in files.rows("layers.1.ffn.experts.gate_up", 5)] == [Codes, torch.Tensor]
    assert files.codes("layers.1.ffn.experts.gate_up", 4) is not None


def test_experts_in_one_tensor_have_their_scales_in_one(directory: Path) -> None:
    edit_tensors(directory, fuse)
    names = ("experts.gate_up_proj", "experts.down_proj")

    def stack(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.stack, zip(*map(in_blocks(128, 128), x), strict=True)))

    values = quantise(directory, DEEPSEEK, stack, chosen=lambda name: name.endswith(names))  # type: ignore[arg-type]
    files = ModelFiles(directory)
    (codes,) = files.codes("layers.1.ffn.experts.gate_up", 3) or []
    assert torch.equal(codes.values(), values["model.layers.1.mlp.experts.gate_up_proj"][3])
    assert torch.equal(
        load_model(directory).get_parameter("layers.1.ffn.experts.down"),
        values["model.layers.1.mlp.experts.down_proj"].bfloat16(),
    )


def test_training_starts_from_the_values_in_full(fp8: Path, make_config: Make) -> None:
    from moestro.checkpoints.files import fill_model
    from moestro.training.prepare import build_model

    model, _ = build_model(make_config(*ODD_SIDES))
    fill_model(model, ModelFiles(fp8))
    stored = load_file(fp8 / "model.safetensors")
    scales = stored[f"{KV}_scale_inv"].repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)
    assert torch.equal(model.get_parameter("layers.0.attention.kv_down.weight"), stored[KV].float() * scales)


def test_scales_of_static_activations_are_passed_over(directory: Path) -> None:
    config, encode, suffix = FORMS["matrices"]
    values = quantise(directory, config, encode, suffix=suffix)
    edit_tensors(directory, lambda t: t.update({KV.replace("weight", "input_scale"): torch.ones(1)}))
    loaded = load_model(directory, torch.float32).get_parameter("layers.0.attention.kv_down.weight")
    assert torch.equal(loaded, values[KV])


def test_bytes_are_powers_of_two() -> None:
    scheme = Scheme("fp8", (1, 1), scale="ue8m0")
    for byte in range(256):
        scales = torch.tensor([[byte]], dtype=torch.uint8)
        if byte > 246:  # 448 · 2^(byte − 127) is no fp32, and 255 is NaN
            with pytest.raises(CheckpointError, match="holds the scale"):
                read_scales(scheme, scales, (1, 1), "X")
        else:
            for stored in (scales, scales.view(torch.float8_e8m0fnu)):
                assert read_scales(scheme, stored, (1, 1), "X").item() == 2.0 ** (byte - 127)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (0.0, "scale 0"),
        (-1.0, "scale -1"),
        (float("nan"), "scale nan"),
        (float("inf"), "scale inf"),
        (1e36, r"scale 1e\+36"),
    ],
)
def test_impossible_scales_are_named_with_their_file(fp8: Path, value: float, named: str) -> None:
    edit_tensors(fp8, lambda tensors: tensors[f"{KV}_scale_inv"][4, 1].fill_(value))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {KV}_scale_inv holds the {named}"):
        load_model(fp8)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_of_nan_are_named_with_their_file(fp8: Path, code: int) -> None:
    edit_tensors(fp8, lambda tensors: tensors[KV].view(torch.uint8)[575, 255].fill_(code))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {KV} holds the code of NaN"):
        load_model(fp8)


CHANGES: list[tuple[Callable[[Tensors], Any], str]] = [
    (lambda t: t.pop(f"{KV}_scale_inv"), f"{KV} is quantised, but no file has its scale"),
    (lambda t: t.pop(KV), f"has the scale {KV}_scale_inv, but no file has {KV}"),
    (lambda t: t.update({KV: t[KV].bfloat16()}), f"{KV} is stored as BF16, but has the scale"),
    (lambda t: t.update({KV: t[KV].to(torch.float8_e5m2)}), f"{KV} is stored as F8_E5M2"),
    (lambda t: t.update({f"{KV}_scale_inv": t[f"{KV}_scale_inv"][:4].clone()}), r"_scale_inv is \[4, 2\]"),
    (lambda t: t.update({f"{KV}_scale_inv": t[f"{KV}_scale_inv"].T.contiguous()}), r"_scale_inv is \[2, 5\]"),
    (lambda t: t.update({f"{KV}_scale_inv": t[f"{KV}_scale_inv"].int()}), "of I32"),
    (lambda t: t.update({f"{KV}_scale_inv": exponents(t[f"{KV}_scale_inv"])}), "of U8"),
    (lambda t: t.update({KV: t[KV][:512].clone()}), rf"{KV} has shape \[512, 256\]"),
    (lambda t: t.update({"lm_head.weight_scale_inv": torch.ones(3, 2)}), "lm_head.weight is stored as BF16"),
    (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)}), "model.norm.weight is"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_tensors_that_do_not_belong_together_are_named(fp8: Path, change: Callable[..., Any], named: str) -> None:
    edit_tensors(fp8, change)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_model(fp8)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


def test_config_and_tensors_must_agree(fp8: Path, directory: Path, plain: Path) -> None:
    edit_config(fp8, lambda tree: tree.pop("quantization_config"))
    with pytest.raises(CheckpointError, match=r"F8_E4M3, and config\.json has no quantization_config"):
        load_model(fp8)
    edit_config(fp8, lambda tree: tree.update(quantization_config=FORMS["int4"][0]))
    with pytest.raises(CheckpointError, match=r"F8_E4M3, and config\.json announces int4, blocks 1 x 32"):
        load_model(fp8)
    shutil.copy(plain / "model.safetensors", directory / "model.safetensors")
    edit_config(directory, lambda tree: tree.update(quantization_config=DEEPSEEK))
    files = ModelFiles(directory)
    assert files.scheme is None and any("all tensors hold plain values" in text for text in files.notices)


def test_words_of_int4_are_checked(directory: Path) -> None:
    config, encode, suffix = FORMS["int4"]
    quantise(directory, config, encode, suffix=suffix)
    edit_tensors(directory, lambda tensors: tensors[f"{KV}_shape"].copy_(torch.tensor([256, 576])))
    with pytest.raises(CheckpointError, match=rf"{KV}_shape is not \[576, 256\]"):
        load_model(directory)
    edit_tensors(directory, lambda tensors: tensors.update({KV: tensors.pop(f"{KV}_packed")}))
    with pytest.raises(CheckpointError, match=f"{KV} is stored as I32"):
        load_model(directory)
    edit_tensors(directory, lambda tensors: tensors.pop(KV))
    with pytest.raises(CheckpointError, match=f"no file has {KV}_packed"):
        load_model(directory)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("fp8", "quantization_config='fp8', which is no object"),
        ([], "which is no object"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"bits": 4}, "quant_method=None"),
        (DEEPSEEK | {"fmt": "e5m2"}, "fmt='e5m2'; supported is 'e4m3'"),
        (DEEPSEEK | {"activation_scheme": "static"}, "activation_scheme"),
        (DEEPSEEK | {"scale_fmt": "e3m4"}, "scale_fmt='e3m4'"),
        (DEEPSEEK | {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (DEEPSEEK | {"weight_block_size": [128, 0]}, "weight_block_size"),
        (DEEPSEEK | {"weight_block_size": [128.0, True]}, "weight_block_size"),
        (DEEPSEEK | {"weight_block_size": None}, "weight_block_size=None"),
        (DEEPSEEK | {"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        (DEEPSEEK | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head', which is no list"),
        (DEEPSEEK | {"ignored_layers": [1]}, "ignored_layers"),
        (DEEPSEEK | {"spin": 3}, "keys that nothing here uses: spin"),
        (compressed("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group"), "nvfp4-pack-quantized"),
        (compressed("float-quantized", **FP8, strategy="group", group_size=128), "float-quantized, 8, float, group"),
        (compressed("pack-quantized", **INT4, strategy="group", group_size=-1), "group_size"),
        (
            compressed("pack-quantized", **(INT4 | {"num_bits": 3}), strategy="group", group_size=32),
            "pack-quantized, 3",
        ),
        (compressed("float-quantized", **FP8, strategy="channel", symmetric=False), "symmetric=False"),
        (compressed("float-quantized", **FP8, strategy="channel") | {"kv_cache_scheme": FP8}, "kv_cache_scheme"),
        (compressed("float-quantized", **FP8, strategy="channel") | {"config_groups": {}}, "config_groups"),
        (compressed("float-quantized", **FP8, strategy="channel") | {"config_groups": {"a": 3}}, "config_groups"),
    ],
)
def test_what_cannot_be_honoured_is_named(fp8: Path, config: Any, named: str) -> None:
    edit_config(fp8, lambda tree: tree.update(quantization_config=config))
    with pytest.raises(CheckpointError, match=named):
        ModelFiles(fp8)


def test_defaults_and_harmless_keys() -> None:
    assert read_scheme({}) is read_scheme({"quantization_config": None}) is None
    bare = read_scheme({"quantization_config": {"quant_method": "fp8"}})
    assert bare == Scheme("fp8", (128, 128)) and str(bare) == "fp8, blocks 128 x 128, fp32 scales"
    lists = {"modules_to_not_convert": ["lm_head"], "ignored_layers": [], "ignore": ["re:.*gate"], "scale_fmt": None}
    assert read_scheme({"quantization_config": DEEPSEEK | lists}) == bare
    assert str(read_scheme({"quantization_config": FORMS["rows"][0]})) == "fp8, one scale a row, fp32 scales"
