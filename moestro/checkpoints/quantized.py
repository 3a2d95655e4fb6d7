"""Quantised weights of published checkpoints: how config.json announces them, how they are named, checked and read.

    method of quantization_config         tensors of a matrix X [M, K]
    fp8 (DeepSeek-V3, R1, V3.1, Kimi-K2)  X F8_E4M3, X_scale_inv: a scale for every 128 x 128 values
    compressed-tensors, float-quantized   X F8_E4M3, X_scale: for every block, for every row [M, 1], or one
    compressed-tensors, pack-quantized    X_packed int32 [M, K / 8], X_scale [M, K / group], X_shape: the numbers M, K

X is the name of a tensor, such as `….q_a_proj.weight`. Every scale is a factor: value = code · scale. Eight codes of 4
bits share an int32, the first in the lowest bits, each stored as 8 + code. Under `scale_fmt: ue8m0` scales are powers
of two, as numbers or as bytes (2^(byte − 127)). Edge blocks are smaller where a side is no multiple of 128, so the size
of blocks always comes from config.json, never from the shape of the scales.

The type of a tensor says whether it holds codes. Lists of modules that were not converted (`LISTS`) say the same once
more, and published ones are not complete, so they change nothing. FP8 without a scale is always an error, because as
plain numbers it is thousands of times too large. Settings for activations are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moestro.errors import CheckpointError
from moestro.ops.fp8 import LARGEST, SQUARE, Block, Scale
from moestro.ops.serving.codes import CodeFormat

SCALE_TYPES = ("F32", "BF16", "F16", "F8_E8M0")
NAN_CODE = 0x7F  # and the same with a sign
CODES_PER_WORD = 8
LISTS = ("modules_to_not_convert", "ignored_layers", "ignore")  # of modules that stay plain; three tools, three names
NO_EFFECT = {"quant_method", "dequantize", "quantization_status", "global_compression_ratio", "version", *LISTS}
# keys that must have one of these values if given
FP8_VALUES: dict[str, tuple[Any, ...]] = {
    "fmt": ("e4m3",), "activation_scheme": ("dynamic",), "scale_fmt": ("float", "ue8m0"), "expert_dtype": ("fp8",),
    "modules_to_convert": ([],),
}  # fmt: skip
PACKED_VALUES: dict[str, tuple[Any, ...]] = {
    "kv_cache_scheme": (), "sparsity_config": ({},), "transform_config": ({},), "moe_sparsity_config": (),
}  # fmt: skip
WEIGHT_VALUES: dict[str, tuple[Any, ...]] = {
    "symmetric": (True,), "dynamic": (False,), "actorder": ("static", "weight"),
}  # fmt: skip
WEIGHT_FORM = {
    "num_bits", "type", "strategy", "block_structure", "group_size",
    "observer", "observer_kwargs", "scale_dtype", "zp_dtype",
}  # fmt: skip
LARGEST_BLOCK = 1024


@dataclass(frozen=True)
class Scheme:
    """How all quantised matrices of a directory are stored.

    `block` counts rows and columns that share a scale, 0 meaning all of them. The scale of X is named X + `suffix`.
    """

    format: CodeFormat
    block: Block = SQUARE
    suffix: str = "_scale_inv"
    scale: Scale = "fp32"

    def block_of(self, shape: Sequence[int]) -> Block:
        """The block in a matrix of `shape` [..., M, K]."""
        return self.block[0] or shape[-2], self.block[1] or shape[-1]

    def grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a matrix of `shape` [..., M, K]."""
        rows, columns = self.block_of(shape)
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))

    def __str__(self) -> str:
        rows, columns = self.block
        whole = "one scale a matrix" if rows == 0 else "one scale a row"
        blocks = f"blocks {rows} x {columns}" if rows and columns else whole
        return f"{self.format}, {blocks}, {self.scale} scales"


def read_scheme(tree: Mapping[str, Any]) -> Scheme | None:
    """The scheme that a config.json announces, None if its weights are plain; CheckpointError names what is unknown."""
    config = tree.get("quantization_config")
    if config is None or config == {}:
        return None
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json has quantization_config={config!r}, which is no object")
    for key in LISTS:
        _check_modules(key, config.get(key))
    match config.get("quant_method"):
        case "fp8":
            return _read_fp8(config)
        case "compressed-tensors":
            return _read_compressed(config)
        case method:
            raise CheckpointError(f"config.json has quant_method={method!r}; supported are fp8 and compressed-tensors")


def scheme_to_hf(scale: Scale) -> dict[str, Any]:
    """quantization_config of FP8 weights in blocks, as DeepSeek publishes them."""
    config = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [*SQUARE]}
    return config | ({"scale_fmt": "ue8m0"} if scale == "ue8m0" else {})


def _read_fp8(config: Mapping[str, Any]) -> Scheme:
    _check_values(config, FP8_VALUES, NO_EFFECT | {"weight_block_size"})
    block = _read_block("weight_block_size", config.get("weight_block_size", [*SQUARE]))
    return Scheme("fp8", block, "_scale_inv", "ue8m0" if config.get("scale_fmt") == "ue8m0" else "fp32")


