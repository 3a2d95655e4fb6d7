"""A serving step as operations on rows. A served model is written in them once and runs in two ways.

    Eager    runs each operation at once, on tensors: plain torch, or the kernels one by one
    Tape     records each operation; `run` then executes all of them in one native call (csrc/abi/run.cpp)

A forward pass of a small model is hundreds of operations of a few microseconds each, about as long as a call from
Python takes. On a tape, operands are places in one block of memory, counted in bytes per row, so one tape serves any
number of rows. Both compute the same, bit for bit if the kernels are built: a tape calls the same functions.

Values such as `x` below are [N, groups, width], contiguous or slices of contiguous ones.
"""

from __future__ import annotations

import array
import ctypes
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from moestro.ops import library
from moestro.ops.abi import SCORES, Cache, Opcode, Step
from moestro.ops.library import CACHE_TYPES, TYPES
from moestro.ops.serving import attention, fp8_rows, rows
from moestro.ops.serving.reference import PAGE
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.routing.selection import Selection

_LINE = 64  # bytes: values start at cache lines


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where a step's rows go and what they attend to. All are int64, except `tables` and the angles.

    slots [N], page · 64 + place; tables [S, M] int32, starts [S + 1] and first [S] as for `attention.paged_attention`;
    cos and sin [N, R/2] fp32.
    """

    slots: Tensor
    tables: Tensor
    starts: Tensor
    first: Tensor
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Heads:
    """How attention reads rows of the cache; see `attention.paged_attention`."""

    groups: int
    value_offset: int
    value_width: int
    scale: float


Value = TypeVar("Value")
Caches = Mapping[str, Tensor]  # what a layer caches: pages [P, 64, W] by name, each with its own width and type


class Operations(Protocol[Value]):
    """The operations of a served model; `Eager` runs them on tensors, `Tape` on operands."""

    def scratch(self) -> AbstractContextManager[None]:
        """Values made inside are gone afterwards; values made before may be added to."""

    def linear(self, weight: PackedLinear, x: Value) -> Value:
        """[N, ..] with K values per row -> [N, 1, M]."""

    def heads(self, weight: PackedHeads, x: Value) -> Value:
        """[N, H, K] -> [N, H, V]."""

    def norm(self, x: Value, weight: Tensor, eps: float) -> Value:
        """RMSNorm of [N, 1, D]."""

    def swiglu(self, x: Value) -> Value:
        """[N, 1, 2F] -> [N, 1, F]."""

    def add(self, x: Value, y: Value) -> Value:
        """The sum of x and y [N, 1, D]; it may overwrite x."""

    def group(self, x: Value, groups: int) -> Value:
        """[N, 1, groups · W] -> [N, groups, W]."""

    def split(self, x: Value, widths: Sequence[int]) -> list[Value]:
        """Slices of the last axis."""

    def join(self, parts: Sequence[Value]) -> Value:
        """[N, groups, w] each -> [N, groups, Σ w]."""

    def rope(self, x: Value) -> Value:
        """x rotated by the angles of its rows."""

    def widen(self, x: Value) -> Value:
        """x in fp32."""

    def store(self, layer: int, name: str, x: Value, coded: int = 0) -> None:
        """Write rows into one of a layer's caches; an FP8 cache keeps the first `coded` values of a row as codes."""

    def attend(self, layer: int, name: str, q: Value, heads: Heads, selection: Value | None = None) -> Value:
        """[N, H, K] -> [N, H, V], over the rows of one of a layer's caches: all, or selected positions [N, 1, M] int32.

        See `attention.paged_attention`.
        """

    def route(self, index: int, logits: Value | None, selection: Selection) -> Value:
        """Logits [N, 1, E] fp32 of the index-th router -> weights; the ids stay with the step."""

    def experts(self, index: int, weight: PackedExperts, x: Value, weights: Value) -> Value:
        """[N, 1, D] through the experts that the index-th router chose."""


