"""The model as it is served: weights packed for the kernels, attention over the pages of many sequences.

The same arithmetic as `model/transformer.py`, without gradients and with one more promise: a token's numbers depend
only on that token and on what it attends to, bit for bit. Every operation below comes from `ops/serving/program.py`,
where rows do not depend on each other. A forward pass is either recorded once and then run as one native call, or
executed directly. So a request gets the same tokens and log-probabilities whatever shares its batch, however its prompt
is cut into chunks, wherever its prefix comes from, and however often it is preempted.

MLA attends in the absorbed form only: the cached latents serve as keys and values of all heads (V2 §2.1.2). The naive
form rounds differently, so a prefix cached by one request would change the bits of another. In prefill the absorbed
form costs a few percent more, up to thousands of tokens (docs/serving.md).

Layers take their packed parts by name; `model/parts.py` lists them.
"""

from __future__ import annotations

from collections.abc import Sequence

from moestro.config import ModelConfig
from moestro.model.attention import LATENT_EPS, HeadAttention, LatentAttention, num_kv_heads
from moestro.model.parts import Parts
from moestro.model.rope import softmax_scale
from moestro.ops.serving.program import Heads, Operations, Value
from moestro.routing.selection import Selection, describe_selection
from moestro.scores import SCORES


class ServedNorm:
    """RMSNorm of rows [N, 1, D]."""

    def __init__(self, eps: float, parts: Parts) -> None:
        self.weight, self.eps = parts.plain("weight"), eps

    def __call__(self, rows: Operations[Value], x: Value) -> Value:
        return rows.norm(x, self.weight, self.eps)


class ServedLatentAttention:
    """MLA over pages of latents and rotated keys. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        self.config = config
        (self.cache,) = LatentAttention.caches(config)
        self.scale = softmax_scale(config)
        self.down = parts.linear("down")  # queries or their latents, latents, keys
        if config.q_lora_rank:
            self.q_norm = ServedNorm(LATENT_EPS, parts.at("q_norm"))
            self.q_up = parts.linear("q_up")
        self.kv_norm = ServedNorm(LATENT_EPS, parts.at("kv_norm"))
        self.absorb = parts.heads("absorb")
        self.expand = parts.heads("expand")
        self.out = parts.linear("out")

    def __call__(self, rows: Operations[Value], x: Value, layer: int) -> Value:
        config = self.config
        heads, latent_dim = config.num_heads, config.kv_lora_rank
        widths = (self.down.out_features - latent_dim - config.rope_dim, latent_dim, config.rope_dim)
        q, latent, k_rope = rows.split(rows.linear(self.down, x), widths)
        if config.q_lora_rank:
            q = rows.linear(self.q_up, self.q_norm(rows, q))
        latent, k_rope = self.kv_norm(rows, latent), rows.rope(k_rope)
        rows.store(layer, self.cache.name, rows.join([latent, k_rope]), latent_dim)
        q_nope, q_rope = rows.split(rows.group(q, heads), (config.nope_dim, config.rope_dim))
        queries = rows.join([rows.heads(self.absorb, q_nope), rows.rope(q_rope)])
        mixed = rows.attend(layer, self.cache.name, queries, Heads(1, 0, latent_dim, self.scale))
        return rows.linear(self.out, rows.heads(self.expand, mixed))


class ServedHeadAttention:
    """MHA, GQA and MQA over pages of keys and values. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, config: ModelConfig, parts: Parts) -> None:
        self.config = config
        (self.cache,) = HeadAttention.caches(config)
        self.scale = softmax_scale(config)
        self.num_kv_heads = num_kv_heads(config)
        self.key_dim = config.nope_dim + config.rope_dim
        self.down = parts.linear("down")
        self.out = parts.linear("out")

    def __call__(self, rows: Operations[Value], x: Value, layer: int) -> Value:
        config = self.config
        num_heads, groups, key_dim = config.num_heads, self.num_kv_heads, self.key_dim
        widths = (num_heads * key_dim, groups * (key_dim + config.v_dim))
        q, kv = rows.split(rows.linear(self.down, x), widths)
        parts = (config.nope_dim, config.rope_dim)
        k_nope, k_rope, v = rows.split(rows.group(kv, groups), (*parts, config.v_dim))
        rows.store(layer, self.cache.name, rows.join([k_nope, rows.rope(k_rope), v]))
        q_nope, q_rope = rows.split(rows.group(q, num_heads), parts)
        heads = Heads(groups, key_dim, config.v_dim, self.scale)
        mixed = rows.attend(layer, self.cache.name, rows.join([q_nope, rows.rope(q_rope)]), heads)
        return rows.linear(self.out, mixed)


