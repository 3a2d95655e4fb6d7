"""The operations of training: one public function each, which chooses the implementation.

    CPU tensors, and FakeTensors on the CPU    `operators.py`: the kernels if they can run and pay, else `fused.py`
    other devices                              `devices.py`, or `reference.py` if that reads nothing back to the host
    DTensors and other subclasses              `reference.py`: plain torch, which they carry out or refuse
    any plain tensor, with an `Fp8Recipe`      `fp8.py`, as `reference_fp8.py` specifies

`reference.py` is the specification, in plain and obvious torch. `MOESTRO_OPS=reference` uses it everywhere;
`MOESTRO_OPS=fused` turns the kernels off. `precision` is the precision of a product ("fp32", "bf16", an `Fp8Recipe`;
None: the type of its rows). The parameter is given as it is, and its cast form is kept until it changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moestro import machine
from moestro.ops import library
from moestro.ops.precision import Fp8Recipe, Precision, compute_dtype
from moestro.ops.training import devices, fp8, operators, reference
from moestro.ops.training.forms import forget as forget

Matrices = Tensor | Sequence[Tensor]


def linear(x: Tensor, weight: Tensor, precision: Precision | None = None) -> Tensor:
    """See `reference.linear`."""
    x = _in(precision, x)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if isinstance(precision, Fp8Recipe):
        out = fp8.linear(rows, weight, precision)
    elif not _takes(x, weight):
        return reference.linear(x, weight)
    else:
        out = operators.LinearFunction.apply(rows, weight, "")
    return out if x.dim() == 2 else out.view(*x.shape[:-1], len(weight))


def grouped_experts(
    x: Tensor, gate_up: Matrices, down: Matrices, ids: Tensor, weights: Tensor, precision: Precision | None = None
) -> Tensor:
    """See `reference.grouped_experts`; gate_up and down may also be lists, a matrix [2F, D] and [D, F] per expert."""
    x = _in(precision, x)
    matrices = [gate_up, down] if isinstance(gate_up, Tensor) and isinstance(down, Tensor) else [*gate_up, *down]
    if isinstance(precision, Fp8Recipe):
        return fp8.experts(x, ids, weights, matrices, precision)
    if _takes(x, *matrices):
        out: Tensor = operators.ExpertsFunction.apply(x, ids, weights, "", *matrices)[0]
        return out
    gate_up, down = (t if isinstance(t, Tensor) else torch.stack(list(t)) for t in (gate_up, down))
    if _is_elsewhere(x):
        return devices.grouped_experts(x, gate_up.to(x.dtype), down.to(x.dtype), ids, weights)
    return reference.grouped_experts(x, gate_up, down, ids, weights)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor, recipe: Fp8Recipe) -> Tensor:
    """W_down(silu(W_gate x) ⊙ W_up x) in FP8: x [N, D], gate_up [2F, D] (gate rows first), down [D, F] -> [N, D].

    One expert for every token: its rows are tokens in order.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    ids = torch.zeros(len(rows), 1, dtype=torch.int64, device=x.device)
    weights = torch.ones(ids.shape, device=x.device)
    return grouped_experts(rows, [gate_up], [down], ids, weights, recipe).view(x.shape)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """See `reference.packed_attention`."""
    if _takes(q, k, v):
        out: Tensor = operators.AttentionFunction.apply(q, k, v, starts, scale, "")[0]
        return out
    return (devices if _is_elsewhere(q) else reference).packed_attention(q, k, v, starts, scale)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor | None = None,
    precision: Precision | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.linear_cross_entropy`."""
    hidden = _in(precision, hidden)
    if not _takes(hidden, weight):
        return reference.linear_cross_entropy(hidden, weight, targets, row_weights)
    with_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    total, nll, argmax, *_ = operators.CrossEntropyFunction.apply(hidden, weight, targets, row_weights, with_grad, "")
    return total, nll, argmax


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    if not _has_kernel(x) or weight.dtype not in library.TYPES:
        return reference.rms_norm(x, weight, eps)
    out: Tensor = operators.RMSNormFunction.apply(x, weight, eps)
    return out


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if not _has_kernel(gate_up):
        return reference.swiglu(gate_up)
    out: Tensor = operators.SwiGLUFunction.apply(gate_up)
    return out


def join_heads(plain: Tensor, rotary: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """See `reference.join_heads`."""
    same = plain.dtype == rotary.dtype and {table.dtype for table in tables} == {torch.float32}
    if not same or not _has_kernel(plain, rotary):
        return reference.join_heads(plain, rotary, tables)
    out: Tensor = operators.JoinHeadsFunction.apply(plain, rotary, *tables)
    return out


def multiplies_bf16() -> bool:
    """Whether bf16 products take about as long as fp32 ones, thanks to instructions or to kernels that widen bf16."""
    widened = library.is_available() and library.multiplies_faster(torch.bfloat16)
    return machine.describe_machine().bf16_is_fast or widened


def _in(precision: Precision | None, x: Tensor) -> Tensor:
    return x if precision is None else x.to(compute_dtype(precision))


def _takes(*tensors: Tensor) -> bool:
    """Whether these go to an operator: plain tensors (or FakeTensors) on the CPU."""
    if library.WISH == "reference":
        return False
    return all(t.device.type == "cpu" and (type(t) in library.PLAIN_TYPES or type(t) is FakeTensor) for t in tensors)


def _has_kernel(*tensors: Tensor) -> bool:
    return library.is_available() and tensors[0].dtype in library.TYPES and _takes(*tensors)


def _is_elsewhere(x: Tensor) -> bool:
    """Whether x lies on another device and may not be read here."""
    return x.device.type != "cpu" and library.WISH != "reference"