class Eager:
    """Runs operations at once. `ids` [L, N, A] int64: the experts already known; −1 where still to be chosen.

    `weights` [N, A] fp32 of every router so far.
    """

    def __init__(self, layout: StepLayout, layers: Sequence[Caches], ids: Tensor) -> None:
        self.layout, self.layers, self.ids = layout, layers, ids
        self.weights: list[Tensor] = []

    def scratch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def linear(self, weight: PackedLinear, x: Tensor) -> Tensor:
        return weight(x.flatten(1))[:, None]

    def heads(self, weight: PackedHeads, x: Tensor) -> Tensor:
        return weight(x)

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rows.rms_norm(x, weight, eps)

    def swiglu(self, x: Tensor) -> Tensor:
        return rows.swiglu(x.flatten(1))[:, None]

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def group(self, x: Tensor, groups: int) -> Tensor:
        return x.flatten(1).unflatten(1, (groups, -1))

    def split(self, x: Tensor, widths: Sequence[int]) -> list[Tensor]:
        return list(x.split(list(widths), -1))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), -1)

    def rope(self, x: Tensor) -> Tensor:
        return rows.rope(x, self.layout.cos, self.layout.sin)

    def widen(self, x: Tensor) -> Tensor:
        return x.float()

    def store(self, layer: int, name: str, x: Tensor, coded: int = 0) -> None:
        pages, slots, x = self.layers[layer][name], self.layout.slots, x.flatten(1)
        if pages.dtype == torch.uint8:
            fp8_rows.store_rows(pages, slots, x, coded)
        else:
            pages.flatten(0, 1)[slots] = x

    def attend(self, layer: int, name: str, q: Tensor, heads: Heads, selection: Tensor | None = None) -> Tensor:
        layout = self.layout
        return attention.paged_attention(
            q, self.layers[layer][name], layout.tables, layout.starts, layout.first,
            groups=heads.groups, value_offset=heads.value_offset, value_width=heads.value_width, scale=heads.scale,
            selection=None if selection is None else selection.flatten(1),
        )  # fmt: skip

    def route(self, index: int, logits: Tensor | None, selection: Selection) -> Tensor:
        if logits is None:
            logits = torch.zeros(self.ids.shape[1], len(selection.bias))
        ids, weights = rows.route(logits.flatten(1), selection, self.ids[index])
        self.ids[index] = ids
        self.weights.append(weights)
        return weights

    def experts(self, index: int, weight: PackedExperts, x: Tensor, weights: Tensor) -> Tensor:
        return weight(x.flatten(1), self.ids[index], weights)[:, None]


@dataclass(frozen=True, slots=True)
class Operand:
    """A value on a tape: `groups` vectors of `width`, `stride` apart, starting at `offset` in rows of `row` values."""

    at: int
    row: int
    offset: int
    groups: int
    stride: int
    width: int
    wide: bool  # numbers of 4 bytes, fp32 or int32, whatever the model's type is

    @property
    def is_whole(self) -> bool:
        """Whether it fills its memory, vector after vector."""
        return self.row == self.groups * self.width and (self.groups == 1 or self.stride == self.width)


