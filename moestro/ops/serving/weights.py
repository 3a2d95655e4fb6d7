"""Packed weights and their products with rows: linear layers, a matrix for every head, experts.

One promise holds for all of them: a row of the result depends on that row's inputs alone, bit for bit. It does not
depend on how many or which other rows there are, how a prompt was cut, or how many threads compute. Native kernels
(csrc/serving/packed.h) keep this promise by summing in a fixed order. If they are not built, or a tensor is neither
fp32 nor bf16, `reference.py` computes the same within rounding. `formats.py` describes the packed layouts.

No operation here has a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.abi import KINDS
from moestro.ops.serving import formats, reference
from moestro.ops.serving.codes import Codes, quantize_codes
from moestro.ops.serving.formats import FORMATS, PANEL, RowSource

PANELS_AT_ONCE = 64  # panels unpacked at a time
SIZES_BYTES = 3 * torch.int64.itemsize  # of the format and sizes that are saved beside panels


class _Matrices:
    """Packed matrices of one shape, stacked along `leading` dimensions, and how they are saved."""

    leading: int
    names = ("panels", "sizes")  # the keys of `tensors`

    def __init__(self, panels: Tensor, format: str, out_features: int, in_features: int) -> None:
        """Takes panels as `tensors` gives them; ValueError if they do not fit the sizes."""
        shape = formats.panel_shape(out_features, in_features, format)
        if tuple(panels.shape[self.leading :]) != shape or panels.dtype != torch.uint8:
            raise ValueError(f"{list(panels.shape)} bytes are not {format} panels of {out_features} x {in_features}")
        self.panels, self.format = panels.contiguous(), format
        self.out_features, self.in_features = out_features, in_features
        self.sizes = (*panels.shape[: self.leading], out_features, in_features)
        self.nbytes = panels.nbytes
        self._address, self.rounds_rows = self.panels.data_ptr(), False
        self.values: Tensor | None = None

    @property
    def code(self) -> int:
        """The number of its products in the C interface."""
        return _code_of(self.format, self.rounds_rows)

    @classmethod
    def empty(cls, format: str, *sizes: int) -> Self:
        """Unfilled memory for matrices of `sizes` (…, outputs, inputs)."""
        *number, rows, columns = sizes
        panels = formats.new_panels((*number, *formats.panel_shape(rows, columns, format)))
        return cls(panels, format, rows, columns)

    @classmethod
    def count_bytes(cls, format: str, *sizes: int) -> int:
        """Bytes of what `tensors` would give for matrices of `sizes`, which need not exist."""
        *number, rows, columns = sizes
        return math.prod([*number, *formats.panel_shape(rows, columns, format)]) + SIZES_BYTES

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` gave, perhaps memory-mapped."""
        format, rows, columns = _read_sizes(tensors["sizes"], 3)
        return cls(tensors["panels"], format, rows, columns)

    def tensors(self) -> dict[str, Tensor]:
        """What to save: the panels, and the format with the sizes."""
        panels = self.panels if self.values is None else self._panels_of(self.values)
        sizes = torch.tensor([FORMATS[self.format].code, self.out_features, self.in_features])
        return {"panels": panels, "sizes": sizes}

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The matrices [..., M, K] in `dtype`, or in fp32 if only that has all their numbers."""
        kind = _wide_enough(self.format, dtype)
        parts = [
            formats.unpack_panels(some, self.format).transpose(-1, -2).to(kind)
            for some in self.panels.flatten(0, self.leading).split(PANELS_AT_ONCE)
        ]  # [p, 64, K] each
        rows = torch.cat(parts).unflatten(0, self.panels.shape[: self.leading + 1]).flatten(-3, -2)
        return rows[..., : self.out_features, : self.in_features].contiguous()

    def bytes_to_open(self, dtype: torch.dtype) -> int:
        """Bytes that `open` takes beyond what it gives back."""
        kind = _wide_enough(self.format, dtype)
        return math.prod(self.sizes) * kind.itemsize - (0 if FORMATS[self.format].quantised else self.nbytes)

    def open(self, dtype: torch.dtype) -> None:
        """Keep `values`, what `unpack` gives, for products without kernels (`plain.py`).

        Panels that can be made again from the values are given up.
        """
        self.values = self.unpack(dtype)
        if not FORMATS[self.format].quantised:
            self.panels = self.panels.new_empty(0)

    def _panels_of(self, values: Tensor) -> Tensor:
        """The panels of an open matrix."""
        if FORMATS[self.format].quantised:
            return self.panels
        panels = formats.new_panels(
            (*values.shape[:-2], *formats.panel_shape(self.out_features, self.in_features, self.format))
        )
        _pack_each(
            values.flatten(0, -3) if self.leading else [values], self.format, panels if self.leading else [panels]
        )
        return panels

    def _refill(self, other: _Matrices) -> None:
        """Take the numbers of matrices just packed into an open one."""
        assert self.values is not None
        self.values.copy_(other.unpack(self.values.dtype))
        if FORMATS[self.format].quantised:
            self.panels.copy_(other.panels)


class PackedLinear(_Matrices):
    """y = x Wᵀ. Sums are in fp32; products are in fp32, or in bf16 if both are; quantised weights multiply codes."""

    leading = 0

    @classmethod
    def pack(cls, weight: Tensor | RowSource, format: str) -> PackedLinear:
        """weight [M, K] fp32 or bf16; format: one of `FORMATS`."""
        packed = cls.empty(format, *weight.shape)
        packed.fill(weight)
        return packed

    def fill(self, weight: Tensor | RowSource) -> None:
        """Pack another matrix of the same shape into the same memory."""
        if self.values is not None:
            return self._refill(self.pack(weight, self.format))
        formats.pack_panels(weight, self.format, out=self.panels)

    def fill_codes(self, parts: Sequence[Codes]) -> None:
        """The same from codes of this format, matrices one below the other, without rounding them again."""
        formats.pack_codes(parts, out=self.panels)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, K] fp32 or bf16 -> [N, M] of its type."""
        n, k = x.shape
        if k != self.in_features:
            raise ValueError(f"rows of {k} values for a matrix of {self.in_features}")
        if not library.serves(x):
            full = reference.linear(x, self.panels, self.format, round_rows=self.rounds_rows)
            return full[:, : self.out_features].to(x.dtype)
        x = x.contiguous()
        out = x.new_empty(n, self.out_features)
        sizes = (1, n, self.out_features, k, self.code, library.TYPES[x.dtype], torch.get_num_threads())
        library.call("moestro_packed_linear", out, x, self._address, *sizes)
        return out


