"""The operations of training in plain torch for any device, without reading a number back to the host.

GPUs compute with these, and the meta device takes its shapes from them. Autograd differentiates every function, and
each means the same as its namesake in `reference.py`. `reference.py` itself reads its inputs (which tokens went where),
which makes a GPU wait. Not yet run on hardware.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.ops.precision import Fp8Recipe


def grouped_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sort tokens by expert, then two grouped products: torch's own in bf16, else every expert on every choice."""
    top_k, num_experts = ids.shape[1], gate_up.shape[0]
    expert, order = ids.flatten().sort(stable=True)
    bounds = torch.searchsorted(expert, torch.arange(num_experts, device=ids.device), right=True).to(torch.int32)
    carried = (expert < num_experts)[:, None]  # grouped products never write beyond the bounds
    xs = torch.where(carried, x.index_select(0, order // top_k), 0)
    multiply = F.grouped_mm if x.dtype == torch.bfloat16 else multiply_by_group
    gate, up = multiply(xs, gate_up.mT, offs=bounds).chunk(2, dim=-1)
    act = torch.where(carried, F.silu(gate) * up, 0)
    y = multiply(act, down.mT, offs=bounds) * weights.flatten()[order].unsqueeze(1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // top_k, torch.where(carried, y, 0))


def multiply_by_group(x: Tensor, matrices: Tensor, *, offs: Tensor) -> Tensor:
    """`F.grouped_mm` for types it does not take: rows offs[e − 1]:offs[e] of x [S, K] times matrices[e] [K, M]."""
    owner = torch.searchsorted(offs, torch.arange(len(x), device=x.device, dtype=offs.dtype), right=True)[:, None]
    out = x.new_zeros(len(x), matrices.shape[2])
    for e, matrix in enumerate(matrices):
        out = torch.where(owner == e, x @ matrix, out)
    return out


def packed_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Attention over all rows, with a mask for documents."""
    place = torch.arange(q.shape[0], device=q.device)
    owner = torch.bucketize(place, starts, right=True)
    visible = (owner[:, None] == owner) & (place[:, None] >= place)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def multiplies_fp8(a: Tensor, b: Tensor, recipe: Fp8Recipe) -> bool:
    """Whether `fp8_product` takes these codes [M, K] and [N, K]: on a Hopper GPU, E4M3, in whole blocks."""
    if a.device.type != "cuda" or torch.cuda.get_device_capability(a.device) != (9, 0):
        return False
    whole = a.shape[1] % 128 == 0 and len(b) % 16 == 0 and recipe.tile == "block"
    return whole and recipe.accumulate == "fp32" and recipe.inputs == "e4m3"


def fp8_product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> Tensor:
    """`reference_fp8.product` by torch's block-wise `scaled_mm`, weights in tiles of 1 x 128 that share a scale.

    Not yet run on hardware; on a Hopper GPU, `pytest tests/ops/training/test_fp8.py -k hopper_gpu` tests it.
    """
    rows = F.ScalingType.BlockWise1x128
    left, right = (codes.to(torch.float8_e4m3fn).contiguous() for codes in (a, b))
    outer = [scales.T.contiguous().T for scales in (a_scales, b_scales)]  # laid out column by column
    return F.scaled_mm(left, right.T, outer[0], rows, outer[1], rows, output_dtype=torch.float32)