def _read_compressed(config: Mapping[str, Any]) -> Scheme:
    _check_values(config, PACKED_VALUES, NO_EFFECT | {"format", "config_groups"})
    groups = config.get("config_groups")
    members = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [group.get("weights") if isinstance(group, Mapping) else None for group in members]
    if not weights or not isinstance(weights[0], Mapping) or any(other != weights[0] for other in weights):
        raise CheckpointError("quantization_config has no config_groups with weights of one form")
    args, form = weights[0], config.get("format")
    _check_values(args, WEIGHT_VALUES, WEIGHT_FORM)
    kind = (form, args.get("num_bits"), args.get("type"), args.get("strategy"))
    match kind:
        case ("float-quantized", 8, "float", "block"):
            return Scheme("fp8", _read_block("block_structure", args.get("block_structure")), "_scale")
        case ("float-quantized", 8, "float", "channel") | ("pack-quantized", 4, "int", "channel"):
            block = (1, 0)
        case ("float-quantized", 8, "float", "tensor"):
            block = (0, 0)
        case ("pack-quantized", 4, "int", "group"):
            block = _read_block("group_size", [1, args.get("group_size")])
        case _:
            named = ", ".join(map(str, kind))
            raise CheckpointError(
                f"config.json has compressed-tensors of the kind {named}; supported are float-quantized (8, float, "
                "block, channel or tensor) and pack-quantized (4, int, group or channel)"
            )
    return Scheme("int4" if form == "pack-quantized" else "fp8", block, "_scale")


def _check_values(config: Mapping[str, Any], values: Mapping[str, tuple[Any, ...]], others: set[str]) -> None:
    """Refuse keys that nothing here knows, and values that cannot be honoured; null is as good as no key."""
    for key, allowed in values.items():
        if config.get(key) is not None and config[key] not in allowed:
            supported = " or ".join(map(repr, allowed or (None,)))
            raise CheckpointError(f"quantization_config has {key}={config[key]!r}; supported is {supported}")
    unknown = sorted(str(key) for key in config.keys() - values.keys() - others)
    if unknown:
        raise CheckpointError(f"quantization_config has keys that nothing here uses: {', '.join(unknown)}")


def _read_block(key: str, value: Any) -> Block:
    sides = value if isinstance(value, list) and len(value) == 2 else [None]
    if not all(type(side) is int and 0 < side <= LARGEST_BLOCK for side in sides):
        raise CheckpointError(f"quantization_config has {key}={value!r}; supported are sides of 1 to {LARGEST_BLOCK}")
    return value[0], value[1]


def _check_modules(key: str, names: Any) -> None:
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise CheckpointError(f"quantization_config has {key}={names!r}, which is no list of names")


def code_type(scheme: Scheme) -> str:
    """The type of a tensor of codes, as safetensors names it."""
    return "F8_E4M3" if scheme.format == "fp8" else "I32"


def code_shape(scheme: Scheme, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the codes of a matrix of `shape` [..., M, K]."""
    return tuple(shape) if scheme.format == "fp8" else (*shape[:-1], -(-shape[-1] // CODES_PER_WORD))


def fits_as_scales(scheme: Scheme, dtype: str, found: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a tensor of type `dtype` and shape `found` can hold the scales of a matrix of `shape`."""
    is_bytes = dtype == "U8" and scheme.scale == "ue8m0"
    shapes = [scheme.grid(shape)]
    if scheme.block == (0, 0) and len(shape) == 2:
        shapes += [(), (1,)]
    return (dtype in SCALE_TYPES or is_bytes) and tuple(found) in shapes


def read_codes(scheme: Scheme, stored: Tensor, shape: Sequence[int], label: str) -> Tensor:
    """The codes of a matrix of `shape` as `Codes` holds them; CheckpointError with `label` if one is a NaN."""
    if scheme.format == "int4":
        return unpack_int4(stored, shape[-1])
    if ((stored.view(torch.uint8) & NAN_CODE) == NAN_CODE).any():
        raise CheckpointError(f"{label} holds the code of NaN: the checkpoint is damaged")
    return stored


def read_scales(scheme: Scheme, stored: Tensor, shape: Sequence[int], label: str) -> Tensor:
    """The scales of a matrix of `shape` as a grid of fp32.

    CheckpointError with `label` unless all are above 0 and the largest code times the scale is finite.
    """
    scales = (stored.view(torch.float8_e8m0fnu) if stored.dtype == torch.uint8 else stored).to(torch.float32)
    bad = ~((scales > 0) & (scales * LARGEST < torch.inf))  # NaN is neither
    if bad.any():
        raise CheckpointError(f"{label} holds the scale {scales[bad][0]:g}: scales are above 0 and below 7e+35")
    return scales.reshape(scheme.grid(shape))


def unpack_int4(words: Tensor, columns: int) -> Tensor:
    """Words [..., M, ⌈K / 8⌉] int32 -> codes [..., M, K] uint8, each 8 + code; a byte holds two, the first below."""
    halves = words.contiguous().view(torch.uint8)
    return torch.stack((halves & 0xF, halves >> 4), -1).flatten(-2)[..., :columns].contiguous()
