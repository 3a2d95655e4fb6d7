"""The compiled kernels of `csrc/`, called through ctypes on the memory of CPU tensors.

Optional and never the specification: where the library was not built, or the CPU lacks AVX2, or a tensor is not fp32 or
bf16 in CPU memory, `fused.py` computes the same. Results depend neither on the number of threads nor on what else is in
the batch. `MOESTRO_ISA` (one of `ISAS`) forces a lower path than the best one, `MOESTRO_LIBRARY` names another build.
"""

from __future__ import annotations

import ctypes
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moestro import machine
from moestro.errors import ConfigError
from moestro.ops import fused

ISAS = ("avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16")
TYPES = {torch.float32: 0, torch.bfloat16: 1}
ERRORS = {1: "unsupported type", 2: "impossible size", 3: "out of memory", 4: "unsupported instruction set"}
MIN_LOAD = 8  # choices per expert below which packing its weights, done anew in every call, costs more than it saves
MIN_ROWS = 32  # of a linear layer, for the same reason
PLAIN = os.environ.get("MOESTRO_OPS", "") in ("reference", "fused")  # what forces plain torch does so in serving, too
LIBRARY = Path(os.environ.get("MOESTRO_LIBRARY") or Path(__file__).parent / "libmoestro.so")

_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "moestro_matmul": [_POINTER] * 3 + [_SIZE] * 6 + [_INT] * 5,
    "moestro_experts_forward": [_POINTER] * 8 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_experts_backward": [_POINTER] * 12 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_combine": [_POINTER] * 3 + [_SIZE] * 4 + [_INT] * 2,
    "moestro_multiply_in_registers": [_POINTER, _SIZE] + [_INT] * 2,
    "moestro_cross_entropy": [_POINTER] * 7 + [_SIZE] * 3 + [_INT] * 2,
    "moestro_pack": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 3,
    "moestro_packed_linear": [_POINTER] * 3 + [_SIZE] * 4 + [_INT] * 3,
    "moestro_packed_experts": [_POINTER] * 6 + [_SIZE] * 5 + [_INT] * 3,
    "moestro_paged_attention": [_POINTER] * 6 + [_SIZE] * 10 + [_FLOAT] + [_INT] * 2,
    "moestro_rms_norm": [_POINTER] * 3 + [_SIZE] * 2 + [_FLOAT] + [_INT] * 3,
    "moestro_swiglu": [_POINTER] * 2 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_flash_forward": [_POINTER] * 7 + [_SIZE] * 6 + [_FLOAT] + [_INT] * 2,
    "moestro_flash_backward": [_POINTER] * 11 + [_SIZE] * 6 + [_FLOAT] + [_INT] * 2,
    "moestro_rms_norm_backward": [_POINTER] * 5 + [_SIZE] * 2 + [_FLOAT] + [_INT] * 3,
    "moestro_swiglu_backward": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_join_heads": [_POINTER] * 5 + [_SIZE] * 8 + [_INT] * 2,
    "moestro_split_heads": [_POINTER] * 5 + [_SIZE] * 4 + [_INT] * 3,
    "moestro_set_isa": [ctypes.c_char_p],
    "moestro_rope": [_POINTER] * 4 + [_SIZE] * 7 + [_INT] * 3,
    "moestro_route": [_POINTER] * 4 + [_SIZE] * 5 + [_FLOAT] + [_INT] * 6,
    "moestro_add": [_POINTER] * 3 + [_SIZE] * 2 + [_INT] * 2,
    "moestro_run": [_POINTER, _SIZE, _POINTER],
}


