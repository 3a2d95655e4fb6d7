"""The operations of training as PyTorch operators: what `torch.compile`, FakeTensors, FSDP2 and export see.

Each is a pair of operators in the namespace `moestro`, forward and backward, with a CPU implementation and a rule for
shapes (fake kernel), and an `autograd.Function` that joins the two. The CPU implementation uses the kernels if they can
run and pay, else `fused.py`. `form` ("native" or "torch") forces one of them, for tests and benches. Products take the
parameter itself and the precision to compute in; its cast form is made once and kept (`forms.py`).

We use `autograd.Function` with `setup_context`, not `torch.library.register_autograd`: the latter costs 24 µs more per
call, forward and backward, and refuses `torch.func.grad`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops import library
from moestro.ops.training import forms, fused, native, native_attention, native_rows

LIBRARY = torch.library.Library("moestro", "FRAGMENT")


def define(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the decorated function the CPU implementation of an operator; `fake` gives its outputs' shapes."""

    def register(implementation: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        LIBRARY.define(schema)
        LIBRARY.impl(name, implementation, "CPU")
        torch.library.register_fake(f"moestro::{name}", fake, lib=LIBRARY)
        return implementation

    return register


def use_native(form: str, worth: bool, *tensors: Tensor) -> bool:
    """Whether the kernels compute this call."""
    if form == "native":
        return True
    return form != "torch" and worth and library.serves(*tensors)


# Linear layers: x [N, K] times the transpose of weight [M, K].


@define("linear(Tensor x, Tensor weight, str form) -> Tensor", lambda x, weight, form: x.new_empty(len(x), len(weight)))
def linear(x: Tensor, weight: Tensor, form: str) -> Tensor:
    weight = forms.cast(weight, x.dtype)
    return native.linear_forward(x, weight) if _multiplies(x, weight, form) else F.linear(x, weight)


@define(
    "linear_backward(Tensor d_out, Tensor x, Tensor weight, bool[] wanted, str form) -> (Tensor, Tensor)",
    lambda d_out, x, weight, wanted, form: (
        torch.empty_like(x, memory_format=torch.contiguous_format) if wanted[0] else x.new_empty(0),
        torch.empty_like(weight) if wanted[1] else x.new_empty(0),
    ),
)
def linear_backward(d_out: Tensor, x: Tensor, weight: Tensor, wanted: list[bool], form: str) -> tuple[Tensor, Tensor]:
    kept = forms.cast(weight, x.dtype)
    if _multiplies(x, kept, form):
        dx, d_weight = native.linear_backward(d_out, x, kept, wanted)
    else:
        dx = d_out @ kept if wanted[0] else x.new_empty(0)
        d_weight = d_out.T @ x if wanted[1] else x.new_empty(0)
    return dx, d_weight.to(weight.dtype) if wanted[1] else d_weight


def _multiplies(x: Tensor, weight: Tensor, form: str) -> bool:
    worth = len(x) >= native.MIN_ROWS and library.multiplies_faster(x.dtype)
    return use_native(form, worth, x, weight)


class LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, form: str) -> Tensor:
        return torch.ops.moestro.linear(x, weight, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.form = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:2]]
        found = torch.ops.moestro.linear_backward(grads[0], x, weight, wanted, ctx.form)
        return *(gradient if needed else None for gradient, needed in zip(found, wanted, strict=True)), None


# Routed experts: see `reference.grouped_experts`. `matrices` has gate and up first, then down, each as one stack or as
# one matrix per expert. Kept for the backward pass: h, order, inverse and bounds.


def _fake_experts(x: Tensor, matrices: list[Tensor], ids: Tensor, weights: Tensor, form: str) -> tuple[Tensor, ...]:
    gate_up = matrices[0]
    num_experts = gate_up.shape[0] if gate_up.dim() == 3 else len(matrices) // 2
    slots = ids.new_empty(ids.numel())
    h = x.new_empty(ids.numel(), gate_up.shape[-2])
    return torch.empty_like(x), h, slots, torch.empty_like(slots), ids.new_empty(num_experts + 1)


