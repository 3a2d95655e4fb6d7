"""The model as it is served: weights packed for the kernels, attention over the pages of many sequences.

The same arithmetic as `model/transformer.py`, without gradients and with one promise more: a token's numbers depend on
that token and on what it attends to alone, bit for bit. Every product, norm, activation and attention below comes from
`ops/packed.py`, whose rows do not depend on each other, or is an elementwise operation that IEEE 754 rounds in one way.
So a request gets the same tokens and log-probabilities whatever shares its batch, however its prompt is cut into
chunks, wherever its prefix comes from, and however often it is preempted.

MLA attends in the absorbed form only: the cached latents serve as keys and values of all heads (V2 §2.1.2). The naive
form rounds otherwise, so a prefix cached by one request would change the bits of another; what the absorbed form costs
more in prefill is a few percent until thousands of tokens (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.engine.packing import Packer, Source
from moestro.engine.paged_cache import PagedCache, StepInput
from moestro.model.attention import HeadAttention, LatentAttention
from moestro.model.experts import MoE
from moestro.model.layers import RMSNorm
from moestro.model.rope import apply_rope
from moestro.model.transformer import Block, MTPModule
from moestro.ops.packed import PackedExperts, paged_attention, rms_norm, score, swiglu
from moestro.routing.router import Router

Attention = Callable[[Tensor, StepInput, Tensor], Tensor]
FeedForward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D] after the final norm; expert ids [N, A] of every MoE layer passed through, in order."""

    hidden: Tensor
    ids: list[Tensor]


class ServedNorm:
    """RMSNorm of rows."""

    def __init__(self, norm: RMSNorm, packer: Packer) -> None:
        self.weight, self.eps = packer.plain("weight"), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ServedLatentAttention:
    """MLA over pages of latents and rotated keys. x [N, D] -> [N, D]."""

    def __init__(self, attention: LatentAttention, packer: Packer) -> None:
        config = self.config = attention.config
        self.scale = attention.scale
        query = "q_down.weight" if config.q_lora_rank else "q.weight"
        self.down = packer.linear("down", query, "kv_down.weight")  # queries or their latents, latents, keys
        if config.q_lora_rank:
            self.q_norm = ServedNorm(attention.q_norm, packer.at("q_norm"))
            self.q_up = packer.linear("q_up", "q_up.weight")
        self.kv_norm = ServedNorm(attention.kv_norm, packer.at("kv_norm"))
        num_heads, nope_dim = config.num_heads, config.nope_dim
        self.absorb = packer.heads("absorb", "kv_up.weight", num_heads, lambda up: up[:, :nope_dim].transpose(1, 2))
        self.expand = packer.heads("expand", "kv_up.weight", num_heads, lambda up: up[:, nope_dim:])
        self.out = packer.linear("out", "out.weight")

    def __call__(self, x: Tensor, step: StepInput, pages: Tensor) -> Tensor:
        config = self.config
        latent_dim = config.kv_lora_rank
        down = self.down(x)
        q, latent, k_rope = down.split([down.shape[1] - latent_dim - config.rope_dim, latent_dim, config.rope_dim], -1)
        if config.q_lora_rank:
            q = self.q_up(self.q_norm(q.contiguous()))
        q_nope, q_rope = q.unflatten(-1, (config.num_heads, -1)).split([config.nope_dim, config.rope_dim], -1)
        rows = torch.cat([self.kv_norm(latent.contiguous()), apply_rope(k_rope, step.rope)], -1)
        pages.view(-1, rows.shape[1])[step.slots] = rows
        queries = torch.cat([self.absorb(q_nope.contiguous()), apply_rope(q_rope, step.rope)], -1)
        mixed = paged_attention(
            queries, pages, step.tables, step.starts, step.first,
            groups=1, value_offset=0, value_width=latent_dim, scale=self.scale,
        )  # fmt: skip
        return self.out(self.expand(mixed).flatten(1))


class ServedHeadAttention:
    """MHA, GQA and MQA over pages of keys and values. x [N, D] -> [N, D]."""

    def __init__(self, attention: HeadAttention, packer: Packer) -> None:
        self.attention = attention
        self.down = packer.linear("down", "q.weight", "kv.weight")
        self.out = packer.linear("out", "out.weight")

    def __call__(self, x: Tensor, step: StepInput, pages: Tensor) -> Tensor:
        attention, config = self.attention, self.attention.config
        q, kv = self.down(x).split([config.num_heads * attention.key_dim, pages.shape[-1]], -1)
        k, v = kv.unflatten(-1, (attention.num_kv_heads, -1)).split([attention.key_dim, config.v_dim], -1)
        rows = torch.cat([attention.rotate(k, step.rope), v], -1).flatten(1)
        pages.view(-1, rows.shape[1])[step.slots] = rows
        queries = attention.rotate(q.unflatten(-1, (config.num_heads, -1)), step.rope).contiguous()
        mixed = paged_attention(
            queries, pages, step.tables, step.starts, step.first,
            groups=attention.num_kv_heads, value_offset=attention.key_dim, value_width=config.v_dim,
            scale=attention.scale,
        )  # fmt: skip
        return self.out(mixed.flatten(1))


class ServedMLP:
    """SwiGLU. x [N, D], tokens [N] -> [N, D], no routes."""

    def __init__(self, packer: Packer) -> None:
        self.gate_up = packer.linear("gate_up", "gate_up.weight")
        self.down = packer.linear("down", "down.weight")

    def __call__(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, None]:
        return self.down(swiglu(self.gate_up(x))), None


