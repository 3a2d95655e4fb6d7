"""The model as it is served: weights packed for the kernels, attention over the pages of many sequences.

The same arithmetic as `model/transformer.py`, without gradients and with one promise more: a token's numbers depend on
that token and on what it attends to alone, bit for bit. Every operation below is one of `ops/serving/program.py`, whose
rows do not depend on each other; a forward pass is written down once and then run as one native call, or carried out at
once. So a request gets the same tokens and log-probabilities whatever shares its batch, however its prompt is cut into
chunks, wherever its prefix comes from, and however often it is preempted.

MLA attends in the absorbed form only: the cached latents serve as keys and values of all heads (V2 §2.1.2). The naive
form rounds otherwise, so a prefix cached by one request would change the bits of another; what the absorbed form costs
more in prefill is a few percent until thousands of tokens (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from moestro.model.attention import HeadAttention, LatentAttention
from moestro.model.experts import MoE
from moestro.model.layers import RMSNorm
from moestro.model.transformer import Block, MTPModule
from moestro.ops.serving.program import Heads, Operations, Value
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.routing.router import Router


class Parts(Protocol):
    """Gives the parts that a served layer is made of, by name; names are below the place `at` which it stands."""

    def at(self, name: str) -> Parts:
        """The parts below `name`."""

    def plain(self, name: str) -> Tensor:
        """A parameter that stays as it is."""

    def linear(self, name: str, *parameters: str, kind: str | None = None) -> PackedLinear:
        """One product for parameters [M, K] with the same input, their outputs one after the other."""

    def heads(self, name: str, parameter: str, count: int, choose: Callable[[Tensor], Tensor]) -> PackedHeads:
        """A matrix [V, K] per head."""

    def experts(self, name: str) -> PackedExperts:
        """The routed experts of a layer."""


class ServedNorm:
    """RMSNorm of rows [N, 1, D]."""

    def __init__(self, norm: RMSNorm, parts: Parts) -> None:
        self.weight, self.eps = parts.plain("weight"), norm.eps

    def __call__(self, rows: Operations[Value], x: Value) -> Value:
        return rows.norm(x, self.weight, self.eps)


class ServedLatentAttention:
    """MLA over pages of latents and rotated keys. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, attention: LatentAttention, parts: Parts) -> None:
        config = self.config = attention.config
        (self.cache,) = attention.caches(config)
        self.scale = attention.scale
        query = "q_down.weight" if config.q_lora_rank else "q.weight"
        self.down = parts.linear("down", query, "kv_down.weight")  # queries or their latents, latents, keys
        if config.q_lora_rank:
            self.q_norm = ServedNorm(attention.q_norm, parts.at("q_norm"))
            self.q_up = parts.linear("q_up", "q_up.weight")
        self.kv_norm = ServedNorm(attention.kv_norm, parts.at("kv_norm"))
        num_heads, nope_dim = config.num_heads, config.nope_dim
        self.absorb = parts.heads("absorb", "kv_up.weight", num_heads, lambda up: up[:, :nope_dim].transpose(1, 2))
        self.expand = parts.heads("expand", "kv_up.weight", num_heads, lambda up: up[:, nope_dim:])
        self.out = parts.linear("out", "out.weight")

    def __call__(self, rows: Operations[Value], x: Value, layer: int) -> Value:
        config = self.config
        heads, latent_dim = config.num_heads, config.kv_lora_rank
        widths = (self.down.out_features - latent_dim - config.rope_dim, latent_dim, config.rope_dim)
        q, latent, k_rope = rows.split(rows.linear(self.down, x), widths)
        if config.q_lora_rank:
            q = rows.linear(self.q_up, self.q_norm(rows, q))
        rows.store(layer, self.cache.name, rows.join([self.kv_norm(rows, latent), rows.rope(k_rope)]))
        q_nope, q_rope = rows.split(rows.group(q, heads), (config.nope_dim, config.rope_dim))
        queries = rows.join([rows.heads(self.absorb, q_nope), rows.rope(q_rope)])
        mixed = rows.attend(layer, self.cache.name, queries, Heads(1, 0, latent_dim, self.scale))
        return rows.linear(self.out, rows.heads(self.expand, mixed))