@define(
    "experts(Tensor x, Tensor[] matrices, Tensor ids, Tensor weights, str form)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_experts,
)
def experts(x: Tensor, matrices: list[Tensor], ids: Tensor, weights: Tensor, form: str) -> tuple[Tensor, ...]:
    by, gate_up, down = _experts_form(x, matrices, ids, form)
    return by.experts_forward(x, gate_up, down, ids, weights)


@define(
    "experts_backward(Tensor d_out, Tensor x, Tensor[] matrices, Tensor weights, Tensor[] saved, str form)"
    " -> (Tensor, Tensor, Tensor[])",
    lambda d_out, x, matrices, weights, saved, form: (
        torch.empty_like(x),
        torch.empty_like(weights),
        [torch.empty_like(t) for t in matrices],
    ),
)
def experts_backward(
    d_out: Tensor, x: Tensor, matrices: list[Tensor], weights: Tensor, saved: list[Tensor], form: str
) -> tuple[Tensor, Tensor, list[Tensor]]:
    by, gate_up, down = _experts_form(x, matrices, weights, form)
    dx, d_weights, gradients = by.experts_backward(d_out, x, gate_up, down, weights, saved)
    return dx, d_weights, [d.to(t.dtype) for d, t in zip(gradients, matrices, strict=True)]


def _experts_form(
    x: Tensor, matrices: list[Tensor], choices: Tensor, form: str
) -> tuple[Any, list[Tensor], list[Tensor]]:
    """The module that computes this call, and the matrices cast for it."""
    cast = [forms.cast(matrix, x.dtype) for matrix in matrices]
    half = len(cast) // 2
    worth = choices.numel() >= native.MIN_LOAD * len(fused.one_each(cast[:half]))
    return native if use_native(form, worth, x, *cast) else fused, cast[:half], cast[half:]


class ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, ids: Tensor, weights: Tensor, form: str, *matrices: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.moestro.experts(x, list(matrices), ids, weights, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, _, weights, ctx.form, *matrices = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weights, *output[1:], *matrices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *rest = ctx.saved_tensors
        saved, matrices = rest[:4], rest[4:]
        dx, d_weights, gradients = torch.ops.moestro.experts_backward(grads[0], x, matrices, weights, saved, ctx.form)
        return dx, None, d_weights, None, *gradients


# Attention inside documents: see `reference.packed_attention`. Kept for the backward pass: sums of rows.


@define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, float scale, str form) -> (Tensor, Tensor)",
    lambda q, k, v, starts, scale, form: (
        q.new_empty(q.shape[0], q.shape[1], v.shape[2]),
        q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32),
    ),
)
def attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
    by = native_attention if use_native(form, True, q, k, v) else fused
    return by.attention_forward(q, k, v, starts, scale)


@define(
    "attention_backward(Tensor d_out, Tensor[] heads, Tensor[] kept, Tensor starts, float scale, str form)"
    " -> (Tensor, Tensor, Tensor)",
    lambda d_out, heads, kept, starts, scale, form: tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in heads
    ),
)
def attention_backward(
    d_out: Tensor, heads: list[Tensor], kept: list[Tensor], starts: Tensor, scale: float, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = heads
    if use_native(form, True, q, k, v):
        return native_attention.attention_backward(d_out, (q, k, v), (kept[0], kept[1]), starts, scale)
    return fused.attention_backward(d_out, (q, k, v), starts, scale)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float, form: str) -> tuple[Tensor, Tensor]:
        return torch.ops.moestro.attention(q, k, v, starts, scale, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, starts, ctx.scale, ctx.form = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, starts, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts, *kept = ctx.saved_tensors
        found = torch.ops.moestro.attention_backward(grads[0], [q, k, v], kept, starts, ctx.scale, ctx.form)
        return *found, None, None, None


# Output head and cross-entropy in one: see `reference.linear_cross_entropy`. The forward pass computes the gradients.


def _fake_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, with_grad: bool, form: str
) -> tuple[Tensor, ...]:
    nll = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    d_hidden = torch.empty_like(hidden) if with_grad else hidden.new_empty(0, hidden.shape[1])
    d_weight = weight.new_empty(weight.shape if with_grad else (0, weight.shape[1]), dtype=torch.float32)
    return nll, torch.empty_like(targets), d_hidden, d_weight