@cache
def load_library() -> ctypes.CDLL | None:
    """The library on its best path, or the one `MOESTRO_ISA` names; None where it is missing or cannot run.

    Loaded after torch, so that both use the one OpenMP runtime. ConfigError for a name that this CPU cannot run.
    """
    wish = os.environ.get("MOESTRO_ISA", "")
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        library = None
    if library is None:
        if wish:
            raise ConfigError(f"MOESTRO_ISA={wish}, but the native kernels are not built (moestro doctor)")
        return None
    library.moestro_isa.restype = ctypes.c_char_p
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    if wish and library.moestro_set_isa(wish.encode()):
        raise ConfigError(f"MOESTRO_ISA={wish} is not one of {', '.join(ISAS)} that was built and this CPU can run")
    return library if library.moestro_isa() else None


def current_isa() -> str:
    """Name of the instruction set in use; empty where plain torch computes."""
    library = load_library()
    return library.moestro_isa().decode() if library else ""


def fits(*tensors: Tensor) -> bool:
    """Whether the kernels can take these: one type, fp32 or bf16, in CPU memory."""
    kind = tensors[0].dtype
    return kind in TYPES and all(t.dtype == kind and t.device.type == "cpu" for t in tensors)


def serves(*tensors: Tensor) -> bool:
    """Whether operations of serving, on these, are left to the kernels."""
    return not PLAIN and load_library() is not None and all(map(fits, tensors))


@cache
def multiplies_faster(dtype: torch.dtype) -> bool:
    """Whether dense products of a type are left to the kernels rather than to torch.

    Without bf16 instructions torch multiplies bf16 a hundred times slower than fp32; its BLAS for fp32 is at its best
    on Intel's CPUs only. Where both are at their best, they are about equal (docs/kernels.md).
    """
    described = machine.describe_machine()
    return not described.bf16_is_fast if dtype == torch.bfloat16 else "Intel" not in described.cpu