class ServedHeadAttention:
    """MHA, GQA and MQA over pages of keys and values. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, attention: HeadAttention, parts: Parts) -> None:
        self.attention = attention
        (self.cache,) = attention.caches(attention.config)
        self.down = parts.linear("down", "q.weight", "kv.weight")
        self.out = parts.linear("out", "out.weight")

    def __call__(self, rows: Operations[Value], x: Value, layer: int) -> Value:
        attention, config = self.attention, self.attention.config
        num_heads, groups, key_dim = config.num_heads, attention.num_kv_heads, attention.key_dim
        widths = (num_heads * key_dim, groups * (key_dim + config.v_dim))
        q, kv = rows.split(rows.linear(self.down, x), widths)
        parts = (config.nope_dim, config.rope_dim)
        k_nope, k_rope, v = rows.split(rows.group(kv, groups), (*parts, config.v_dim))
        rows.store(layer, self.cache.name, rows.join([k_nope, rows.rope(k_rope), v]))
        q_nope, q_rope = rows.split(rows.group(q, num_heads), parts)
        heads = Heads(groups, key_dim, config.v_dim, attention.scale)
        mixed = rows.attend(layer, self.cache.name, rows.join([q_nope, rows.rope(q_rope)]), heads)
        return rows.linear(self.out, mixed)


class ServedMLP:
    """SwiGLU. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, parts: Parts) -> None:
        self.gate_up = parts.linear("gate_up", "gate_up.weight")
        self.down = parts.linear("down", "down.weight")

    def __call__(self, rows: Operations[Value], x: Value) -> Value:
        return rows.linear(self.down, rows.swiglu(rows.linear(self.gate_up, x)))


class ServedMoE:
    """Router in fp32, packed experts, shared expert. x [N, 1, D] -> [N, 1, D]; `index` counts the routers of a pass.

    Every choice is carried out, also of models whose experts had limited room (`router.capacity`): who finds room there
    depends on the batch. A token alone always does.
    """

    def __init__(self, moe: MoE, parts: Parts) -> None:
        self.router: Router = moe.router
        self.router.bias = parts.plain("router.bias")
        self.gate = None if moe.router.weight is None else parts.linear("gate", "router.weight", kind="fp32")
        self.experts = parts.experts("experts")
        self.shared = None if moe.shared is None else ServedMLP(parts.at("shared"))

    def __call__(self, rows: Operations[Value], x: Value, index: int) -> Value:
        logits = None if self.gate is None else rows.linear(self.gate, rows.widen(x))
        out = rows.experts(index, self.experts, x, rows.route(index, logits, self.router.selection))
        return out if self.shared is None else rows.add(out, self.shared(rows, x))


class ServedBlock:
    """Pre-norm residual block over one layer's pages."""

    def __init__(self, block: Block, parts: Parts) -> None:
        self.attention_norm = ServedNorm(block.attention_norm, parts.at("attention_norm"))
        self.ffn_norm = ServedNorm(block.ffn_norm, parts.at("ffn_norm"))
        attention, inner = block.attention, parts.at("attention")
        self.attention: ServedLatentAttention | ServedHeadAttention
        if isinstance(attention, LatentAttention):
            self.attention = ServedLatentAttention(attention, inner)
        else:
            self.attention = ServedHeadAttention(attention, inner)
        inner = parts.at("ffn")
        self.ffn: ServedMoE | ServedMLP
        self.ffn = ServedMoE(block.ffn, inner) if isinstance(block.ffn, MoE) else ServedMLP(inner)

    @property
    def router(self) -> Router | None:
        """If it has one."""
        return self.ffn.router if isinstance(self.ffn, ServedMoE) else None

    def __call__(self, rows: Operations[Value], x: Value, layer: int, index: int) -> Value:
        """x [N, 1, D], the cache layer and the place among the routers."""
        with rows.scratch():
            x = rows.add(x, self.attention(rows, self.attention_norm(rows, x), layer))
        with rows.scratch():
            normed, ffn = self.ffn_norm(rows, x), self.ffn
            return rows.add(x, ffn(rows, normed, index) if isinstance(ffn, ServedMoE) else ffn(rows, normed))


class ServedMTP:
    """One prediction depth: combines the hidden states of the depth before with the tokens ahead, runs its block."""

    def __init__(self, module: MTPModule, parts: Parts) -> None:
        self.embed_norm = ServedNorm(module.embed_norm, parts.at("embed_norm"))
        self.hidden_norm = ServedNorm(module.hidden_norm, parts.at("hidden_norm"))
        self.project = parts.linear("project", "project.weight")
        self.block = ServedBlock(module.block, parts.at("block"))
        self.norm = ServedNorm(module.norm, parts.at("norm"))

    def __call__(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value:
        embedded, hidden = inputs
        both = rows.join([self.embed_norm(rows, embedded), self.hidden_norm(rows, hidden)])
        return self.norm(rows, self.block(rows, rows.linear(self.project, both), layer, 0))
