"""The model as it is served: weights packed for the kernels, attention over the pages of many sequences.

The same arithmetic as `model/transformer.py`, without gradients and with one promise more: a token's numbers depend on
that token and on what it attends to alone, bit for bit. Every operation below is one of `ops/serving.py`, whose rows do
not depend on each other; a forward pass is written down once and then run as one native call, or carried out at once.
So a request gets the same tokens and log-probabilities whatever shares its batch, however its prompt is cut into
chunks, wherever its prefix comes from, and however often it is preempted.

MLA attends in the absorbed form only: the cached latents serve as keys and values of all heads (V2 §2.1.2). The naive
form rounds otherwise, so a prefix cached by one request would change the bits of another; what the absorbed form costs
more in prefill is a few percent until thousands of tokens (docs/serving.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.engine.packed_directory import Save
from moestro.engine.packing import Packer, Source
from moestro.engine.paged_cache import PagedCache, StepInput
from moestro.model.attention import HeadAttention, LatentAttention
from moestro.model.experts import MoE
from moestro.model.layers import RMSNorm
from moestro.model.transformer import Block, MTPModule
from moestro.ops import native
from moestro.ops.packed import PackedExperts
from moestro.ops.serving import Eager, Heads, Place, Rows, Selection, Tape, X
from moestro.routing.router import Router


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D] after the final norm; expert ids [L, N, A] of every MoE layer passed through, in order."""

    hidden: Tensor
    ids: Tensor


class ServedNorm:
    """RMSNorm of rows [N, 1, D]."""

    def __init__(self, norm: RMSNorm, packer: Packer) -> None:
        self.weight, self.eps = packer.plain("weight"), norm.eps

    def __call__(self, rows: Rows[X], x: X) -> X:
        return rows.norm(x, self.weight, self.eps)


class ServedLatentAttention:
    """MLA over pages of latents and rotated keys. x [N, 1, D] -> [N, 1, D]."""

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

    def __call__(self, rows: Rows[X], x: X, layer: int) -> X:
        config = self.config
        heads, latent_dim = config.num_heads, config.kv_lora_rank
        widths = (self.down.out_features - latent_dim - config.rope_dim, latent_dim, config.rope_dim)
        q, latent, k_rope = rows.split(rows.linear(self.down, x), widths)
        if config.q_lora_rank:
            q = rows.linear(self.q_up, self.q_norm(rows, q))
        rows.store(layer, rows.join([self.kv_norm(rows, latent), rows.rope(k_rope)]))
        q_nope, q_rope = rows.split(rows.group(q, heads), (config.nope_dim, config.rope_dim))
        queries = rows.join([rows.heads(self.absorb, q_nope), rows.rope(q_rope)])
        mixed = rows.attend(layer, queries, Heads(1, 0, latent_dim, self.scale))
        return rows.linear(self.out, rows.heads(self.expand, mixed))


class ServedHeadAttention:
    """MHA, GQA and MQA over pages of keys and values. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, attention: HeadAttention, packer: Packer) -> None:
        self.attention = attention
        self.down = packer.linear("down", "q.weight", "kv.weight")
        self.out = packer.linear("out", "out.weight")

    def __call__(self, rows: Rows[X], x: X, layer: int) -> X:
        attention, config = self.attention, self.attention.config
        num_heads, groups, key_dim = config.num_heads, attention.num_kv_heads, attention.key_dim
        widths = (num_heads * key_dim, groups * (key_dim + config.v_dim))
        q, kv = rows.split(rows.linear(self.down, x), widths)
        parts = (config.nope_dim, config.rope_dim)
        k_nope, k_rope, v = rows.split(rows.group(kv, groups), (*parts, config.v_dim))
        rows.store(layer, rows.join([k_nope, rows.rope(k_rope), v]))
        q_nope, q_rope = rows.split(rows.group(q, num_heads), parts)
        heads = Heads(groups, key_dim, config.v_dim, attention.scale)
        mixed = rows.attend(layer, rows.join([q_nope, rows.rope(q_rope)]), heads)
        return rows.linear(self.out, mixed)


class ServedMLP:
    """SwiGLU. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, packer: Packer) -> None:
        self.gate_up = packer.linear("gate_up", "gate_up.weight")
        self.down = packer.linear("down", "down.weight")

    def __call__(self, rows: Rows[X], x: X) -> X:
        return rows.linear(self.down, rows.swiglu(rows.linear(self.gate_up, x)))


