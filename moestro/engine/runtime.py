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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moestro.config import ModelConfig
from moestro.engine.paged_cache import PagedCache, StepInput
from moestro.errors import ConfigError
from moestro.model.attention import HeadAttention, LatentAttention
from moestro.model.experts import MoE
from moestro.model.layers import MLP, RMSNorm
from moestro.model.transformer import Block, MTPModule, Transformer
from moestro.ops.packed import PackedExperts, PackedHeads, PackedLinear
from moestro.ops.serving import Eager, Heads, Place, Rows, Selection, Tape, X, can_tape
from moestro.routing.router import Router

KINDS = ("fp32", "bf16", "int8", "int4")


@dataclass(frozen=True)
class StepOutput:
    """hidden [N, D] after the final norm; expert ids [L, N, A] of every MoE layer passed through, in order."""

    hidden: Tensor
    ids: Tensor


class Packer:
    """Packs matrices as `kind` and counts their bytes: those of routed experts, and those that every token reads."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, dtype
        self.routed_bytes = self.other_bytes = 0

    def linear(self, *weights: Tensor, kind: str | None = None) -> PackedLinear:
        """One product for matrices [M, K] with the same input, their outputs one after the other."""
        whole = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        packed = PackedLinear.pack(whole, kind or self.kind)
        self.other_bytes += packed.nbytes
        return packed

    def heads(self, weight: Tensor) -> PackedHeads:
        """A matrix per head [H, V, K], in the precision of the activations."""
        packed = PackedHeads.pack(weight.detach().to(self.dtype))
        self.other_bytes += packed.nbytes
        return packed

    def experts(self, gate_up: Tensor, down: Tensor) -> PackedExperts:
        """The routed experts of a layer."""
        packed = PackedExperts.pack(gate_up.detach(), down.detach(), self.kind)
        self.routed_bytes += packed.nbytes
        return packed


class ServedNorm:
    """RMSNorm of rows [N, 1, D]."""

    def __init__(self, norm: RMSNorm) -> None:
        self.weight, self.eps = norm.weight.detach(), norm.eps

    def __call__(self, rows: Rows[X], x: X) -> X:
        return rows.norm(x, self.weight, self.eps)


class ServedLatentAttention:
    """MLA over pages of latents and rotated keys. x [N, 1, D] -> [N, 1, D]."""

    def __init__(self, attention: LatentAttention, packer: Packer) -> None:
        config = self.config = attention.config
        self.scale = attention.scale
        query = attention.q_down if config.q_lora_rank else attention.q
        self.down = packer.linear(query.weight, attention.kv_down.weight)  # queries or their latents, latents, keys
        if config.q_lora_rank:
            self.q_norm = ServedNorm(attention.q_norm)
            self.q_up = packer.linear(attention.q_up.weight)
        self.kv_norm = ServedNorm(attention.kv_norm)
        up = attention.kv_up.weight.view(config.num_heads, -1, config.kv_lora_rank)
        up_k, up_v = up.split([config.nope_dim, config.v_dim], dim=1)
        self.absorb = packer.heads(up_k.transpose(1, 2))
        self.expand = packer.heads(up_v)
        self.out = packer.linear(attention.out.weight)

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
        self.down = packer.linear(attention.q.weight, attention.kv.weight)
        self.out = packer.linear(attention.out.weight)

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

    def __init__(self, mlp: MLP, packer: Packer) -> None:
        self.gate_up, self.down = packer.linear(mlp.gate_up.weight), packer.linear(mlp.down.weight)

    def __call__(self, rows: Rows[X], x: X) -> X:
        return rows.linear(self.down, rows.swiglu(rows.linear(self.gate_up, x)))


class ServedMoE:
    """Router in fp32, packed experts, shared expert. x [N, 1, D] -> [N, 1, D]; `index` counts the routers of a pass.

    Every choice is carried out, also of models whose experts had limited room (`router.capacity`): who finds room there
    depends on the batch. A token alone always does.
    """

    def __init__(self, moe: MoE, packer: Packer) -> None:
        self.router: Router = moe.router
        weight = moe.router.weight
        self.gate = None if weight is None else packer.linear(weight.float(), kind="fp32")
        self.experts = packer.experts(moe.experts.gate_up, moe.experts.down)
        self.shared = None if moe.shared is None else ServedMLP(moe.shared, packer)

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
        self.attention_norm, self.ffn_norm = ServedNorm(block.attention_norm), ServedNorm(block.ffn_norm)
        attention = block.attention
        self.attention: ServedLatentAttention | ServedHeadAttention
        if isinstance(attention, LatentAttention):
            self.attention = ServedLatentAttention(attention, packer)
        else:
            self.attention = ServedHeadAttention(attention, packer)
        self.ffn: ServedMoE | ServedMLP
        self.ffn = ServedMoE(block.ffn, packer) if isinstance(block.ffn, MoE) else ServedMLP(block.ffn, packer)

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
        self.embed_norm, self.hidden_norm = ServedNorm(module.embed_norm), ServedNorm(module.hidden_norm)
        self.project = packer.linear(module.project.weight)
        self.block = ServedBlock(module.block, packer)
        self.norm = ServedNorm(module.norm)

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
        if can_tape():
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
    """A model with its matrices packed as `weights` (see `KINDS`; None: as they are computed with).

    Embeddings, norms and routers stay as they are, and the head has 8 bits at least. `release` empties the model's own
    matrices as they are packed, so that memory never holds both whole. `routed_bytes` and `other_bytes` are what the
    main model's packed matrices take: all routed experts, and what every token reads.
    """

    def __init__(self, model: Transformer, weights: str | None = None, *, release: bool = False) -> None:
        if weights is not None and weights not in KINDS:
            raise ConfigError(f"weights must be one of {', '.join(KINDS)}, not '{weights}'")
        self.config: ModelConfig = model.config
        self.dtype = model.dtype
        self.kind = weights or ("bf16" if model.dtype == torch.bfloat16 else "fp32")
        self.embedding = model.embed.weight.detach()
        packer = Packer(self.kind, self.dtype)
        self.head = packer.linear(model.head_weight, kind="int8" if self.kind == "int4" else None)
        self.blocks = [ServedBlock(block, packer) for block in _packed_blocks(model.layers, release)]
        self.routed_bytes, self.other_bytes = packer.routed_bytes, packer.other_bytes
        self.mtp = [ServedMTP(module, packer) for module in _packed_blocks(model.mtp, release)]
        self.norm = ServedNorm(model.norm)
        shape = (self.dtype, self.config.hidden_dim)
        self._main = Pass(self._compute, self.blocks, 0, *shape)
        depths = enumerate(self.mtp, self.config.num_layers)
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


def _packed_blocks(modules: nn.ModuleList, release: bool) -> Iterator[Any]:
    """One module after the other; with `release`, each loses its matrices once the next is asked for.

    Norms, routers and their biases are shared with what is served, and stay.
    """
    for module in modules:
        yield module
        for name, parameter in module.named_parameters() if release else ():
            if parameter.dim() > 1 and ".router." not in name:
                parameter.data = parameter.data.new_empty(0)