class Tape:
    """Operations of a model in `dtype`, to be run many times. Packed weights and norms it names must outlive it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self._type = dtype, TYPES[dtype]
        self._code = array.array("q")
        self._top = self._row_bytes = 0
        self._kept: list[Tensor] = []
        self._caches: list[tuple[int, str]] = []  # by the index in operations
        self._seen: list[weakref.ref[Tensor]] = []  # the caches in `_bound`
        self._bound: tuple[ctypes.Array[Cache], int] | None = None

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Values made inside give up their memory afterwards."""
        top = self._top
        yield
        self._top = top

    def value(self, width: int, groups: int = 1, *, wide: bool = False) -> Operand:
        """Room for a value."""
        place = Operand(self._top, groups * width, 0, groups, width, width, wide)
        self._top += -(-groups * width * self._size(wide) // _LINE) * _LINE
        self._row_bytes = max(self._row_bytes, self._top)
        return place

    def linear(self, weight: PackedLinear, x: Operand) -> Operand:
        return self._multiply(weight, x, self.value(weight.out_features, wide=x.wide), 1)

    def heads(self, weight: PackedHeads, x: Operand) -> Operand:
        groups = len(weight.panels)
        return self._multiply(weight, x, self.value(weight.out_features, groups), groups)

    def norm(self, x: Operand, weight: Tensor, eps: float) -> Operand:
        x, out = self._whole(x), self.value(x.width)
        self._check(x, len(weight))
        self._note(Opcode.NORM, out.at, x.at, self._keep(weight), x.width, _bits(eps), TYPES[weight.dtype], self._type)
        return out

    def swiglu(self, x: Operand) -> Operand:
        x, out = self._whole(x), self.value(x.width // 2)
        self._note(Opcode.SWIGLU, out.at, x.at, out.width, self._type)
        return out

    def add(self, x: Operand, y: Operand) -> Operand:
        """Adds y to x in place."""
        self._check(x, y.row)
        self._note(Opcode.ADD, x.at, x.at, self._whole(y).at, x.row, self._type)
        return x

    def group(self, x: Operand, groups: int) -> Operand:
        assert x.groups == 1 and x.width % groups == 0
        return replace(x, groups=groups, stride=x.width // groups, width=x.width // groups)

    def split(self, x: Operand, widths: Sequence[int]) -> list[Operand]:
        self._check(replace(x, row=x.width), sum(widths))
        starts = [sum(widths[:i]) for i in range(len(widths))]
        return [replace(x, offset=x.offset + start, width=w) for start, w in zip(starts, widths, strict=True)]

    def join(self, parts: Sequence[Operand]) -> Operand:
        out = self.value(sum(part.width for part in parts), parts[0].groups)
        for part, into in zip(parts, self.split(out, [part.width for part in parts]), strict=True):
            self._copy(into, part)
        return out

    def rope(self, x: Operand) -> Operand:
        out = self.value(x.width, x.groups)
        self._note(Opcode.ROPE, out.at, x.at, x.row, x.offset, x.groups, x.stride, x.width, self._type)
        return out

    def widen(self, x: Operand) -> Operand:
        if self.dtype == torch.float32:
            return x
        out = self.value(x.width, wide=True)
        self._note(Opcode.WIDEN, out.at, self._whole(x).at, x.width)
        return out

    def store(self, layer: int, name: str, x: Operand, coded: int = 0) -> None:
        cache, at, width = self._cache(layer, name), self._whole(x).at, x.groups * x.width
        self._note(Opcode.STORE, cache, at, width, coded, self._type_of(x))

    def attend(self, layer: int, name: str, q: Operand, heads: Heads, selection: Operand | None = None) -> Operand:
        q, out = self._whole(q), self.value(heads.value_width, q.groups)
        sizes = (q.groups, q.width, heads.value_width, heads.groups, heads.value_offset)
        chosen = (-1, 0) if selection is None else (self._whole(selection).at, selection.width)
        operands = (out.at, q.at, self._cache(layer, name), *sizes, _bits(heads.scale), self._type, *chosen)
        self._note(Opcode.ATTENTION, *operands)
        return out

    def route(self, index: int, logits: Operand | None, selection: Selection) -> Operand:
        s, out = selection, self.value(selection.top_k, wide=True)
        sizes = (len(s.bias), s.num_groups, s.top_k_groups)
        kinds = (SCORES[s.score], s.group_best, s.multiply, s.normalize, 1)
        bias = self._keep(s.bias.float().contiguous())
        self._note(
            Opcode.ROUTE, index, out.at, 0 if logits is None else logits.at, bias, *sizes, _bits(s.scale), *kinds
        )
        return out

    def experts(self, index: int, weight: PackedExperts, x: Operand, weights: Operand) -> Operand:
        x, out = self._whole(x), self.value(weight.hidden_dim)
        self._check(x, weight.hidden_dim)
        sizes = (weight.num_experts, weight.hidden_dim, weight.expert_dim, weight.code, self._type)
        self._note(Opcode.EXPERTS, out.at, x.at, weights.at, index, *weight.tables, *sizes)
        return out

    def run(
        self,
        inputs: Sequence[tuple[Operand, Tensor]],
        layout: StepLayout,
        layers: Sequence[Caches],
        ids: Tensor,
        out: Operand,
    ) -> Tensor:
        """Input values [N, D], where the rows go, the caches, ids [L, N, A] as for `Eager` -> `out` [N, D]."""
        n, (caches, pages) = len(layout.slots), self._bind(layers)
        fits = (
            len(layout.tables) == len(layout.first) == len(layout.starts) - 1 and len(layout.cos) == n == ids.shape[1]
        )
        if not fits or layout.tables.dtype != torch.int32:
            raise ValueError(f"the layout of a step of {n} rows or its ids do not fit")
        memory = torch.empty(n * self._row_bytes // self.dtype.itemsize, dtype=self.dtype)
        for place, x in inputs:
            self._view(memory, place, n, self._kept_as(place, x.dtype)).copy_(x)
        step = Step(
            *(
                memory.data_ptr(),
                ids.data_ptr(),
                ctypes.addressof(caches),
                layout.cos.data_ptr(),
                layout.sin.data_ptr(),
            ),
            *(layout.slots.data_ptr(), layout.starts.data_ptr(), layout.first.data_ptr(), layout.tables.data_ptr()),
            *(n, self._row_bytes, ids.shape[0], ids.shape[2], len(caches), pages, layout.cos.shape[1]),
            *(*layout.tables.shape, torch.get_num_threads()),
        )
        library.call("moestro_run", self._code.buffer_info()[0], len(self._code), ctypes.addressof(step))
        return self._view(memory, out, n, self._kept_as(out, torch.float32)).clone()

    def _bind(self, layers: Sequence[Caches]) -> tuple[ctypes.Array[Cache], int]:
        """The caches as kernels take them, rebuilt if they differ from the last step's, and their number of pages."""
        found = [layers[layer][name] for layer, name in self._caches]
        if self._bound is None or not all(seen() is cache for seen, cache in zip(self._seen, found, strict=True)):
            pages = found[0].shape[0] if found else 0
            if not all(t.shape[:2] == (pages, PAGE) and t.is_contiguous() and t.dtype in CACHE_TYPES for t in found):
                raise ValueError(f"caches are fp32, bf16 or uint8 [{pages}, {PAGE}, W] each, which these do not fit")
            self._seen = [weakref.ref(cache) for cache in found]  # a tape keeps no cache alive
            made = (Cache(t.data_ptr(), t.shape[2], CACHE_TYPES[t.dtype]) for t in found)
            self._bound = (Cache * len(found))(*made), pages
        return self._bound

    def _view(self, memory: Tensor, place: Operand, n: int, dtype: torch.dtype) -> Tensor:
        typed = memory if dtype == memory.dtype else memory.view(dtype)
        return typed.as_strided((n, place.row), (place.row, 1), place.at * n // dtype.itemsize)

    def _size(self, wide: bool) -> int:
        return 4 if wide else self.dtype.itemsize

    def _type_of(self, x: Operand) -> int:
        return TYPES[torch.float32] if x.wide else self._type

    def _kept_as(self, place: Operand, given: torch.dtype) -> torch.dtype:
        """The type in which to keep a value of type `given`: positions stay int32."""
        return self.dtype if not place.wide else torch.int32 if given == torch.int32 else torch.float32

    def _cache(self, layer: int, name: str) -> int:
        """The index of a cache, assigned when it is first used."""
        if (layer, name) not in self._caches:
            self._caches.append((layer, name))
            self._bound = None
        return self._caches.index((layer, name))

    def _note(self, opcode: Opcode, *operands: int) -> None:
        assert len(operands) == len(opcode.operands), opcode
        self._code.extend((opcode, *operands))

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor that the tape keeps alive."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _check(self, x: Operand, row: int) -> None:
        if x.row != row:
            raise ValueError(f"a value of {x.row} numbers a row where {row} are needed")

    def _whole(self, x: Operand) -> Operand:
        """The same value in its own memory."""
        return x if x.is_whole else self._copy(self.value(x.width, x.groups, wide=x.wide), x)

    def _copy(self, out: Operand, x: Operand) -> Operand:
        size = self._size(x.wide)
        sides = (v * size for p in (out, x) for v in (p.row, p.offset, p.stride if p.groups > 1 else 0))
        out_row, out_offset, out_group, x_row, x_offset, x_group = sides
        self._note(
            Opcode.COPY,
            out.at,
            out_row,
            out_offset,
            out_group,
            x.at,
            x_row,
            x_offset,
            x_group,
            x.groups,
            x.width * size,
        )
        return out

    def _multiply(self, weight: PackedLinear | PackedHeads, x: Operand, out: Operand, groups: int) -> Operand:
        x = self._whole(x)
        self._check(x, groups * weight.in_features)
        sizes = (groups, weight.out_features, weight.in_features, weight.code, self._type_of(x))
        self._note(Opcode.LINEAR, out.at, x.at, weight.panels.data_ptr(), *sizes)
        return out


def _bits(value: float) -> int:
    """The bits of a double, as a number on a tape."""
    return int(struct.unpack("q", struct.pack("d", value))[0])