class ServedMoE:
    """Router in fp32, packed experts, shared expert. x [N, D], tokens [N] -> [N, D], expert ids [N, A].

    Every choice is carried out, also of models whose experts had limited room (`router.capacity`): who finds room there
    depends on the batch. A token alone always does.
    """

    def __init__(self, moe: MoE, packer: Packer) -> None:
        self.router: Router = moe.router
        self.router.bias = packer.plain("router.bias")
        self.gate = None if moe.router.weight is None else packer.linear("gate", "router.weight", kind="fp32")
        self.experts = packer.experts("experts")
        self.shared = None if moe.shared is None else ServedMLP(packer.at("shared"))

    def __call__(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        router, rows = self.router, x.float()
        logits = router.logits(rows) if self.gate is None else self.gate(rows)
        routes = router.decide(logits, score(logits, router.config.router.score), tokens)
        out = self.experts(x, routes.ids, routes.weights)
        return (out if self.shared is None else out + self.shared(x, tokens)[0]), routes.ids


class ServedBlock:
    """Pre-norm residual block over one layer's pages."""

    def __init__(self, block: Block, packer: Packer) -> None:
        self.attention_norm = ServedNorm(block.attention_norm, packer.at("attention_norm"))
        self.ffn_norm = ServedNorm(block.ffn_norm, packer.at("ffn_norm"))
        attention, inner = block.attention, packer.at("attention")
        self.attention: Attention
        if isinstance(attention, LatentAttention):
            self.attention = ServedLatentAttention(attention, inner)
        else:
            self.attention = ServedHeadAttention(attention, inner)
        inner = packer.at("ffn")
        self.ffn: FeedForward = ServedMoE(block.ffn, inner) if isinstance(block.ffn, MoE) else ServedMLP(inner)

    def __call__(self, x: Tensor, step: StepInput, pages: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x + self.attention(self.attention_norm(x), step, pages)
        out, ids = self.ffn(self.ffn_norm(x), step.tokens)
        return x + out, ids


class ServedMTP:
    """One prediction depth: combines the hidden states of the depth before with the tokens ahead, runs its block."""

    def __init__(self, module: MTPModule, packer: Packer) -> None:
        self.embed_norm = ServedNorm(module.embed_norm, packer.at("embed_norm"))
        self.hidden_norm = ServedNorm(module.hidden_norm, packer.at("hidden_norm"))
        self.project = packer.linear("project", "project.weight")
        self.block = ServedBlock(module.block, packer.at("block"))
        self.norm = ServedNorm(module.norm, packer.at("norm"))

    def __call__(self, embedded: Tensor, hidden: Tensor, step: StepInput, pages: Tensor) -> Tensor:
        x = self.project(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], -1))
        return self.norm(self.block(x, step, pages)[0])


class Runtime:
    """A model with its matrices packed as `weights` (fp32, bf16, int8, int4; None: as they are computed with).

    `source` is a model, a model's files, or files of packed weights, which stay mapped. Embeddings, norms and routers
    stay as they are, and the head has 8 bits at least. `tensors` is all that is kept, by name: what to save.
    `routed_bytes` and `other_bytes` are what the main model's packed matrices take: all routed experts, and what every
    token reads.
    """

    def __init__(self, source: Source, weights: str | None = None) -> None:
        packer = Packer(source, weights)
        model, config = packer.model, packer.model.config
        self.config: ModelConfig = config
        self.dtype, self.kind = packer.dtype, packer.kind
        self.embedding = packer.plain("embed.weight")
        head = "embed.weight" if config.tie_embeddings else "head.weight"
        self.head = packer.linear("head", head, kind="int8" if self.kind == "int4" else None)
        self.norm = ServedNorm(model.norm, packer.at("norm"))
        layers, modules = cast(list[Block], model.layers), cast(list[MTPModule], model.mtp)
        self.blocks = [ServedBlock(block, packer.at(f"layers.{i}")) for i, block in enumerate(layers)]
        sizes = [(part.nbytes, isinstance(part, PackedExperts)) for part in packer.parts.values()]
        self.routed_bytes = sum(size for size, is_routed in sizes if is_routed)
        self.other_bytes = sum(size for size, is_routed in sizes if not is_routed)
        self.mtp = [ServedMTP(module, packer.at(f"mtp.{k}")) for k, module in enumerate(modules)]
        self.tensors = packer.finish()

    def forward(self, step: StepInput, cache: PagedCache) -> StepOutput:
        """Compute the tokens of a step; their rows are written to the cache."""
        x, chosen = self.embedding[step.tokens].to(self.dtype), []
        for block, pages in zip(self.blocks, cache.layers, strict=False):
            x, ids = block(x, step, pages)
            if ids is not None:
                chosen.append(ids)
        return StepOutput(self.norm(x), chosen)

    def forward_mtp(self, depth: int, hidden: Tensor, step: StepInput, cache: PagedCache) -> Tensor:
        """Module `depth` (from 0) on the hidden states [N, D] of the depth before -> its own [N, D].

        `step.tokens` are the tokens 1 + depth ahead of the positions; rows go to the module's own cache layer.
        """
        embedded = self.embedding[step.tokens].to(self.dtype)
        return self.mtp[depth](embedded, hidden, step, cache.layers[self.config.num_layers + depth])

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V] fp32."""
        return self.head(hidden).float()