@define(
    "cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor? row_weights, bool with_grad, str form)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_cross_entropy,
)
def cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, with_grad: bool, form: str
) -> tuple[Tensor, ...]:
    weight = forms.cast(weight, hidden.dtype)
    by = native if use_native(form, library.multiplies_faster(hidden.dtype), hidden, weight) else fused
    return by.cross_entropy(hidden, weight, targets, row_weights, with_grad)


class CrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor | None, with_grad: bool, form: str
    ) -> tuple[Tensor, ...]:
        found = torch.ops.moestro.cross_entropy(hidden, weight, targets, row_weights, with_grad, form)
        nll = found[0]
        return (nll if row_weights is None else nll * row_weights).sum(), *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        _, nll, _, d_hidden, d_weight = output
        ctx.save_for_backward(nll, d_hidden, d_weight)
        ctx.weight_dtype, ctx.has_row_weights = inputs[1].dtype, inputs[3] is not None

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        nll, d_hidden, d_weight = ctx.saved_tensors
        scale = grads[0]
        d_rows = nll * scale if ctx.has_row_weights else None
        return d_hidden * scale.to(d_hidden.dtype), (d_weight * scale).to(ctx.weight_dtype), None, d_rows, None, None


# Rows: norms, activations, rotated heads. These operators call only the kernels; plain torch needs no operator.


@define("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", lambda x, weight, eps: torch.empty_like(x))
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return native_rows.rms_norm_forward(x, weight, eps)


@define(
    "rms_norm_backward(Tensor d_out, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    lambda d_out, x, weight, eps: (torch.empty_like(x), torch.empty_like(weight)),
)
def rms_norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return native_rows.rms_norm_backward(d_out, x, weight, eps)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return torch.ops.moestro.rms_norm(x, weight, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.moestro.rms_norm_backward(grads[0], *ctx.saved_tensors, ctx.eps), None


@define(
    "swiglu(Tensor gate_up) -> Tensor",
    lambda gate_up: gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2),
)
def swiglu(gate_up: Tensor) -> Tensor:
    return native_rows.swiglu_forward(gate_up)


@define("swiglu_backward(Tensor d_out, Tensor gate_up) -> Tensor", lambda d_out, gate_up: torch.empty_like(gate_up))
def swiglu_backward(d_out: Tensor, gate_up: Tensor) -> Tensor:
    return native_rows.swiglu_backward(d_out, gate_up)


class SwiGLUFunction(torch.autograd.Function):
    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        return torch.ops.moestro.swiglu(gate_up)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.moestro.swiglu_backward(grads[0], *ctx.saved_tensors)


@define(
    "join_heads(Tensor plain, Tensor rotary, Tensor cos, Tensor sin) -> Tensor",
    lambda plain, rotary, cos, sin: plain.new_empty(*plain.shape[:2], plain.shape[2] + rotary.shape[-1]),
)
def join_heads(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return native_rows.join_heads_forward(plain, rotary, cos, sin)


def _fake_split(d_out: Tensor, cos: Tensor, sin: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    rows, heads, width = d_out.shape
    rotary = 2 * cos.shape[-1]
    return d_out.new_empty(rows, heads, width - rotary), d_out.new_empty(
        (rows, rotary) if shared else (rows, heads, rotary)
    )


@define("split_heads(Tensor d_out, Tensor cos, Tensor sin, bool shared) -> (Tensor, Tensor)", _fake_split)
def split_heads(d_out: Tensor, cos: Tensor, sin: Tensor, shared: bool) -> tuple[Tensor, Tensor]:
    return native_rows.join_heads_backward(d_out, cos, sin, shared)


class JoinHeadsFunction(torch.autograd.Function):
    @staticmethod
    def forward(plain: Tensor, rotary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.ops.moestro.join_heads(plain, rotary, cos, sin)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, rotary, cos, sin = inputs
        ctx.save_for_backward(cos, sin)
        ctx.shared = rotary.dim() == 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.moestro.split_heads(grads[0], *ctx.saved_tensors, ctx.shared), None, None
