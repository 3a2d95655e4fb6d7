"""Quantised directories as they are served: every code kept, and results as of plain torch on what codes mean."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantised_files import (
    DEEPSEEK,
    ODD_SIDES,
    Quantise,
    compressed,
    in_blocks,
    in_groups,
    is_matrix_of_block,
    quantise,
)

from moestro.checkpoints.files import ModelFiles, read_model
from moestro.checkpoints.packed import PackedFiles, write_packed
from moestro.checkpoints.packing import PackedModel, choose_format, pack_model, write_parts
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.engine.paged_cache import PagedCache
from moestro.engine.runtime import Runtime
from moestro.engine.scheduler import pages_for
from moestro.errors import ConfigError
from moestro.model.attention import AttentionBatch
from moestro.ops.serving import formats
from moestro.ops.serving.weights import PackedExperts, PackedLinear

Make = Callable[..., Config]
FP8, INT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "int"}
FORMS: dict[str, tuple[dict[str, object], Quantise, str, str]] = {
    "blocks": (DEEPSEEK, in_blocks(128, 128), "_scale_inv", "fp8"),
    "rows": (compressed("float-quantized", **FP8, strategy="channel"), in_blocks(1, 0), "_scale", "fp8"),
    "matrices": (compressed("float-quantized", **FP8, strategy="tensor"), in_blocks(0, 0), "_scale", "fp8"),
    "int4": (compressed("pack-quantized", **INT4, strategy="group", group_size=32), in_groups(32), "_scale", "int4"),
}
TOKENS = torch.randint(0, 300, (70,), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain(make_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain") / "model"
    write_random_model(make_config(*ODD_SIDES).model, directory, seed=3, dtype="bf16")
    return directory


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, plain: Path, tmp_path: Path) -> tuple[Path, str]:
    """A quantised directory, and the format of its codes."""
    config, encode, suffix, format = FORMS[request.param]
    shutil.copytree(plain, tmp_path / "model")
    quantise(tmp_path / "model", config, encode, suffix=suffix)
    return tmp_path / "model", format


def matrix(panels: torch.Tensor, format: str, rows: int, columns: int) -> torch.Tensor:
    return formats.unpack_panels(panels, format).transpose(-1, -2).flatten(-3, -2)[..., :rows, :columns]


@torch.inference_mode()
def serve(packed: PackedModel, ids: torch.Tensor | None = None, **options: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and expert ids; `ids` replays those of another pass."""
    runtime = Runtime(packed, **options)
    pages = list(range(pages_for(len(TOKENS))))
    cache = PagedCache(runtime.config, len(pages), runtime.dtype)
    output = runtime.forward(cache.prepare([(TOKENS.tolist(), 0, pages)]), cache, ids)
    return runtime.logits(output.hidden), output.ids


def served_logits(packed: PackedModel) -> torch.Tensor:
    return serve(packed)[0]


def test_every_matrix_keeps_its_codes(form: tuple[Path, str]) -> None:
    directory, format = form
    files = ModelFiles(directory, torch.float32)
    packed, config = pack_model(files), files.config
    assert packed.format == format
    for index in range(config.num_layers):
        at = f"layers.{index}"
        linears = {f"{at}.attention.down": ("q", "kv_down"), f"{at}.attention.out": ("out",)}
        for name, parameters in linears.items():
            part = packed.parts[name]
            assert isinstance(part, PackedLinear) and part.format == format
            stored = [rows for p in parameters for rows in files.parts(f"{at}.attention.{p}.weight")]
            assert torch.equal(matrix(part.panels, format, *part.sizes), torch.cat(stored))
    experts, at = packed.parts["layers.1.ffn.experts"], "layers.1.ffn.experts"
    assert isinstance(experts, PackedExperts) and experts.format == format
    width, hidden = config.expert_dim, config.hidden_dim
    for expert in range(config.num_experts):
        mixed = matrix(experts.gate_up[expert], format, 2 * width, hidden).unflatten(0, (-1, 2, 32))
        gate_up = mixed.transpose(0, 1).flatten(0, 2)
        assert torch.equal(gate_up, torch.cat(files.parts(f"{at}.gate_up", expert)))
        down = matrix(experts.down[expert], format, hidden, width)
        assert torch.equal(down, torch.cat(files.parts(f"{at}.down", expert)))
    head = packed.parts["head"]
    assert isinstance(head, PackedLinear) and head.format == "fp32"  # stored as numbers


