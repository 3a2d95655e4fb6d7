"""A model directory in another precision: FP8 as DeepSeek publishes it, or bf16.

FP8 is written for the matrices of blocks (attention, dense layers, routed and shared experts, those of MTP modules
too): `X.weight` in E4M3 and `X.weight_scale_inv`, fp32, for every 128 x 128 values, both in one file. Embedding, head,
norms, routers and `eh_proj` are bf16, biases of routers fp32. Matrices are read, converted and written one by one.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from moestro.checkpoints.files import ModelFiles, slot_shape, write_tensors
from moestro.checkpoints.hf import Slot, tensor_map
from moestro.checkpoints.packed import COPIED, copy_files, new_directory
from moestro.checkpoints.quantized import scheme_to_hf
from moestro.errors import CheckpointError, ConfigError
from moestro.ops.fp8 import SQUARE, Scale, quantize_fp8
from moestro.ops.serving.codes import Codes

Precision = Literal["fp8", "bf16"]
SHARD_BYTES = 1_000_000_000
FRACTION_BITS = (1 << 23) - 1


@dataclass(frozen=True)
class Converted:
    """What was written: bytes of all tensors, and how many FP8 matrices kept their codes or were rounded."""

    nbytes: int
    kept: int
    rounded: int


def convert(source: ModelFiles, out: Path, to: Precision, scale: Scale | None = None) -> Converted:
    """Write a model as the new directory `out`; `scale` of FP8: by default that of FP8 weights, else fp32.

    FP8 weights in blocks of 128 x 128 keep their codes if their scales are of the kind asked for. `out` appears only
    when everything is on disk. ConfigError if it already exists, CheckpointError if the disk is full.
    """
    if to not in ("fp8", "bf16"):
        raise ConfigError(f"weights are converted to fp8 or bf16, not '{to}'")
    if scale not in (None, "fp32", "ue8m0") or (scale and to == "bf16"):
        raise ConfigError(
            f"scales of fp8 weights are fp32 or ue8m0, not '{scale}'" if to == "fp8" else "bf16 has no scales"
        )
    with new_directory(out) as partial:
        return write_converted(source, partial, to, scale)


def write_converted(source: ModelFiles, folder: Path, to: Precision, scale: Scale | None = None) -> Converted:
    """Write the tokenizer, the weights and, last of all, config.json into a folder; see `convert`."""
    copy_files(source.directory, folder, [name for name in COPIED if name != "config.json"])
    writer = _Writer(source, to, scale or (source.scheme.scale if source.scheme is not None else "fp32"))
    write_tensors(folder, writer.tensors(), SHARD_BYTES, indexed=to == "fp8")
    tree = convert_config(source.tree, to, writer.scale)
    (folder / "config.json").write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return Converted(writer.nbytes, writer.kept, writer.rounded)


def convert_config(tree: dict[str, Any], to: Precision, scale: Scale) -> dict[str, Any]:
    """config.json of the same model in another precision."""
    tree = {key: value for key, value in tree.items() if key not in ("quantization_config", "dtype")}
    quantization = {"quantization_config": scheme_to_hf(scale)} if to == "fp8" else {}
    return tree | {"torch_dtype": "bfloat16"} | quantization


class _Writer:
    def __init__(self, source: ModelFiles, to: Precision, scale: Scale) -> None:
        self.source, self.to, self.scale = source, to, scale
        self.nbytes = self.kept = self.rounded = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) in the order of `tensor_map`."""
        groups: dict[tuple[str, int | None], list[tuple[str, Slot]]] = defaultdict(list)
        for name, slot in tensor_map(self.source.config).items():
            groups[slot.parameter, slot.expert].append((name, slot))
        for (parameter, expert), slots in groups.items():
            parts = self.source.rows(parameter, expert)
            for name, slot in slots:
                shape = slot_shape(self.source.shapes[parameter], slot)
                for written in self._convert(name, slot, cut_rows(parts, slot.start or 0, shape[0])):
                    self.nbytes += written[1].nbytes
                    yield written

    def _convert(self, name: str, slot: Slot, rows: Tensor | Codes) -> Iterator[tuple[str, Tensor]]:
        if slot.parameter.endswith(".router.bias"):
            yield name, as_values(rows, torch.float32)
        elif self.to == "bf16" or not is_quantised(slot.parameter):
            yield name, as_values(rows, torch.bfloat16)
        else:
            codes, scales = self._quantise(name, rows)
            yield from ((name, codes), (f"{name}_scale_inv", scales))

    def _quantise(self, name: str, rows: Tensor | Codes) -> tuple[Tensor, Tensor]:
        if isinstance(rows, Codes) and keeps_codes(rows, self.scale):
            self.kept += 1
            return rows.codes, rows.scales
        codes, scales = quantize_fp8(as_values(rows, torch.float32), SQUARE, self.scale)
        if not scales.isfinite().all():
            raise CheckpointError(f"{self.source.directory}: {name} holds an infinity or a NaN")
        self.rounded += 1
        return codes, scales


def is_quantised(parameter: str) -> bool:
    """Whether official FP8 checkpoints store a parameter as codes: the matrices of blocks, without their routers."""
    in_block = ".attention." in parameter or ".ffn." in parameter
    return in_block and ".router." not in parameter and not parameter.endswith("_norm.weight")


def keeps_codes(rows: Codes, scale: Scale) -> bool:
    """Whether codes are already what would be written: FP8 in the same blocks; for ue8m0 no scale has a fraction."""
    if rows.format != "fp8" or rows.block != SQUARE:
        return False
    return scale == "fp32" or not bool((rows.scales.view(torch.int32) & FRACTION_BITS).any())


def as_values(rows: Tensor | Codes, dtype: torch.dtype) -> Tensor:
    """Rows as numbers of a type, rounded once."""
    return rows.values(dtype) if isinstance(rows, Codes) else rows.to(dtype)


def cut_rows(parts: list[Tensor | Codes], start: int, count: int) -> Tensor | Codes:
    """`count` rows from `start` on, all within one of the tensors; codes stay codes if the cut is between blocks."""
    at = 0
    while start >= (height := len(_stored(parts[at]))):
        start, at = start - height, at + 1
    part = parts[at]
    if not isinstance(part, Codes):
        return part[start : start + count]
    if count == height:
        return part
    side = part.block[0]
    if start % side:
        return part.values()[start : start + count]
    scales = part.scales[start // side : -(-(start + count) // side)]
    return Codes(part.format, part.codes[start : start + count], scales, part.block)


def _stored(rows: Tensor | Codes) -> Tensor:
    return rows.codes if isinstance(rows, Codes) else rows
