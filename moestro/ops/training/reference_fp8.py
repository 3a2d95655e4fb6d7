"""The specification of products in FP8, forward and backward, in plain torch (docs/fp8-training.md has the sources).

Written to be read and trusted, not to be fast; `fp8.py` must agree with this file. Codes are quantised as
`moestro.ops.fp8` says and held as values, not bytes. All three products of a layer multiply codes:

    out = Q(x) Q(W)ᵀ        along inputs: x in tiles of 1 x 128, W in blocks of 128 x 128
    dx  = Q(dy) Q(W)        along outputs: dy in tiles of 1 x 128, the same codes of W
    dW  = Q'(dy)ᵀ Q'(x)     along tokens: both in tiles of 128 x 1, dW in fp32

dy is at hand, so both of its forms come from the unrounded tensor. x is kept as the codes of the forward pass; Q'(x)
quantises those again (`requantize`), or the unrounded x (`both`). Activations between operations are bf16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops.fp8 import LEAST_NORMAL, SQUARE, TILE, Block, quantize_fp8, round_scales, spread_scales
from moestro.ops.precision import Format, Fp8Recipe

COLUMN: Block = (128, 1)
LENGTH = 128  # of a sum before it is scaled
LARGEST: dict[Format, float] = {"e4m3": 448.0, "e5m6": 65024.0}


def quantize(x: Tensor, block: Block, recipe: Fp8Recipe, format: Format = "e4m3") -> tuple[Tensor, Tensor]:
    """x [N, K] -> values of its codes [N, K] bf16, exact, and scales [⌈N/b₀⌉, ⌈K/b₁⌉] fp32.

    Scales of E5M6 are powers of two, so code · scale is a bf16 value.
    """
    whole = recipe.tile == "tensor"
    size = (max(len(x), 1), max(x.shape[1], 1)) if whole else block
    if format == "e4m3":
        codes, scales = quantize_fp8(x, size, recipe.scale)
        values = codes.to(torch.bfloat16)
    else:
        values, scales = quantize_e5m6(x, size)
    grid = (-(-x.shape[0] // block[0]), -(-x.shape[1] // block[1]))
    return values, scales.expand(grid).contiguous() if whole and x.numel() else scales.reshape(grid)


def quantize_e5m6(x: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """`quantize` to 5 exponent and 6 fraction bits: IEEE-like, bias 15, the top exponent reserved, largest 65024.

    The scale is the least power of two that brings a block's largest magnitude to 65024 or below.
    """
    largest = torch.stack(
        [torch.stack([t.abs().amax().float() for t in rows.split(block[1], 1)]) for rows in x.split(block[0])]
    )
    scales = largest / LARGEST["e5m6"]
    scales = round_scales(torch.where(scales < LEAST_NORMAL, 1.0, scales))
    ratio = x.float() / spread_scales(scales, x.shape, block)
    exponent = torch.frexp(ratio).exponent.clamp(min=-13) - 1  # of the leading bit; −14 below the normal values
    unit = torch.ldexp(torch.ones_like(ratio), exponent - 6)
    return ((ratio / unit).round() * unit).to(torch.bfloat16), scales


def product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Σ_k a[m, k] b[n, k], scaled: codes [M, K] and [N, K], scales [M, ⌈K/128⌉] and [N, ⌈K/128⌉] -> [M, N] fp32.

    Products of codes are exact. They are summed over 128 values of k, multiplied by a's scale times b's, and added to
    the sum of the blocks before, all in fp32. With `promote` above 128 all blocks share one scale.
    """
    out = a.new_zeros(len(a), len(b), dtype=torch.float32)
    length = max(LENGTH, recipe.promote) if recipe.accumulate == "hopper" else LENGTH
    for first in range(0, a.shape[1], length):
        left, right = (codes[:, first : first + length].float() for codes in (a, b))
        scales = a_scales[:, first // LENGTH, None] * b_scales[:, first // LENGTH]
        if recipe.accumulate == "hopper":
            for stretch in hopper_products(left, right, recipe.promote):
                out += stretch * scales
        else:
            out += left @ right.T * scales
    return out


def hopper_products(a: Tensor, b: Tensor, promote: int) -> Tensor:
    """What Hopper's accumulator holds after every `promote` values of K, the last of them filled up with zeros."""
    from moestro.ops.hopper import block_products

    pad = (0, -a.shape[1] % promote)
    return block_products(F.pad(a, pad), F.pad(b, pad), promote)


def linear(x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """x [N, K] bf16, weight [M, K] -> x Wᵀ [N, M] bf16, rounded once."""
    return multiply(*quantize(x, TILE, recipe, recipe.inputs), weight, recipe)


def multiply(codes: Tensor, scales: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Quantised rows [N, K] times the transpose of weight [M, K] -> [N, M] bf16."""
    w_codes, w_scales = quantize(weight, SQUARE, recipe)
    rows = w_scales.repeat_interleave(LENGTH, 0)[: len(weight)]  # [M, ⌈K/128⌉]
    return product(codes, scales, w_codes, rows, recipe).to(torch.bfloat16)


def linear_gradients(d_out: Tensor, x: Tensor, weight: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor]:
    """d_out [N, M] -> gradients of x [N, K] bf16 and of weight [M, K] fp32."""
    dx = multiply_back(*quantize_gradient(d_out, recipe), weight, recipe)
    return dx, weight_gradient(d_out, kept_inputs(x, recipe), recipe, recipe.inputs)


def quantize_gradient(d_out: Tensor, recipe: Fp8Recipe) -> tuple[Tensor, Tensor]:
    """d_out [N, M] -> codes [N, M] and scales [N, ⌈M/128⌉] for the gradient of inputs."""
    if recipe.dgrad_tile == "row":
        return quantize(d_out, TILE, recipe)
    codes, scales = quantize(d_out, SQUARE, recipe)
    return codes, scales.repeat_interleave(LENGTH, 0)[: len(codes)]


def multiply_back(codes: Tensor, scales: Tensor, weight: Tensor, recipe: Fp8Recipe) -> Tensor:
    """Quantised gradients [N, M] times weight [M, K] -> [N, K] bf16."""
    w_codes, w_scales = quantize(weight, SQUARE, recipe)
    columns = w_scales.T.repeat_interleave(LENGTH, 0)[: weight.shape[1]]  # [K, ⌈M/128⌉]
    return product(codes, scales, w_codes.T, columns, recipe).to(torch.bfloat16)


def kept_inputs(x: Tensor, recipe: Fp8Recipe) -> Tensor:
    """x [N, K] as the backward pass reads it: from the codes of the forward pass in fp32, or unrounded."""
    return x if recipe.transpose == "both" else read_back(*quantize(x, TILE, recipe, recipe.inputs))


def weight_gradient(d_out: Tensor, x: Tensor, recipe: Fp8Recipe, format: Format = "e4m3") -> Tensor:
    """d_out [N, M] and inputs [N, K], quantised along tokens -> [M, K] fp32."""
    if recipe.dgrad_tile == "row":
        left, left_scales = quantize(d_out, COLUMN, recipe)
    else:
        left, left_scales = quantize(d_out, SQUARE, recipe)
        left_scales = left_scales.repeat_interleave(LENGTH, 1)[:, : d_out.shape[1]]
    right, right_scales = quantize(x, COLUMN, recipe, format)
    return product(left.T, left_scales.T, right.T, right_scales.T, recipe)


def read_back(codes: Tensor, scales: Tensor) -> Tensor:
    """Values of codes [N, K] in tiles of 1 x 128, fp32."""
    return codes.float() * spread_scales(scales, codes.shape, TILE)


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, recipe: Fp8Recipe) -> Tensor:
    """`reference.grouped_experts`, with every product in FP8; tiles along tokens begin with an expert's first row.

    Tokens are quantised before they go to their experts. The weight of a choice multiplies the activation, in fp32,
    before that is rounded to bf16.
    """
    codes, scales = quantize(x, TILE, recipe)
    y = x.new_zeros(*ids.shape, x.shape[1])
    for expert in range(len(gate_up)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        h = multiply(codes[token], scales[token], gate_up[expert], recipe)
        y[token, slot] = linear(swiglu(h, weights[token, slot]).to(x.dtype), down[expert], recipe)
    return y.float().sum(1).to(x.dtype)


def experts_gradients(
    d_out: Tensor, x: Tensor, matrices: tuple[Tensor, Tensor], ids: Tensor, weights: Tensor, recipe: Fp8Recipe
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the choices' weights and of both stacks of matrices (gate_up, down).

    h, which SwiGLU reads, is kept in FP8; its output is computed again from those codes, and quantised once.
    """
    gate_up, down = matrices
    (codes, scales), kept = quantize(x, TILE, recipe), kept_inputs(x, recipe)
    sent_codes, sent_scales = quantize(d_out, TILE, recipe)  # rows of gradients, as they come to the experts
    dx, d_weights = x.new_zeros(*ids.shape, x.shape[1]), torch.zeros_like(weights)
    d_gate_up, d_down = (torch.zeros_like(matrix, dtype=torch.float32) for matrix in matrices)
    for expert in range(len(gate_up)):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        dy = d_out[token]
        h = multiply(codes[token], scales[token], gate_up[expert], recipe)
        h = read_back(*quantize(h, TILE, recipe))
        sent = (sent_codes[token], sent_scales[token]) if recipe.dgrad_tile == "row" else quantize_gradient(dy, recipe)
        d_act = multiply_back(*sent, down[expert], recipe)
        act, dh, d_weights[token, slot] = swiglu_gradients(d_act, h, weights[token, slot])
        act, dh = act.to(x.dtype), dh.to(x.dtype)
        d_down[expert] = weight_gradient(dy, act, recipe)
        d_gate_up[expert] = weight_gradient(dh, kept[token], recipe)
        dx[token, slot] = multiply_back(*quantize_gradient(dh, recipe), gate_up[expert], recipe)
    return dx.float().sum(1).to(x.dtype), d_weights, d_gate_up, d_down


def swiglu(h: Tensor, weights: Tensor) -> Tensor:
    """silu(gate) · up · weight in fp32: h [S, 2F], weights [S] -> [S, F]."""
    gate, up = h.float().chunk(2, dim=-1)
    return F.silu(gate) * up * weights[:, None]


def swiglu_gradients(d_act: Tensor, h: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d_act [S, F], h [S, 2F] fp32 -> the activation again [S, F], gradients of h [S, 2F] and weights [S]; all fp32."""
    gate, up = h.chunk(2, dim=-1)
    silu, slope = F.silu(gate), gate.sigmoid()
    d = d_act.float()
    weighted = d * weights[:, None]
    d_gate = weighted * up * (slope + silu * (1 - slope))
    return silu * up * weights[:, None], torch.cat([d_gate, weighted * silu], -1), (d * silu * up).sum(-1)
