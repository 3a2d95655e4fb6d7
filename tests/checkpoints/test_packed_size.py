"""What weights are said to take packed, before they are: exactly what is written and held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moestro.checkpoints.files import ModelFiles
from moestro.checkpoints.packed import PackedFiles
from moestro.checkpoints.packing import pack_model, packed_bytes
from moestro.config import Config, build_config, load_preset
from moestro.engine.language_model import pack
from moestro.model.parts import saved_tensors
from moestro.model.size import measure_size
from moestro.model.transformer import Transformer
from moestro.ops.serving.formats import FORMATS

Make = Callable[..., Config]
SHAPES = ("model.expert_dim=40", "model.q_lora_rank=20", "model.num_shared_experts=2")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_the_size_is_that_of_the_packed_model(make_config: Make, format: str, attention: str) -> None:
    model = Transformer(make_config(f"model.attention={attention}", *SHAPES).model)
    held = {
        name: sum(tensor.nbytes for tensor in saved_tensors(name, part).values())
        for name, part in pack_model(model, format).parts.items()
    }
    assert packed_bytes(model, format) == packed_bytes(model.config, format, torch.float32) == held


@pytest.mark.parametrize("format", ["fp32", "int4", "fp8"])
def test_the_size_is_that_which_pack_writes(tiny_run: Path, tmp_path: Path, format: str) -> None:
    checkpoint = max((tiny_run / "checkpoints").iterdir())
    sizes = packed_bytes(ModelFiles(checkpoint), format)
    written = pack(tiny_run, tmp_path / format, weights=format)
    assert sum(sizes.values()) == written.nbytes
    assert packed_bytes(PackedFiles(tmp_path / format)) == sizes


def test_published_sizes() -> None:
    """V3 in bf16: 2 bytes for each of 671B parameters; int4 takes 4.5 bits (docs/weights.md) of nearly all of them."""
    config = build_config(load_preset("deepseek-v3"), ["model.mtp_depth=0"]).model
    total = measure_size(config).total
    assert sum(packed_bytes(config, "bf16").values()) == pytest.approx(2 * total, rel=0.002)
    assert sum(packed_bytes(config, "int4").values()) == pytest.approx(4.5 / 8 * total, rel=0.01)
    assert sum(packed_bytes(config, "fp8").values()) == pytest.approx(8.25 / 8 * total, rel=0.02)
