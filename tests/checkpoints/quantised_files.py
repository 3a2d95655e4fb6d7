"""Quantised model directories, made block by block in plain Python: nothing here uses what is under test.

`quantise` turns a plain directory into a quantised one and returns the values that its codes stand for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # codes, scales, values
# matrices at whose edges blocks are smaller: kv_a_proj_with_mqa has 576 rows, q_proj and kv_b_proj have 192
ODD_SIDES = [
    "model.hidden_dim=256", "model.num_heads=2", "model.kv_lora_rank=512", "model.nope_dim=32", "model.rope_dim=64",
    "model.v_dim=64", "model.expert_dim=64", "model.dense_dim=320", "model.init_std=0.2",
]  # fmt: skip
DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """quantization_config as llm-compressor writes it."""
    args = {
        "dynamic": False,
        "symmetric": True,
        "observer": "minmax",
        "actorder": None,
        "zp_dtype": "torch.int8",
        **weights,
    }
    group = {"targets": ["Linear"], "weights": args, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None, "quantization_status": "compressed",
    }  # fmt: skip


def is_matrix_of_block(name: str) -> bool:
    """Whether DeepSeek's own FP8 checkpoints have codes for a tensor."""
    return name.endswith(("_proj.weight", "kv_a_proj_with_mqa.weight")) and not name.endswith("eh_proj.weight")


def in_blocks(
    rows: int, columns: int, *, power: bool = False, store: Callable[[torch.Tensor], torch.Tensor] = lambda s: s
) -> Quantise:
    """E4M3 with a scale for every block of `rows` x `columns` (0: all), a power of two if `power`."""

    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        height, width = rows or x.shape[0], columns or x.shape[1]
        codes, values = torch.empty(x.shape, dtype=torch.float8_e4m3fn), torch.empty(x.shape)
        scales = torch.empty(math.ceil(x.shape[0] / height), math.ceil(x.shape[1] / width))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
                scale = x[at].float().abs().max() / 448
                if power:
                    scale = torch.tensor(2.0 ** math.ceil(math.log2(scale)))
                scale = scale.bfloat16().float() if store is half else scale
                codes[at], scales[i, j] = (x[at].float() / scale).to(torch.float8_e4m3fn), scale
                values[at] = codes[at].float() * scale
        return codes, store(scales), values

    return quantise


def half(scales: torch.Tensor) -> torch.Tensor:
    """Scales in bf16, as llm-compressor writes them for models in bf16."""
    return scales.bfloat16()


def exponents(scales: torch.Tensor) -> torch.Tensor:
    """Powers of two as bytes, 127 more than the exponent."""
    return (torch.frexp(scales).exponent + 126).to(torch.uint8)


def in_groups(group: int) -> Quantise:
    """4 bits with a bf16 scale for every `group` values of a row; eight codes an int32, the first in its low bits."""

    def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        size = group or x.shape[1]
        blocks = x.float().unflatten(1, (-1, size))
        scales = (blocks.abs().amax(-1) / 7.5).bfloat16()
        codes = (blocks / scales.float()[..., None]).round().clamp(-8, 7)
        values = (codes * scales.float()[..., None]).flatten(1)
        stored = (codes.flatten(1).long() + 8).unflatten(1, (-1, 8))
        words = sum(stored[..., k] << (4 * k) for k in range(8))
        assert isinstance(words, torch.Tensor)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32), scales, values

    return quantise


def quantise(
    directory: Path,
    config: Mapping[str, Any],
    encode: Quantise,
    *,
    suffix: str = "_scale_inv",
    chosen: Callable[[str], bool] = is_matrix_of_block,
) -> Tensors:
    """Quantise the chosen tensors of a plain directory in place; returns the values of all, by name."""
    path = directory / "model.safetensors"
    stored, values = Tensors(), load_file(path)
    for name, tensor in values.items():
        if not chosen(name):
            stored[name] = tensor
            continue
        codes, scales, values[name] = encode(tensor)
        stored[name + suffix] = scales
        if codes.dtype == torch.int32:
            stored[f"{name}_packed"] = codes
            stored[f"{name}_shape"] = torch.tensor(tensor.shape)
        else:
            stored[name] = codes
    save_file(stored, path)
    edit_config(directory, lambda tree: tree.update(quantization_config=dict(config)))
    return values


def edit_config(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json in place."""
    path = directory / "config.json"
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")


def edit_tensors(directory: Path, change: Callable[[Tensors], Any]) -> None:
    """Change the tensors of model.safetensors in place."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def all_tensors(directory: Path) -> Tensors:
    """All tensors of a directory."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}
