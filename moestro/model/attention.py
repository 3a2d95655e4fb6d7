"""Multi-head latent attention (V3 eq. 1–11), and MHA/GQA/MQA behind the same call as baselines.

MLA caches one latent of `kv_lora_rank` values and one rotated key of `rope_dim` values per token, shared by all
heads. Two algebraically equal ways to attend:

    naive      expand the latents to keys and values per head, then attend: (K + V)·H flops per pair of tokens,
               and 2·C·(nope + V)·H once per key
    absorbed   move W_UK to the query and W_UV to the output and attend over the latents themselves:
               (2C + R)·H per pair, nothing per key

A fresh sequence is cheaper naive, a few queries over a long cache are cheaper absorbed; `forward` counts the flops
of both and takes the smaller, so a decode step of one or of 1 + k tokens needs no special case.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.config import ModelConfig
from moestro.model.layers import Linear, RMSNorm
from moestro.model.rope import apply_rope, softmax_scale

RopeTables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class AttentionBatch:
    """Which of N tokens may attend to which: `positions` [N] in a sequence, sequence s is rows starts[s]:starts[s+1].

    With a cache there is one sequence, and every token also sees what the cache holds.
    """

    positions: Tensor
    starts: tuple[int, ...]

    @staticmethod
    def causal(num_sequences: int, length: int, first_position: int = 0) -> AttentionBatch:
        """Sequences of equal length, one after another."""
        positions = torch.arange(first_position, first_position + length).repeat(num_sequences)
        return AttentionBatch(positions, tuple(range(0, num_sequences * length + 1, length)))

    @staticmethod
    def packed(segments: Tensor) -> AttentionBatch:
        """segments [B, T]: a new sequence starts with every row and wherever the number changes."""
        new = torch.ones_like(segments, dtype=torch.bool)
        new[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = new.flatten().nonzero()[:, 0]
        index = torch.arange(segments.numel())
        owner = torch.bucketize(index, first, right=True) - 1
        return AttentionBatch(index - first[owner], (*first.tolist(), segments.numel()))


class CacheLayer(Protocol):
    """What attention needs of a cache: append rows, get all rows back."""

    def extend(self, rows: Tensor) -> Tensor:
        """rows [T, W] -> [S, W], everything cached so far with `rows` last."""
        ...


def cache_width(config: ModelConfig) -> int:
    """Cached values per token and layer (V2 table 1)."""
    if config.attention == "mla":
        return config.kv_lora_rank + config.rope_dim
    return num_kv_heads(config) * (config.nope_dim + config.rope_dim + config.v_dim)


def num_kv_heads(config: ModelConfig) -> int:
    """Heads of keys and values of the baselines."""
    return {"mha": config.num_heads, "gqa": config.num_kv_heads, "mqa": 1}[config.attention]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The last T of S tokens attend causally: q [T, H, K], k [S, H|1, K], v [S, H|1, W] -> [T, H, W]."""
    scores = torch.matmul(q.transpose(0, 1), k.permute(1, 2, 0)).float() * scale  # [H, T, S]
    num_queries, num_keys = scores.shape[-2:]
    if num_queries > 1:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
        scores.masked_fill_(~visible.tril(num_keys - num_queries), float("-inf"))
    return torch.matmul(scores.softmax(-1).to(v.dtype), v.transpose(0, 1)).transpose(0, 1)


