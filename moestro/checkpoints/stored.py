"""Which tensors of a directory hold a matrix: its values, or codes with their scales. Judged from headers alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moestro.checkpoints.quantized import Scheme, code_shape, code_type, fits_as_scales
from moestro.errors import CheckpointError

FLOAT_FORMATS = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
WIDTHS = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I32": 4}  # bytes, by types that are read
Place = tuple[str, Path]  # the name of a tensor, and the file that has it


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of a tensor before its bytes; `dtype` is a name of the safetensors format."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of a tensor of a type that is read."""
        return math.prod(self.shape) * WIDTHS[self.dtype]


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that holds the rows of a parameter from `start` on, with its scales if these are codes.

    `format` is fp32, bf16, fp16, fp8 or int4; `shape` is that of the values; `nbytes` counts codes and scales.
    `sizes` is a tensor that repeats the shape.
    """

    place: Place
    start: int
    shape: tuple[int, ...]
    format: str
    nbytes: int
    scale: Place | None = None
    sizes: Place | None = None

    @property
    def names(self) -> set[str]:
        """The names of all its tensors; the scale of activations that may come with codes is not used."""
        names = {place[0] for place in (self.place, self.scale, self.sizes) if place is not None}
        return names if self.scale is None else {*names, f"{self.place[0].rpartition('.')[0]}.input_scale"}


def find_stored(
    name: str, shape: Sequence[int], start: int, headers: Mapping[str, Header], scheme: Scheme | None
) -> Stored | None:
    """The tensor `name` of values of `shape`, in whichever form it is stored; None if it is in none.

    CheckpointError if it has another type or shape, is FP8 without a scale, or has a scale that is not its own.
    """
    scale = f"{name}{scheme.suffix}" if scheme is not None else ""
    packed = f"{name}_packed" if scheme is not None and scheme.format == "int4" else name
    found = packed if packed in headers else name
    header = headers.get(found)
    if header is None:
        if scale in headers:
            raise CheckpointError(f"{headers[scale].path} has the scale {scale}, but no file has {packed}")
        return None
    if header.dtype in FLOAT_FORMATS and found == name:
        _check_shape(name, header, shape)
        if scale in headers:
            raise CheckpointError(f"{header.path}: {name} is stored as {header.dtype}, but has the scale {scale}")
        return Stored((name, header.path), start, tuple(shape), FLOAT_FORMATS[header.dtype], header.nbytes)
    if header.dtype == "F64":
        raise CheckpointError(f"{header.path}: {found} holds 64-bit numbers: save it as float32 or bfloat16")
    if scheme is None or (found, header.dtype) != (packed, code_type(scheme)) or len(shape) < 2:
        announced = "has no quantization_config" if scheme is None else f"announces {scheme}"
        raise CheckpointError(f"{header.path}: {found} is stored as {header.dtype}, and config.json {announced}")
    _check_shape(found, header, code_shape(scheme, shape))
    if scale not in headers:
        raise CheckpointError(f"{header.path}: {found} is quantised, but no file has its scale {scale}")
    factors = headers[scale]
    if not fits_as_scales(scheme, factors.dtype, factors.shape, shape):
        held, wanted = f"{list(factors.shape)} of {factors.dtype}", f"{list(scheme.grid(shape))}, {scheme}"
        raise CheckpointError(f"{factors.path}: {scale} is {held}; {list(shape)} values need {wanted}")
    sizes = f"{name}_shape" if f"{name}_shape" in headers and scheme.format == "int4" else None
    return Stored(
        (found, header.path), start, tuple(shape), scheme.format, header.nbytes + factors.nbytes,
        (scale, factors.path), (sizes, headers[sizes].path) if sizes else None,
    )  # fmt: skip


def _check_shape(name: str, header: Header, shape: Sequence[int]) -> None:
    if header.shape != tuple(shape):
        raise CheckpointError(f"{header.path}: {name} has shape {list(header.shape)}, expected {list(shape)}")


def label(place: Place) -> str:
    """A tensor and its file, for messages."""
    return f"{place[1]}: {place[0]}"