class ServedMoE:
    """Router in fp32, packed experts, shared expert. x [N, 1, D] -> [N, 1, D]; `index` counts the routers of a pass.

    Every choice is carried out, also of models whose experts had limited room (`router.capacity`): who finds room there
    depends on the batch. A token alone always does.
    """

    def __init__(self, moe: MoE, packer: Packer) -> None:
        self.router: Router = moe.router
        self.router.bias = packer.plain("router.bias")
        self.gate = None if moe.router.weight is None else packer.linear("gate", "router.weight", kind="fp32")
        self.experts = packer.experts("experts")
        self.shared = None if moe.shared is None else ServedMLP(packer.at("shared"))

    def __call__(self, rows: Rows[X], x: X, index: int) -> X:
        logits = None if self.gate is None else rows.linear(self.gate, rows.widen(x))
        out = rows.experts(index, self.experts, x, rows.route(index, logits, describe_selection(self.router)))
        return out if self.shared is None else rows.add(out, self.shared(rows, x))


def describe_selection(router: Router) -> Selection:
    """What `Router.decide` does, for a kernel."""
    config, scheme = router.config, router.config.router
    return Selection(
        bias=router.bias,
        score=scheme.score,
        top_k=config.top_k,
        num_groups=config.num_groups,
        top_k_groups=config.top_k_groups,
        group_best=2 if scheme.group_score == "top2" else 1,
        scale=scheme.scale,
        multiply=scheme.bias == "multiplicative",
        normalize=scheme.normalize,
        hashed=router.hashed,
    )


class ServedBlock:
    """Pre-norm residual block over one layer's pages."""

    def __init__(self, block: Block, packer: Packer) -> None:
        self.attention_norm = ServedNorm(block.attention_norm, packer.at("attention_norm"))
        self.ffn_norm = ServedNorm(block.ffn_norm, packer.at("ffn_norm"))
        attention, inner = block.attention, packer.at("attention")
        self.attention: ServedLatentAttention | ServedHeadAttention
        if isinstance(attention, LatentAttention):
            self.attention = ServedLatentAttention(attention, inner)
        else:
            self.attention = ServedHeadAttention(attention, inner)
        inner = packer.at("ffn")
        self.ffn: ServedMoE | ServedMLP
        self.ffn = ServedMoE(block.ffn, inner) if isinstance(block.ffn, MoE) else ServedMLP(inner)

    @property
    def router(self) -> Router | None:
        """If it has one."""
        return self.ffn.router if isinstance(self.ffn, ServedMoE) else None

    def __call__(self, rows: Rows[X], x: X, layer: int, index: int) -> X:
        """x [N, 1, D], the cache layer and the place among the routers."""
        with rows.scratch():
            x = rows.add(x, self.attention(rows, self.attention_norm(rows, x), layer))
        with rows.scratch():
            normed, ffn = self.ffn_norm(rows, x), self.ffn
            return rows.add(x, ffn(rows, normed, index) if isinstance(ffn, ServedMoE) else ffn(rows, normed))


class ServedMTP:
    """One prediction depth: combines the hidden states of the depth before with the tokens ahead, runs its block."""

    def __init__(self, module: MTPModule, packer: Packer) -> None:
        self.embed_norm = ServedNorm(module.embed_norm, packer.at("embed_norm"))
        self.hidden_norm = ServedNorm(module.hidden_norm, packer.at("hidden_norm"))
        self.project = packer.linear("project", "project.weight")
        self.block = ServedBlock(module.block, packer.at("block"))
        self.norm = ServedNorm(module.norm, packer.at("norm"))

    def __call__(self, rows: Rows[X], inputs: Sequence[X], layer: int) -> X:
        embedded, hidden = inputs
        both = rows.join([self.embed_norm(rows, embedded), self.hidden_norm(rows, hidden)])
        return self.norm(rows, self.block(rows, rows.linear(self.project, both), layer, 0))


