"""The DeepSeek-V3 model: embedding, blocks, norm, head, and MTP modules that share embedding and head.

`forward` and `forward_mtp` return the routing of every MoE layer beside the hidden states: nothing is counted or kept
in modules, so recompute, evaluation and gradient accumulation cannot miscount. `blocks()` is the one enumeration of
blocks: the main ones, then those of the MTP modules.

MTP (V3 eq. 21–25): h'ᵏ_i = M_k[norm(Emb(t_{i+k})); norm(hᵏ⁻¹_i)], hᵏ = Block_k(h'ᵏ), predicting t_{i+k+1}. As in the
published checkpoint the embedding half comes first, h⁰ is the main model's output after its final norm, and each
module ends with a norm of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moestro import ops
from moestro.config import ModelConfig
from moestro.model.attention import AttentionBatch, HeadAttention, LatentAttention, RopeTables
from moestro.model.experts import MoE
from moestro.model.layers import MLP, Linear, RMSNorm
from moestro.model.rope import rope_tables
from moestro.routing.router import Router, Routes


@dataclass(frozen=True)
class Output:
    """hidden [N, D], ready for the head; the routes of every MoE block passed through, in order."""

    hidden: Tensor
    routes: list[Routes] = field(default_factory=list)


class Block(nn.Module):
    """Pre-norm residual block: attention, then a dense FFN or a mixture of experts. x [N, D], tokens [N] -> [N, D]."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.attention = LatentAttention(config) if config.attention == "mla" else HeadAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.ffn = MoE(config, index) if config.is_moe(index) else MLP(config.hidden_dim, config.dense_dim)

    def forward(
        self, x: Tensor, tokens: Tensor, rope: RopeTables, batch: AttentionBatch
    ) -> tuple[Tensor, Routes | None]:
        x = x + self.attention(self.attention_norm(x), rope, batch)
        normed = self.ffn_norm(x)
        if isinstance(self.ffn, MoE):
            out, routes = self.ffn(normed, tokens, batch.starts)
            return x + out, routes
        return x + self.ffn(normed), None


class MTPModule(nn.Module):
    """One more prediction depth: combine the previous hidden state with the next token, run one block."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.embed_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.project = Linear(2 * config.hidden_dim, config.hidden_dim)
        self.block = Block(config, index)
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps)

    def combine(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        """embedded [N, D] of the token k ahead, hidden [N, D] of depth k − 1 -> the block's input [N, D]."""
        out: Tensor = self.project(torch.cat([self.embed_norm(embedded), self.hidden_norm(hidden)], dim=-1))
        return out


class Transformer(nn.Module):
    """The whole model. `dtype` is what activations are computed in; parameters keep theirs."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.embed = nn.Embedding(config.vocab_size, config.hidden_dim)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(config.hidden_dim, config.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(config, config.num_layers + k) for k in range(config.mtp_depth))

    def blocks(self) -> list[tuple[str, Block]]:
        """Every block with its name: "0", "1", …, then "mtp.0", …"""
        main = [(str(i), block) for i, block in enumerate(self.layers)]
        extra = [(f"mtp.{k}", module.block) for k, module in enumerate(self.mtp)]
        return [*main, *extra]  # type: ignore[list-item]

    def routers(self) -> list[tuple[str, Router]]:
        """Every router with the name of its block, in the order in which routes are returned."""
        return [(name, block.ffn.router) for name, block in self.blocks() if isinstance(block.ffn, MoE)]

    @property
    def head_weight(self) -> Tensor:
        """[V, D] in the compute precision."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return weight.to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N, D] -> [N, V]."""
        return ops.linear(hidden, self.head_weight)

    def forward(self, tokens: Tensor, batch: AttentionBatch, *, recompute: bool = False) -> Output:
        """tokens [N] -> hidden [N, D] after the final norm, and the routes of the main MoE layers.

        `recompute` keeps only block inputs and computes blocks again in the backward pass.
        """
        rope = rope_tables(self.config, batch.positions)
        x, routes = self.embed(tokens).to(self.dtype), []
        for block in self.layers:
            x, chosen = _run(block, (x, tokens, rope, batch), recompute)
            if chosen is not None:
                routes.append(chosen)
        return Output(self.norm(x), routes)

    def forward_mtp(
        self, hidden: Tensor, ahead: list[Tensor], batch: AttentionBatch, *, recompute: bool = False
    ) -> list[Output]:
        """hidden [N, D] of the main model and, per depth k, the tokens k ahead [N] -> one `Output` per depth."""
        rope = rope_tables(self.config, batch.positions)
        outputs = []
        for module, tokens in zip(self.mtp, ahead, strict=True):
            assert isinstance(module, MTPModule)
            x = module.combine(self.embed(tokens).to(self.dtype), hidden)
            x, chosen = _run(module.block, (x, tokens, rope, batch), recompute)
            hidden = module.norm(x)
            outputs.append(Output(hidden, [] if chosen is None else [chosen]))
        return outputs


def _run(
    block: nn.Module, arguments: tuple[Tensor, Tensor, RopeTables, AttentionBatch], recompute: bool
) -> tuple[Tensor, Routes | None]:
    if recompute:
        x, chosen = checkpoint(block, *arguments, use_reentrant=False)
    else:
        x, chosen = block(*arguments)
    return x, chosen


def init_weights(model: Transformer, seed: int) -> None:
    """Normal(0, init_std) for every matrix, ones for norms, zero biases (V3 §4.2).

    With `init_scale`, σ = √(init_scale / inputs), cut at 2σ (Switch §2.4); routers with learned noise start at zero
    (Shazeer, appendix A).
    """
    generator = torch.Generator().manual_seed(seed)
    scale = model.config.init_scale
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif scale:
                std = (scale / parameter.shape[-1]) ** 0.5
                nn.init.trunc_normal_(parameter, 0.0, std, -2 * std, 2 * std, generator=generator)
            else:
                parameter.normal_(0.0, model.config.init_std, generator=generator)
        for _, router in model.routers():
            router.bias.zero_()
            if router.noise is not None and router.weight is not None:
                router.weight.zero_()
                router.noise.zero_()