def call(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with the addresses of contiguous tensors (None: absent), and numbers; raises on its error code."""
    library = load_library()
    assert library is not None
    raw = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
    code = getattr(library, name)(*raw)
    if code:
        raise RuntimeError(f"{name}: {ERRORS.get(code, code)}")


def measure_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Operations per second of products that touch no memory, the best of `seconds`: the machine's limit."""
    operations, best, rounds = torch.zeros(1, dtype=torch.int64), 0.0, 20000
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        call("moestro_multiply_in_registers", operations, rounds, TYPES[dtype], torch.get_num_threads())
        best = max(best, int(operations) / (time.perf_counter() - start))
    return best


def matmul(a: Tensor, b: Tensor, *, a_transposed: bool = False, b_transposed: bool = False) -> Tensor:
    """a [M, K] or, transposed, [K, M]; b [K, N] or [N, K]; rows contiguous -> [M, N] in their type, sums in fp32."""
    m, k = a.shape[::-1] if a_transposed else a.shape
    k_b, n = b.shape[::-1] if b_transposed else b.shape
    if k != k_b or a.stride(1) != 1 or b.stride(1) != 1:
        raise ValueError(f"cannot multiply [{m}, {k}] by [{k_b}, {n}], strides {a.stride()} and {b.stride()}")
    out = a.new_empty(m, n)
    kind = TYPES[a.dtype]
    strides = (n, max(a.stride(0), a.shape[1]), max(b.stride(0), b.shape[1]))
    flags = (int(a_transposed), int(b_transposed), kind, kind, torch.get_num_threads())
    call("moestro_matmul", out, a, b, m, n, k, *strides, *flags)
    return out


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `reference.linear`."""
    worth_packing = x.numel() >= MIN_ROWS * x.shape[-1]
    if not worth_packing or not fits(x, weight) or load_library() is None or not multiplies_faster(x.dtype):
        return fused.linear(x, weight)
    return run_linear(x, weight)


def run_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The kernels themselves; see `reference.linear`."""
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]), weight.contiguous()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.shape = x.shape
        return matmul(rows, weight, b_transposed=True).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        d_out = grads[0].reshape(-1, len(weight))
        d_out = d_out if d_out.stride(1) == 1 else d_out.contiguous()
        wanted_x, wanted_weight = ctx.needs_input_grad
        return (
            matmul(d_out, weight).view(ctx.shape) if wanted_x else None,
            matmul(d_out, rows, a_transposed=True) if wanted_weight else None,
        )


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_cross_entropy`."""
    if not fits(hidden, weight) or load_library() is None or not multiplies_faster(hidden.dtype):
        return fused.linear_cross_entropy(hidden, weight, targets)
    return run_linear_cross_entropy(hidden, weight, targets)


def run_linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels themselves; see `reference.linear_cross_entropy`."""
    total, nll, argmax = _LinearCrossEntropy.apply(hidden, weight, targets)
    return total, nll, argmax


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
        nll = torch.empty(len(hidden), dtype=torch.float32)
        argmax = torch.empty_like(targets)
        d_hidden, d_weight = None, None
        if any(ctx.needs_input_grad):
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros(weight.shape, dtype=torch.float32)
        sizes = (len(hidden), *weight.shape, TYPES[hidden.dtype], torch.get_num_threads())
        call("moestro_cross_entropy", nll, argmax, d_hidden, d_weight, hidden, weight, targets, *sizes)
        ctx.mark_non_differentiable(nll, argmax)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return nll.sum(), nll, argmax

    backward = fused._LinearCrossEntropy.backward


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """See `reference.grouped_experts`."""
    worth_packing = ids.numel() >= MIN_LOAD * len(down)
    if not worth_packing or load_library() is None or not fits(x, gate_up, down):
        return fused.grouped_experts(x, gate_up, down, ids, weights)
    return run_experts(x, gate_up, down, ids, weights)


def run_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The kernels themselves, for any number of tokens; see `reference.grouped_experts`."""
    out: Tensor = _GroupedExperts.apply(x, gate_up, down, ids, weights)
    return out


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        (n, hidden), top_k, (num_experts, _, width) = x.shape, ids.shape[1], down.shape
        x, gate_up, down = x.contiguous(), gate_up.contiguous(), down.contiguous()
        order, inverse, bounds = fused.sort_by_expert(ids, num_experts)
        token, by_slot = order // top_k, weights.flatten()[order].float()
        offsets, slots = torch.tensor(bounds), bounds[-1]
        h, y = x.new_empty(slots, 2 * width), x.new_empty(slots, hidden)
        sizes = (num_experts, n, hidden, width, TYPES[x.dtype], torch.get_num_threads())
        call("moestro_experts_forward", y, h, x, gate_up, down, token, by_slot, offsets, *sizes)
        ctx.save_for_backward(x, gate_up, down, h, token, by_slot, offsets, inverse)
        ctx.sizes, ctx.shape, ctx.weights_dtype = sizes, ids.shape, weights.dtype
        return _combine(y, inverse, ids.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, h, token, by_slot, offsets, inverse = ctx.saved_tensors
        d_out = grads[0].contiguous()
        dx, d_weights = x.new_empty(len(h), x.shape[1]), by_slot.new_zeros(len(by_slot))
        d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        gradients = (dx, d_weights, d_gate_up, d_down)
        call("moestro_experts_backward", *gradients, d_out, x, h, gate_up, down, token, by_slot, offsets, *ctx.sizes)
        by_choice = d_weights[inverse].view(ctx.shape).to(ctx.weights_dtype)
        return _combine(dx, inverse, ctx.shape), d_gate_up, d_down, None, by_choice


def _combine(slots: Tensor, inverse: Tensor, shape: torch.Size) -> Tensor:
    """Sum the slots of every token: slots [S, D], inverse [N·A] the slot of each choice -> [N, D]."""
    (num_tokens, top_k), (num_slots, hidden) = shape, slots.shape
    out = slots.new_empty(num_tokens, hidden)
    sizes = (num_tokens, top_k, num_slots, hidden, TYPES[slots.dtype], torch.get_num_threads())
    call("moestro_combine", out, slots, inverse, *sizes)
    return out