class ServedMLP:
    """SwiGLU. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, parts: Parts) -> None:
        self.gate_up = parts.linear("gate_up")
        self.down = parts.linear("down")

    def __call__(self, rows: Operations[Value], x: Value) -> Value:
        return rows.linear(self.down, rows.swiglu(rows.linear(self.gate_up, x)))


class ServedMoE:
    """Router in fp32, packed experts, shared expert. x [N, 1, D] -> [N, 1, D]; `index` counts the routers of a pass.

    `layer` is the index of the block. Every choice is carried out, even if the model was trained with limited capacity
    (`router.capacity`): there, which choices find room depends on the batch. A token alone always finds room.
    """

    def __init__(self, config: ModelConfig, layer: int, parts: Parts) -> None:
        self.selection = describe_selection(config, layer, parts.plain("router.bias"))
        self.gate = parts.linear("gate") if SCORES[config.router.score].is_learned else None
        self.experts = parts.experts("experts")
        self.shared = ServedMLP(parts.at("shared")) if config.num_shared_experts else None

    def __call__(self, rows: Operations[Value], x: Value, index: int) -> Value:
        logits = None if self.gate is None else rows.linear(self.gate, rows.widen(x))
        out = rows.experts(index, self.experts, x, rows.route(index, logits, self.selection))
        return out if self.shared is None else rows.add(out, self.shared(rows, x))


class ServedBlock:
    """Pre-norm residual block over one layer's pages; `index` is its place among all blocks."""

    def __init__(self, config: ModelConfig, index: int, parts: Parts) -> None:
        self.attention_norm = ServedNorm(config.norm_eps, parts.at("attention_norm"))
        self.ffn_norm = ServedNorm(config.norm_eps, parts.at("ffn_norm"))
        attention = ServedLatentAttention if config.attention == "mla" else ServedHeadAttention
        self.attention = attention(config, parts.at("attention"))
        self.ffn: ServedMoE | ServedMLP
        inner = parts.at("ffn")
        self.ffn = ServedMoE(config, index, inner) if config.is_moe(index) else ServedMLP(inner)

    @property
    def selection(self) -> Selection | None:
        """How its router chooses, if it has one."""
        return self.ffn.selection if isinstance(self.ffn, ServedMoE) else None

    def __call__(self, rows: Operations[Value], x: Value, layer: int, index: int) -> Value:
        """x [N, 1, D]; `layer` is the cache layer, `index` the router's place among the routers."""
        with rows.scratch():
            x = rows.add(x, self.attention(rows, self.attention_norm(rows, x), layer))
        with rows.scratch():
            normed, ffn = self.ffn_norm(rows, x), self.ffn
            return rows.add(x, ffn(rows, normed, index) if isinstance(ffn, ServedMoE) else ffn(rows, normed))


class ServedMTP:
    """One prediction depth: combines the previous depth's hidden states with the tokens ahead, then runs its block."""

    def __init__(self, config: ModelConfig, depth: int, parts: Parts) -> None:
        self.embed_norm = ServedNorm(config.norm_eps, parts.at("embed_norm"))
        self.hidden_norm = ServedNorm(config.norm_eps, parts.at("hidden_norm"))
        self.project = parts.linear("project")
        self.block = ServedBlock(config, config.num_layers + depth, parts.at("block"))
        self.norm = ServedNorm(config.norm_eps, parts.at("norm"))

    def __call__(self, rows: Operations[Value], inputs: Sequence[Value], layer: int) -> Value:
        embedded, hidden = inputs
        both = rows.join([self.embed_norm(rows, embedded), self.hidden_norm(rows, hidden)])
        return self.norm(rows, self.block(rows, rows.linear(self.project, both), layer, 0))
