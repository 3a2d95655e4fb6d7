"""The DeepSeek-V3 model: embedding, blocks, norm, head, and MTP modules that share embedding and head.

One call computes everything: the main model, MTP modules if tokens ahead are given, and the head if targets or logits
are asked for. It returns the routing of every MoE layer along with the hidden states. Modules count and keep nothing,
so recompute, evaluation and gradient accumulation cannot miscount. `blocks()` is the one enumeration of blocks: the
main ones, then those of the MTP modules.

MTP (V3 eq. 21–25): h'ᵏ_i = M_k[norm(Emb(t_{i+k})); norm(hᵏ⁻¹_i)], hᵏ = Block_k(h'ᵏ), predicting t_{i+k+1}. As in the
published checkpoint, the embedding half comes first, h⁰ is the main model's output after its final norm, and each
module ends with its own norm.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro import ops
from moestro.config import ModelConfig
from moestro.model.attention import AttentionBatch, Context, HeadAttention, LatentAttention
from moestro.model.experts import Experts, MoE
from moestro.model.layers import MLP, Linear, RMSNorm
from moestro.model.rope import rope_tables
from moestro.ops.precision import Precision, compute_dtype, without_fp8
from moestro.routing.router import Router, Routes, mix_seed

MakeExperts = Callable[[ModelConfig, Precision], nn.Module]


@dataclass(frozen=True)
class Targets:
    """What a head should predict: ids [N] int64 (−100: nothing), and weights [N] in the sum, None for ones."""

    ids: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class HeadScores:
    """A head's loss on its targets: Σ weight · nll, differentiable; nll [N] in nats, 0 without a target; argmax [N]."""

    total: Tensor
    nll: Tensor
    argmax: Tensor


@dataclass(frozen=True)
class Output:
    """hidden [N, D], ready for the head; the routes of every MoE block on the way, in order.

    `scores` if targets were given, `logits` [N, V] if they were asked for; `ahead`: one output per MTP module.
    """

    hidden: Tensor
    routes: list[Routes] = field(default_factory=list)
    scores: HeadScores | None = None
    logits: Tensor | None = None
    ahead: list[Output] = field(default_factory=list)


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense FFN or a mixture of experts. x [N, D] -> [N, D]."""

    def __init__(
        self, config: ModelConfig, index: int, precision: Precision, make_experts: MakeExperts = Experts
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        attention = LatentAttention if config.attention == "mla" else HeadAttention
        self.attention = attention(config, precision)
        self.ffn_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.ffn: MoE | MLP
        if config.is_moe(index):
            self.ffn = MoE(config, index, make_experts(config, precision), precision)
        else:
            self.ffn = MLP(config.hidden_dim, config.dense_dim, precision)

    def forward(self, x: Tensor, context: Context, ids: Tensor | None = None) -> tuple[Tensor, Routes | None]:
        """`ids` [N, A] replay the router's choice."""
        x = x + self.attention(self.attention_norm(x), context.rope, context.batch)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            out, routes = self.ffn(normed, context, ids)
            return x + out, routes
        return x + self.ffn(normed), None