def test_logits_are_those_of_plain_torch_on_the_values(form: tuple[Path, str]) -> None:
    files = ModelFiles(form[0], torch.float32)
    model = read_model(files)
    with torch.inference_mode():
        expected = model(TOKENS, AttentionBatch.causal(1, len(TOKENS)), logits=True).logits
    error = served_logits(pack_model(files)) - expected
    # int4 weights meet rows of 8 bits, so that some tokens meet other experts; fp8 weights meet rows as they are
    assert error.norm() <= (1e-5 if form[1] == "fp8" else 0.2) * expected.norm()


def test_packed_directories_map_the_same(form: tuple[Path, str], tmp_path: Path) -> None:
    files, out = ModelFiles(form[0]), tmp_path / "packed"
    with write_packed(out, files, choose_format(files, None)) as save:
        write_parts(files, choose_format(files, None), save)
    mapped = pack_model(PackedFiles(out))
    assert mapped.format == form[1] and mapped.mapped == out
    assert torch.equal(served_logits(mapped), served_logits(pack_model(files)))


def test_a_head_of_codes_is_kept_and_mapped(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    quantise(
        tmp_path / "model",
        DEEPSEEK,
        in_blocks(128, 128),
        chosen=lambda name: name == "lm_head.weight" or is_matrix_of_block(name),
    )
    files, out = ModelFiles(tmp_path / "model"), tmp_path / "packed"
    with write_packed(out, files, "fp8") as save:
        write_parts(files, "fp8", save)
    head = pack_model(PackedFiles(out)).parts["head"]
    assert isinstance(head, PackedLinear) and head.format == "fp8"
    assert torch.equal(matrix(head.panels, "fp8", *head.sizes).bfloat16(), files.parts("head.weight")[0])


def test_codes_are_converted_only_where_asked(form: tuple[Path, str]) -> None:
    files = ModelFiles(form[0])
    kept, same = pack_model(files), pack_model(files, form[1])
    for name, part in kept.parts.items():
        assert type(part) is type(same.parts[name])
        assert getattr(part, "format", "") == getattr(same.parts[name], "format", "")
    wide = pack_model(files, "bf16").parts["layers.1.ffn.experts"]
    assert isinstance(wide, PackedExperts) and wide.format == "bf16"
    stored = torch.cat(files.parts("layers.1.ffn.experts.down", 0))
    assert torch.equal(matrix(wide.down[0], "bf16", *stored.shape), stored.float())


def test_finer_blocks_than_a_panel_has_are_served_as_numbers(plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "model")
    quantise(tmp_path / "model", DEEPSEEK | {"weight_block_size": [64, 32]}, in_blocks(64, 32))
    files = ModelFiles(tmp_path / "model", torch.float32)
    packed = pack_model(files)
    assert packed.format == "fp32"
    with torch.inference_mode():
        expected = read_model(files)(TOKENS, AttentionBatch.causal(1, len(TOKENS)), logits=True).logits
    assert (served_logits(packed) - expected).norm() <= 1e-5 * expected.norm()


def test_activations_in_fp8_are_near_and_need_fp8_weights(form: tuple[Path, str]) -> None:
    packed = pack_model(ModelFiles(form[0]))
    if form[1] != "fp8":
        with pytest.raises(ConfigError, match="activations in fp8 need weights in fp8, and these are int4"):
            Runtime(packed, activations="fp8")
        return
    exact, ids = serve(packed)
    rounded, _ = serve(packed, ids, activations="fp8")
    assert 1e-3 * exact.norm() < (rounded - exact).norm() < 0.4 * exact.norm()  # random weights amplify
    assert torch.equal(served_logits(packed), exact)  # the next runtime says again what its products do
    with pytest.raises(ConfigError, match="activations must be auto or fp8, not 'int8'"):
        Runtime(packed, activations="int8")
