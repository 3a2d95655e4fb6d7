"""Multi-head latent attention (V3 eq. 1–11), and MHA/GQA/MQA behind the same call as baselines.

For each token, MLA has one latent of `kv_lora_rank` values and one rotated key of `rope_dim` values, shared by all
heads. A cache has to hold only these. Here they are expanded to keys and values per head, the cheapest way to compute
whole sequences. `model/served.py` attends over the latents themselves (the absorbed form), the cheapest way for a few
queries over a long cache. A test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moestro import ops
from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.model.layers import Linear, RMSNorm
from moestro.model.rope import softmax_scale
from moestro.ops.precision import Precision, after_attention
from moestro.ops.serving.fp8_rows import row_bytes

RopeTables = tuple[Tensor, Tensor]
CACHES = ("auto", "fp8")  # in the type of the activations; latents as FP8 codes
LATENT_EPS = 1e-6  # for the norms of latents, whatever `norm_eps` is


@dataclass(frozen=True)
class AttentionBatch:
    """Which of N tokens attend to which: `positions` [N] in the sequence; sequence s is starts[s]:starts[s+1].

    starts is [S + 1]. Both are int64, on the device of the tokens.
    """

    positions: Tensor
    starts: Tensor

    @staticmethod
    def causal(
        num_sequences: int, length: int, first_position: int = 0, device: torch.device | str | None = None
    ) -> AttentionBatch:
        """Sequences of equal length, one after another."""
        positions = torch.arange(first_position, first_position + length, device=device).repeat(num_sequences)
        return AttentionBatch(positions, torch.arange(num_sequences + 1, device=device) * length)

    @staticmethod
    def packed(segments: Tensor) -> AttentionBatch:
        """segments [B, T]: a new sequence starts with every row and wherever the number changes."""
        new = torch.ones_like(segments, dtype=torch.bool)
        new[:, 1:] = segments[:, 1:] != segments[:, :-1]
        first = new.flatten().nonzero()[:, 0]  # a size that depends on data: pack on the host, then move
        index = torch.arange(segments.numel(), device=segments.device)
        owner = torch.bucketize(index, first, right=True) - 1
        return AttentionBatch(index - first[owner], torch.cat([first, first.new_tensor([segments.numel()])]))

    def to(self, device: torch.device | str) -> AttentionBatch:
        """This batch on another device."""
        return AttentionBatch(self.positions.to(device), self.starts.to(device))


@dataclass(frozen=True)
class Context:
    """What every block of a pass reads besides its hidden states.

    `tokens` [N]; `rope`, tables (cos, sin) [N, R/2]; `batch`, which tokens attend to which; `noise_seed`, the seed of
    each router's own noise.
    """

    tokens: Tensor
    rope: RopeTables
    batch: AttentionBatch
    noise_seed: int = 0


@dataclass(frozen=True)
class CacheSpec:
    """One thing that a layer caches: `width` values per token, in the model's type or in `dtype`."""

    name: str
    width: int
    dtype: torch.dtype | None = None

    def count_bytes(self, dtype: torch.dtype) -> int:
        """Bytes per token, in a model that computes in `dtype`."""
        return self.width * (self.dtype or dtype).itemsize


def check_cache(config: ModelConfig, cache: str) -> None:
    """Raise ConfigError unless `cache` is one of `CACHES` that this model can have."""
    if cache not in CACHES:
        raise ConfigError(f"cache must be auto or fp8, not '{cache}'")
    if cache == "fp8" and config.attention != "mla":
        raise ConfigError(f"only latents are cached in fp8, and this model's attention is {config.attention}")


def list_caches(config: ModelConfig, cache: str = "auto") -> list[tuple[CacheSpec, ...]]:
    """What each layer caches, MTP modules last. ConfigError for a `cache` that the model cannot have."""
    check_cache(config, cache)
    specs = LatentAttention.caches(config, cache) if config.attention == "mla" else HeadAttention.caches(config)
    return [specs] * (config.num_layers + config.mtp_depth)


def cache_width(config: ModelConfig) -> int:
    """Cached values per token and layer (V2 table 1)."""
    return sum(spec.width for spec in list_caches(config)[0])


def num_kv_heads(config: ModelConfig) -> int:
    """Number of key and value heads in the baselines."""
    return {"mha": config.num_heads, "gqa": config.num_kv_heads, "mqa": 1}[config.attention]