class LatentAttention(nn.Module):
    """MLA. x [N, D] -> [N, D]; with a cache, N tokens continue its one sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, query_dim = config.num_heads, config.nope_dim + config.rope_dim
        self.scale = softmax_scale(config)
        if config.q_lora_rank:
            self.q_down = Linear(config.hidden_dim, config.q_lora_rank)
            self.q_norm = RMSNorm(config.q_lora_rank, 1e-6)
            self.q_up = Linear(config.q_lora_rank, heads * query_dim)
        else:
            self.q = Linear(config.hidden_dim, heads * query_dim)
        self.kv_down = Linear(config.hidden_dim, config.kv_lora_rank + config.rope_dim)
        self.kv_norm = RMSNorm(config.kv_lora_rank, 1e-6)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.nope_dim + config.v_dim))
        self.out = Linear(heads * config.v_dim, config.hidden_dim)

    def forward(self, x: Tensor, rope: RopeTables, batch: AttentionBatch, cache: CacheLayer | None = None) -> Tensor:
        config = self.config
        q = self.q_up(self.q_norm(self.q_down(x))) if config.q_lora_rank else self.q(x)
        q_nope, q_rope = q.unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.rope_dim], dim=-1)
        q_rope = apply_rope(q_rope, rope)
        latent, k_rope = self.kv_down(x).split([config.kv_lora_rank, config.rope_dim], dim=-1)
        latent, k_rope = self.kv_norm(latent), apply_rope(k_rope, rope)
        if cache is None:
            k, v = self.expand(latent, k_rope)
            mixed = ops.packed_attention(torch.cat([q_nope, q_rope], dim=-1), k, v, batch.starts, self.scale)
        else:
            rows = cache.extend(torch.cat([latent, k_rope], dim=-1))  # [S, C + R]
            absorb = absorbed_is_cheaper(config, len(x), len(rows))
            mixed = (self.absorbed if absorb else self.naive)(q_nope, q_rope, rows)
        out: Tensor = self.out(mixed.flatten(1))
        return out

    def expand(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """latent [S, C], k_rope [S, R] -> keys [S, H, nope + R], values [S, H, V]."""
        config = self.config
        k_nope, v = (
            self.kv_up(latent).unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.v_dim], dim=-1)
        )
        return torch.cat([k_nope, k_rope[:, None].expand(-1, config.num_heads, -1)], dim=-1), v

    def naive(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor) -> Tensor:
        """Attend over expanded keys and values: rows [S, C + R] -> [T, H, V]."""
        config = self.config
        k, v = self.expand(*rows.split([config.kv_lora_rank, config.rope_dim], dim=-1))
        return attend(torch.cat([q_nope, q_rope], dim=-1), k, v, self.scale)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor) -> Tensor:
        """Attend over the latents: rows [S, C + R] -> [T, H, V]."""
        config = self.config
        up = self.kv_up.weight.to(rows.dtype).view(config.num_heads, -1, config.kv_lora_rank)
        up_k, up_v = up.split([config.nope_dim, config.v_dim], dim=1)
        q_latent = torch.einsum("thn,hnc->thc", q_nope, up_k)
        latent = rows[:, None, : config.kv_lora_rank]
        mixed = attend(torch.cat([q_latent, q_rope], dim=-1), rows[:, None], latent, self.scale)
        return torch.einsum("thc,hvc->thv", mixed, up_v)


def absorbed_is_cheaper(config: ModelConfig, num_queries: int, num_keys: int) -> bool:
    """Compare the flops of both forms per head, for T queries over S cached tokens."""
    latent, nope, rope, v = config.kv_lora_rank, config.nope_dim, config.rope_dim, config.v_dim
    pairs = num_queries * num_keys
    naive = pairs * (nope + rope + v) + num_keys * latent * (nope + v)
    absorbed = pairs * (2 * latent + rope) + num_queries * latent * (nope + v)
    return absorbed < naive


class HeadAttention(nn.Module):
    """MHA, GQA and MQA: heads are nope + rope wide, the last `rope_dim` values rotated. The same call as MLA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.num_kv_heads = num_kv_heads(config)
        self.key_dim = config.nope_dim + config.rope_dim
        self.scale = softmax_scale(config)
        self.q = Linear(config.hidden_dim, config.num_heads * self.key_dim)
        self.kv = Linear(config.hidden_dim, self.num_kv_heads * (self.key_dim + config.v_dim))
        self.out = Linear(config.num_heads * config.v_dim, config.hidden_dim)

    def forward(self, x: Tensor, rope: RopeTables, batch: AttentionBatch, cache: CacheLayer | None = None) -> Tensor:
        q = self.rotate(self.q(x).unflatten(-1, (self.config.num_heads, -1)), rope)
        k, v = self.kv(x).unflatten(-1, (self.num_kv_heads, -1)).split([self.key_dim, self.config.v_dim], dim=-1)
        rows = torch.cat([self.rotate(k, rope), v], dim=-1)
        if cache is not None:
            rows = cache.extend(rows.flatten(1)).unflatten(-1, (self.num_kv_heads, -1))
        rows = rows.repeat_interleave(self.config.num_heads // self.num_kv_heads, dim=1)
        k, v = rows.split([self.key_dim, self.config.v_dim], dim=-1)
        if cache is None:
            mixed = ops.packed_attention(q, k, v, batch.starts, self.scale)
        else:
            mixed = attend(q, k, v, self.scale)
        out: Tensor = self.out(mixed.flatten(1))
        return out

    def rotate(self, heads: Tensor, rope: RopeTables) -> Tensor:
        """Rotate the last `rope_dim` values of heads [N, H, nope + R]."""
        nope, rotated = heads.split([self.config.nope_dim, self.config.rope_dim], dim=-1)
        return torch.cat([nope, apply_rope(rotated, rope)], dim=-1)