class MTPModule(nn.Module):
    """One more prediction depth: combine the previous hidden state with the next token, run one block."""

    def __init__(
        self, config: ModelConfig, index: int, precision: Precision, make_experts: MakeExperts = Experts
    ) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.project = Linear(2 * config.hidden_dim, config.hidden_dim, without_fp8(precision))  # as published
        self.block = Block(config, index, precision, make_experts)
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps)

    def forward(
        self, embedded: Tensor, hidden: Tensor, context: Context, ids: Tensor | None = None, recompute: bool = False
    ) -> tuple[Tensor, Routes | None]:
        """embedded [N, D] tokens k ahead, hidden [N, D] of depth k − 1 -> this depth's hidden [N, D], and routes."""
        x = self.project(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        x, routes = run_block(self.block, x, context, ids, recompute)
        return self.norm(x), routes


class Transformer(nn.Module):
    """The whole model. Activations and products are in `precision`; parameters keep their own type. Under FP8 the head
    and the projections of MTP modules multiply in bf16, and activations are bf16.

    `make_experts` makes the experts of a MoE layer.
    """

    def __init__(self, config: ModelConfig, precision: Precision = "fp32", make_experts: MakeExperts = Experts) -> None:
        super().__init__()
        self.config = config
        self.precision: Precision = precision
        self.embed = nn.Embedding(config.vocab_size, config.hidden_dim)
        blocks = (Block(config, index, precision, make_experts) for index in range(config.num_layers))
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.head_precision = without_fp8(precision)
        self.head = None if config.tie_embeddings else Linear(config.hidden_dim, config.vocab_size, self.head_precision)
        depths = range(config.num_layers, config.num_layers + config.mtp_depth)
        self.mtp = nn.ModuleList(MTPModule(config, index, precision, make_experts) for index in depths)

    @property
    def dtype(self) -> torch.dtype:
        """The type of activations."""
        return compute_dtype(self.precision)

    def blocks(self) -> list[tuple[str, Block]]:
        """Every block with its name: "0", "1", …, then "mtp.0", …"""
        main = [(str(i), block) for i, block in enumerate(self.layers)]
        extra = [(f"mtp.{k}", module.block) for k, module in enumerate(self.mtp)]
        return [*main, *extra]  # type: ignore[list-item]

    def routers(self) -> list[tuple[str, Router]]:
        """Every router with its block's name, in the order of the returned routes."""
        return [(name, block.ffn.router) for name, block in self.blocks() if isinstance(block.ffn, MoE)]

    def forward(
        self,
        tokens: Tensor,
        batch: AttentionBatch,
        *,
        ahead: Sequence[Tensor] = (),
        targets: Sequence[Targets] = (),
        replay: Sequence[Tensor] | None = None,
        logits: bool = False,
        recompute: bool = False,
        noise_seed: int = 0,
    ) -> Output:
        """tokens [N] -> hidden [N, D] after the final norm, the routes of the main MoE layers, and what is asked for.

        `ahead`: for each MTP depth k, the tokens k ahead [N]; each gives one output. `targets`: for the main head, then
        for the depths in `ahead`; each gives scores. `replay`: expert ids [N, A] for every router on the way, in the
        order of `routers`, used instead of its choice. `logits` asks for those of the main head. `recompute` keeps only
        block inputs and computes blocks again in the backward pass. Router noise depends on `noise_seed` and layer.
        """
        context = Context(tokens, rope_tables(self.config, batch.positions), batch, noise_seed)
        if len(ahead) > len(self.mtp) or len(targets) > 1 + len(ahead):
            depths = f"{len(self.mtp)} MTP modules"
            raise ValueError(f"{len(ahead)} sequences ahead and {len(targets)} targets for a model of {depths}")
        given = iter(replay if replay is not None else ())
        goals = [*targets, *[None] * (1 + len(ahead) - len(targets))]
        x, routes = self.embed(tokens).to(self.dtype), []
        for block in self.layers:
            ids = next(given) if replay is not None and isinstance(block.ffn, MoE) else None
            x, chosen = run_block(block, x, context, ids, recompute)
            if chosen is not None:
                routes.append(chosen)
        hidden = self.norm(x)
        main = Output(hidden, routes, self._score(hidden, goals[0]))
        for module, later, goal in zip(self.mtp, ahead, goals[1:], strict=False):
            assert isinstance(module, MTPModule)
            ids = next(given) if replay is not None and isinstance(module.block.ffn, MoE) else None
            there = replace(context, tokens=later)
            hidden, chosen = module(self.embed(later).to(self.dtype), hidden, there, ids, recompute)
            own = [] if chosen is None else [chosen]
            main.ahead.append(Output(hidden, own, self._score(hidden, goal)))
        if not logits:
            return main
        return replace(main, logits=ops.linear(main.hidden, self._head_weight(), self.head_precision))

    def _score(self, hidden: Tensor, targets: Targets | None) -> HeadScores | None:
        if targets is None:
            return None
        weight, precision = self._head_weight(), self.head_precision
        return HeadScores(*ops.linear_cross_entropy(hidden, weight, targets.ids, targets.weights, precision))

    def _head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head.weight


def run_block(
    block: nn.Module, x: Tensor, context: Context, ids: Tensor | None, recompute: bool
) -> tuple[Tensor, Routes | None]:
    """Run a block; with `recompute`, its activations are computed again in the backward pass instead of kept."""
    if recompute:
        x, chosen = checkpoint(block, x, context, ids, use_reentrant=False)
    else:
        x, chosen = block(x, context, ids)
    return x, chosen


@torch.no_grad()
def init_weights(model: Transformer, seed: int) -> None:
    """Give every parameter its initial value, and router biases 0. Works on any device, in any order.

    A value depends only on the seed, the name of its parameter and, for experts, the expert. So it is the same however
    a model is distributed.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(name, parameter.shape, model.config, seed))
    for buffer in model.buffers():
        buffer.zero_()


def initial_value(name: str, shape: Sequence[int], config: ModelConfig, seed: int) -> Tensor:
    """Normal(0, init_std) for a matrix, ones for a norm (V3 §4.2); fp32.

    With `init_scale`, σ = √(init_scale / inputs), truncated at 2σ (Switch §2.4). Routers with learned noise start at
    zero (Shazeer, appendix A).
    """
    if len(shape) == 1:
        return torch.ones(*shape)
    if config.router.noise == "learned" and ".router." in name:
        return torch.zeros(*shape)
    if len(shape) == 3:
        return torch.stack([initial_value(f"{name}.{e}", shape[1:], config, seed) for e in range(shape[0])])
    generator = torch.Generator().manual_seed(mix_seed(seed, zlib.crc32(name.encode())))
    if not config.init_scale:
        return torch.empty(*shape).normal_(0.0, config.init_std, generator=generator)
    std = (config.init_scale / shape[-1]) ** 0.5
    return nn.init.trunc_normal_(torch.empty(*shape), 0.0, std, -2 * std, 2 * std, generator=generator)