class Forward(Protocol):
    """Inputs [N, 1, D], the first cache layer to use -> [N, 1, D]."""

    def __call__(self, rows: Rows[X], inputs: Sequence[X], layer: int) -> X: ...


class Pass:
    """A forward pass through some blocks: on a tape made once where the kernels are built, else operation by operation.

    Experts that the token id alone decides are looked up before it begins.
    """

    def __init__(
        self,
        forward: Forward,
        blocks: Sequence[ServedBlock],
        layer: int,
        dtype: torch.dtype,
        hidden_dim: int,
        *,
        num_inputs: int = 1,
    ) -> None:
        self.forward, self.layer, self.dtype = forward, layer, dtype
        self.routers = [block.router for block in blocks if block.router is not None]
        self.tape: Tape | None = None
        if native.serves():
            self.tape = Tape(dtype)
            self.inputs = [self.tape.value(hidden_dim) for _ in range(num_inputs)]
            self.output: Place = forward(self.tape, self.inputs, layer)

    def __call__(self, inputs: Sequence[Tensor], step: StepInput, cache: PagedCache) -> StepOutput:
        """Inputs [N, D] of any type."""
        ids = step.tokens.new_empty(len(self.routers), len(step.tokens), cache.routes.shape[-1])
        for router, chosen in zip(self.routers, ids, strict=True):
            if router.hashed:
                chosen.copy_(router.choose(chosen, step.tokens))
        if self.tape is not None:
            hidden = self.tape.run(list(zip(self.inputs, inputs, strict=True)), step, cache.layers, ids, self.output)
            return StepOutput(hidden, ids)
        eager = Eager(step, cache.layers, ids)
        return StepOutput(self.forward(eager, [x.to(self.dtype)[:, None] for x in inputs], self.layer).flatten(1), ids)


class Runtime:
    """A model with its matrices packed as `weights` (fp32, bf16, int8, int4; None: as they are computed with).

    `source` is a model, a model's files, or files of packed weights, which stay mapped. Embeddings, norms and routers
    stay as they are, and the head has 8 bits at least. `tensors` is all that is kept, by name: what to save. It goes to
    `save` part by part, where that is given; what remains is an outline that computes nothing.
    `routed_bytes` and `other_bytes` are what the main model's packed matrices take: all routed experts, and what every
    token reads.
    """

    def __init__(self, source: Source, weights: str | None = None, save: Save | None = None) -> None:
        packer = Packer(source, weights, save)
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
        shape = (self.dtype, config.hidden_dim)
        self._main = Pass(self._compute, self.blocks, 0, *shape)
        depths = enumerate(self.mtp, config.num_layers)
        self._ahead = [Pass(module, [module.block], layer, *shape, num_inputs=2) for layer, module in depths]

    def forward(self, step: StepInput, cache: PagedCache) -> StepOutput:
        """Compute the tokens of a step; their rows are written to the cache."""
        return self._main([self.embedding.index_select(0, step.tokens)], step, cache)

    def forward_mtp(self, depth: int, hidden: Tensor, step: StepInput, cache: PagedCache) -> Tensor:
        """Module `depth` (from 0) on the hidden states [N, D] of the depth before -> its own [N, D].

        `step.tokens` are the tokens 1 + depth ahead of the positions; rows go to the module's own cache layer.
        """
        embedded = self.embedding.index_select(0, step.tokens)
        return self._ahead[depth]([embedded, hidden], step, cache).hidden

    def _compute(self, rows: Rows[X], inputs: Sequence[X], layer: int) -> X:
        (x,), index = inputs, 0
        for block in self.blocks:
            x = block(rows, x, layer, index)
            layer, index = layer + 1, index + (block.router is not None)
        return self.norm(rows, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V] fp32."""
        return self.head(hidden).float()