class PackedHeads(_Matrices):
    """A small matrix for every head, as in the absorbed form of MLA."""

    leading = 1

    @classmethod
    def pack(cls, weight: Tensor, format: str | None = None) -> PackedHeads:
        """weight [H, V, K] fp32 or bf16; kept in its own type unless a format is given."""
        packed = cls.empty(format or formats.plain_format(weight.dtype), *weight.shape)
        packed.fill(weight)
        return packed

    def fill(self, weight: Tensor) -> None:
        """Pack other matrices of the same shape into the same memory."""
        if self.values is not None:
            return self._refill(self.pack(weight, self.format))
        _pack_each(weight, self.format, self.panels)

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, H, K] fp32 or bf16 -> [N, H, V] of its type."""
        n, heads, k = x.shape
        if (heads, k) != (len(self.panels), self.in_features):
            raise ValueError(f"{heads} heads of {k} values for {len(self.panels)} matrices of {self.in_features}")
        if not library.serves(x):
            parts = [reference.linear(a, p, self.format) for a, p in zip(x.unbind(1), self.panels, strict=True)]
            return torch.stack(parts, 1)[..., : self.out_features].to(x.dtype)
        x = x.contiguous()
        out = x.new_empty(n, heads, self.out_features)
        sizes = (heads, n, self.out_features, k, self.code, library.TYPES[x.dtype], torch.get_num_threads())
        library.call("moestro_packed_linear", out, x, self._address, *sizes)
        return out


class PackedExperts:
    """E SwiGLU experts: Σ over a token's choices of weight · W_down(silu(W_gate x) · W_up x).

    Kernels find each expert through `addresses` [2, E] int64: its panels of gate_up, then of down. A tape refers to
    that table, so `move` takes effect with the next step, without a new tape.
    """

    names = ("gate_up", "down", "sizes")  # the keys of `tensors`

    def __init__(self, gate_up: Tensor, down: Tensor, format: str, hidden_dim: int, expert_dim: int) -> None:
        """Panels [E, panels, bytes] as `tensors` gives them; ValueError if they do not fit the sizes."""
        shapes = tuple((len(gate_up), *shape) for shape in _expert_panels(format, hidden_dim, expert_dim))
        if (tuple(gate_up.shape), tuple(down.shape)) != shapes or {gate_up.dtype, down.dtype} != {torch.uint8}:
            raise ValueError(
                f"{list(gate_up.shape)} and {list(down.shape)} bytes are not {format} experts of {expert_dim}"
            )
        self.gate_up, self.down, self.format = gate_up.contiguous(), down.contiguous(), format
        self.num_experts, self.hidden_dim, self.expert_dim = len(gate_up), hidden_dim, expert_dim
        self.sizes = (len(gate_up), hidden_dim, expert_dim)
        self.nbytes = gate_up.nbytes + down.nbytes
        self.rounds_rows = False
        self.values: tuple[Tensor, Tensor] | None = None
        self._places = [list(part.unbind()) for part in (self.gate_up, self.down)]  # where each expert's panels are
        self.addresses = torch.tensor([[panels.data_ptr() for panels in part] for part in self._places])
        self.tables = tuple(part.data_ptr() for part in self.addresses)  # where the two rows of `addresses` are

    @property
    def code(self) -> int:
        """The number of its products in the C interface."""
        return _code_of(self.format, self.rounds_rows)

    @classmethod
    def pack(cls, gate_up: Tensor, down: Tensor, format: str) -> PackedExperts:
        """gate_up [E, 2F, D], gates first, and down [E, D, F], fp32 or bf16; format: one of `FORMATS`."""
        packed = cls.empty(format, *down.shape)
        packed.fill(gate_up, down)
        return packed

    @classmethod
    def empty(cls, format: str, num_experts: int, hidden_dim: int, expert_dim: int) -> PackedExperts:
        """Unfilled memory for experts of these sizes."""
        up_shape, down_shape = _expert_panels(format, hidden_dim, expert_dim)
        gate_up, down = formats.new_panels((num_experts, *up_shape)), formats.new_panels((num_experts, *down_shape))
        return cls(gate_up, down, format, hidden_dim, expert_dim)

    @classmethod
    def count_bytes(cls, format: str, num_experts: int, hidden_dim: int, expert_dim: int) -> int:
        """Bytes of what `tensors` would give for experts of these sizes."""
        panels = _expert_panels(format, hidden_dim, expert_dim)
        return num_experts * sum(map(math.prod, panels)) + SIZES_BYTES

    def fill(self, gate_up: Iterable[Tensor], down: Iterable[Tensor]) -> None:
        """Pack other experts of the same shapes into the current memory, one matrix at a time."""
        if self.values is not None:
            return self._refill(gate_up, down)
        if self.format == "fp8":  # gates and ups have blocks of their own
            halves = (one.unflatten(0, (2, self.expert_dim)) for one in gate_up)
            return self.fill_codes(
                ([*map(quantize_codes, both)] for both in halves), ([quantize_codes(w)] for w in down)
            )
        _pack_each((_mix(one, self.expert_dim) for one in gate_up), self.format, self._places[0])
        _pack_each(down, self.format, self._places[1])

    def fill_codes(self, gate_up: Iterable[Sequence[Codes]], down: Iterable[Sequence[Codes]]) -> None:
        """The same from codes of this format, without rounding them again; a matrix may come in several parts."""
        for panels, parts in zip(self._places[0], gate_up, strict=True):
            codes, scales = (_mix(rows, self.expert_dim) for rows in formats.join_codes(parts))
            formats.pack_rows(codes, scales, self.format, out=panels)
        for panels, parts in zip(self._places[1], down, strict=True):
            formats.pack_codes(parts, out=panels)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> PackedExperts:
        """What `tensors` gave, perhaps memory-mapped."""
        format, hidden, width = _read_sizes(tensors["sizes"], 3)
        return cls(tensors["gate_up"], tensors["down"], format, hidden, width)

    def tensors(self) -> dict[str, Tensor]:
        """What to save: the panels in their original place, and the format with the sizes."""
        if self.values is not None and not FORMATS[self.format].quantised:
            return self.pack(*self.values, self.format).tensors()
        sizes = torch.tensor([FORMATS[self.format].code, self.hidden_dim, self.expert_dim])
        return {"gate_up": self.gate_up, "down": self.down, "sizes": sizes}

    def expert(self, index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """One expert's gate_up [2F, D], gates first, and down [D, F], in `dtype` or wider."""
        if self.values is not None:
            return self.values[0][index], self.values[1][index]
        kind, half = _wide_enough(self.format, dtype), PANEL // 2
        mixed, down = (
            formats.unpack_panels(part[index], self.format).transpose(-1, -2).to(kind) for part in self._places
        )
        halves = mixed[..., : self.hidden_dim].unflatten(1, (2, half)).transpose(0, 1).flatten(1, 2)
        gate_up = halves[:, : self.expert_dim].flatten(0, 1)
        return gate_up, down.flatten(0, 1)[: self.hidden_dim, : self.expert_dim]

    def bytes_to_open(self, dtype: torch.dtype) -> int:
        """See `_Matrices`."""
        kind = _wide_enough(self.format, dtype)
        return 3 * math.prod(self.sizes) * kind.itemsize - (0 if FORMATS[self.format].quantised else self.nbytes)

    def open(self, dtype: torch.dtype) -> None:
        """See `_Matrices`: `values` are gate_up [E, 2F, D] and down [E, D, F]."""
        kind, (number, hidden, width) = _wide_enough(self.format, dtype), self.sizes
        gate_up, down = (
            torch.empty(number, 2 * width, hidden, dtype=kind),
            torch.empty(number, hidden, width, dtype=kind),
        )
        for index in range(number):
            gate_up[index], down[index] = self.expert(index, dtype)
        self.values = gate_up, down
        if not FORMATS[self.format].quantised:
            self.gate_up, self.down, self._places = (*[self.gate_up.new_empty(0)] * 2, [])

    def _refill(self, gate_up: Iterable[Tensor], down: Iterable[Tensor]) -> None:
        """Take the numbers of other experts into an open weight."""
        assert self.values is not None
        fresh = self.empty(self.format, *self.sizes)
        fresh.fill(gate_up, down)
        if FORMATS[self.format].quantised:
            self.gate_up.copy_(fresh.gate_up)
            self.down.copy_(fresh.down)
        for index in range(self.num_experts):
            self.values[0][index], self.values[1][index] = fresh.expert(index, self.values[0].dtype)

    def move(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Use these two tensors as an expert's panels from now on. Do not call it while a step runs.

        They have the shapes of `gate_up[expert]` and `down[expert]`, and are kept alive. `tensors` still gives the old
        place. ValueError if they do not fit.
        """
        for part, panels in zip(self._places, (gate_up, down), strict=True):
            same = (panels.shape, panels.dtype, panels.device) == (part[0].shape, torch.uint8, part[0].device)
            if not same or not panels.is_contiguous():
                raise ValueError(f"an expert's panels are {list(part[0].shape)} contiguous bytes, not {panels.shape}")
        for part, addresses, panels in zip(self._places, self.addresses, (gate_up, down), strict=True):
            part[expert], addresses[expert] = panels, panels.data_ptr()

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [N, D] fp32 or bf16, ids [N, A] int64 (id E: not carried out), weights [N, A] -> [N, D] of x's type."""
        n, hidden = x.shape
        if hidden != self.hidden_dim or ids.shape != weights.shape or len(ids) != n:
            raise ValueError(f"x {list(x.shape)}, ids {list(ids.shape)}, weights {list(weights.shape)} do not fit")
        if not library.serves(x):
            gate_up, down = self._places
            panels, round_rows = (gate_up, down, self.format), self.rounds_rows
            return reference.experts(x, ids, weights, *panels, round_rows=round_rows)[:, :hidden].to(x.dtype)
        x, ids, weights = x.contiguous(), ids.long().contiguous(), weights.float().contiguous()
        out = torch.empty_like(x)
        sizes = (n, ids.shape[1], self.num_experts, hidden, self.expert_dim)
        kinds = (self.code, library.TYPES[x.dtype], torch.get_num_threads())
        library.call("moestro_packed_experts", out, x, ids, weights, *self.tables, *sizes, *kinds)
        return out


def _code_of(format: str, rounds_rows: bool) -> int:
    """KINDS, by a weight's format and whether its products round rows to fp8; ValueError if they cannot."""
    if rounds_rows and format != "fp8":
        raise ValueError(f"rows meet {format} weights as they are, not rounded to fp8")
    return KINDS["fp8_both"] if rounds_rows else FORMATS[format].code


def _expert_panels(format: str, hidden_dim: int, expert_dim: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(panels, bytes of a panel) for an expert's gate_up and down."""
    up_rows = 2 * -(-expert_dim // 32) * 32
    return formats.panel_shape(up_rows, hidden_dim, format), formats.panel_shape(hidden_dim, expert_dim, format)


def _pack_each(matrices: Iterable[Tensor], format: str, out: Iterable[Tensor]) -> None:
    """Pack matrices [M, K] one by one into `out`, uint8 [number, panels, bytes of a panel]."""
    for packed, matrix in zip(out, matrices, strict=True):
        formats.pack_panels(matrix, format, out=packed)


def _mix(gate_up: Tensor, width: int) -> Tensor:
    """gate_up [2F, D] -> panels of 32 gates and their 32 ups, [64 · ⌈F / 32⌉, D]."""
    half = PANEL // 2
    halves = torch.nn.functional.pad(gate_up.unflatten(0, (2, width)), (0, 0, 0, -width % half))
    return halves.unflatten(1, (-1, half)).transpose(0, 1).flatten(0, 2)


def _wide_enough(format: str, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or fp32 for numbers that are kept in fp32."""
    return torch.float32 if format == "fp32" else dtype


def _read_sizes(sizes: Tensor, count: int) -> tuple[str, int, int]:
    """(format, rows, columns) from what `tensors` saved; ValueError for anything else."""
    numbers = sizes.tolist()
    names = {one.code: name for name, one in FORMATS.items()}
    if sizes.dtype != torch.int64 or len(numbers) != count or numbers[0] not in names or min(numbers) < 0:
        raise ValueError(f"{numbers} are not the format and sizes of a packed weight")
    return names[numbers[0]], numbers[1], numbers[2]