class LatentAttention(nn.Module):
    """MLA. x [N, D] -> [N, D]."""

    @staticmethod
    def caches(config: ModelConfig, cache: str = "auto") -> tuple[CacheSpec, ...]:
        """The latent and the rotated key that all heads share; in an FP8 cache, their bytes."""
        coded, width = config.kv_lora_rank, config.kv_lora_rank + config.rope_dim
        if cache == "fp8":
            return (CacheSpec("latent", row_bytes(coded, width), torch.uint8),)
        return (CacheSpec("latent", width),)

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        heads, query_dim = config.num_heads, config.nope_dim + config.rope_dim
        self.scale = softmax_scale(config)
        if config.q_lora_rank:
            self.q_down = Linear(config.hidden_dim, config.q_lora_rank, precision)
            self.q_norm = RMSNorm(config.q_lora_rank, LATENT_EPS)
            self.q_up = Linear(config.q_lora_rank, heads * query_dim, precision)
        else:
            self.q = Linear(config.hidden_dim, heads * query_dim, precision)
        self.kv_down = Linear(config.hidden_dim, config.kv_lora_rank + config.rope_dim, precision)
        self.kv_norm = RMSNorm(config.kv_lora_rank, LATENT_EPS)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.nope_dim + config.v_dim), precision)
        self.out = Linear(heads * config.v_dim, config.hidden_dim, after_attention(precision))

    def forward(self, x: Tensor, rope: RopeTables, batch: AttentionBatch) -> Tensor:
        config = self.config
        q = self.q_up(self.q_norm(self.q_down(x))) if config.q_lora_rank else self.q(x)
        q_nope, q_rope = q.unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.rope_dim], dim=-1)
        latent, k_rope = self.kv_down(x).split([config.kv_lora_rank, config.rope_dim], dim=-1)
        k_nope, v = self.expand(self.kv_norm(latent))
        q, k = ops.join_heads(q_nope, q_rope, rope), ops.join_heads(k_nope, k_rope, rope)
        mixed = ops.packed_attention(q, k, v, batch.starts, self.scale)
        out: Tensor = self.out(mixed.flatten(1))
        return out

    def expand(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """latent [S, C] -> keys without their rotated part [S, H, nope], values [S, H, V]."""
        heads = self.kv_up(latent).unflatten(-1, (self.config.num_heads, -1))
        k_nope, v = heads.split([self.config.nope_dim, self.config.v_dim], dim=-1)
        return k_nope, v


class HeadAttention(nn.Module):
    """MHA, GQA and MQA: heads are nope + rope wide, the last `rope_dim` values rotated. The same call as MLA."""

    @staticmethod
    def caches(config: ModelConfig) -> tuple[CacheSpec, ...]:
        """Keys and values of every group of heads."""
        return (CacheSpec("kv", num_kv_heads(config) * (config.nope_dim + config.rope_dim + config.v_dim)),)

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        self.num_kv_heads = num_kv_heads(config)
        self.key_dim = config.nope_dim + config.rope_dim
        self.scale = softmax_scale(config)
        self.q = Linear(config.hidden_dim, config.num_heads * self.key_dim, precision)
        self.kv = Linear(config.hidden_dim, self.num_kv_heads * (self.key_dim + config.v_dim), precision)
        self.out = Linear(config.num_heads * config.v_dim, config.hidden_dim, after_attention(precision))

    def forward(self, x: Tensor, rope: RopeTables, batch: AttentionBatch) -> Tensor:
        q = self.rotate(self.q(x).unflatten(-1, (self.config.num_heads, -1)), rope)
        k, v = self.kv(x).unflatten(-1, (self.num_kv_heads, -1)).split([self.key_dim, self.config.v_dim], dim=-1)
        out: Tensor = self.out(ops.packed_attention(q, self.rotate(k, rope), v, batch.starts, self.scale).flatten(1))
        return out

    def rotate(self, heads: Tensor, rope: RopeTables) -> Tensor:
        """Rotate the last `rope_dim` values of heads [N, H, nope + R]."""
        nope, rotary = heads.split([self.config.nope_dim, self.config.rope_dim], dim=-1)
        return ops.join_heads(nope, rotary, rope)
