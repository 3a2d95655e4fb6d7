"""The cells of the golden losses: tiny models, their data and parameters, and twenty training steps of each.

Every attention, every routing scheme, both optimizers, recompute, tied embeddings, uncut rows, two cells in bf16.
Numbers are drawn uniformly from seeded generators: that is integer arithmetic and exact scaling, the same on every
machine, where a normal distribution would take a logarithm and a cosine. Each parameter has a generator of its own,
seeded by its name. `python tests/golden/cells.py exact|loose` prints the results as JSON; `record.py` calls it, in an
environment that pins the arithmetic.
"""

from __future__ import annotations

import json
import sys
import zlib
from dataclasses import dataclass, field
from typing import Any

import access
import torch
from torch import Tensor

STEPS, LOOSE_STEPS = 20, 5
ROWS, SEQ_LEN, VOCABULARY = 4, 32, 131
MODEL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_dim": 48, "num_layers": 3, "num_dense_layers": 1, "dense_dim": 80,
    "max_seq_len": 64, "num_heads": 4, "num_kv_heads": 2, "kv_lora_rank": 24, "nope_dim": 8, "rope_dim": 8, "v_dim": 12,
    "num_experts": 8, "top_k": 2, "num_shared_experts": 1, "expert_dim": 24, "mtp_depth": 1,
}  # fmt: skip
MANY_EXPERTS = {"num_experts": 24, "expert_dim": 8}  # for schemes that choose more than two, some from eight groups


@dataclass(frozen=True)
class Cell:
    """One configuration: what differs from `MODEL` and from the defaults of training."""

    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"


def all_cells() -> dict[str, Cell]:
    """Every cell by its name."""
    tight = {"accumulate": 2, "betas": [0.8, 0.99], "weight_decay": 0.5, "clip": 0.2}
    q_lora = {"q_lora_rank": 20, "rope": {"factor": 4.0, "original_max_seq_len": 16}}
    cells = {
        "attention/mla": Cell(),
        "attention/mla-q-lora": Cell(q_lora),
        "attention/mha": Cell({"attention": "mha"}),
        "attention/gqa": Cell({"attention": "gqa"}, {"accumulate": 2}),
        "attention/mqa": Cell({"attention": "mqa"}),
        "bias/error": Cell({"router": {"bias": "error"}}, {"accumulate": 2}),
        "bias/multiplicative": Cell({"router": {"bias": "multiplicative"}}),
        "optimizer/adamw": Cell(train=tight),
        "optimizer/muon": Cell(train={"optimizer": "muon"}),
        "optimizer/muon-accumulate": Cell({"attention": "gqa"}, tight | {"optimizer": "muon"}),
        "recompute": Cell(train={"recompute": True}),
        "tied-embeddings": Cell({"tie_embeddings": True}),
        "uncut-rows": Cell(train={"mask_documents": False}),
        "bf16/mla": Cell(precision="bf16"),
        "bf16/gqa": Cell({"attention": "gqa"}, {"accumulate": 2, "recompute": True}, "bf16"),
    }
    for name, scheme in access.router_presets().items():
        cells[f"router/{name}"] = Cell((MANY_EXPERTS if scheme["top_k"] > 2 else {}) | scheme)
    return cells


def uniform(seed: int, *shape: int) -> Tensor:
    """Multiples of 2⁻²⁴ between −1/2 and 1/2, from a generator of their own."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 0.5


def fill(name: str, parameter: Tensor) -> None:
    """Norms near one, biases and matrices of both signs.

    Routers have large weights, so that they choose clearly; so has the embedding, beside which a token's experts weigh
    little: where another rounding changes a choice after all, the loss hardly moves.
    """
    drawn = uniform(zlib.crc32(name.encode()), *parameter.shape)
    if name.endswith("router.bias"):
        parameter.copy_(drawn * 0.25)
    elif parameter.dim() == 1:
        parameter.copy_(1 + drawn * 0.25)
    else:
        parameter.copy_(drawn * (1.0 if ".router." in name or name.startswith("embed.") else 0.25))


def make_rows(step: int, parts: int) -> list[access.Rows]:
    """The batch of a step, cut into micro-batches: random tokens in documents of some ten tokens."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (ROWS, SEQ_LEN + 1), generator=generator)
    starts = torch.rand(ROWS, SEQ_LEN + 1, generator=generator) < 0.1
    starts[:, 0] = False
    return list(zip(tokens.chunk(parts), starts.cumsum(1).chunk(parts), strict=True))


def run_cell(cell: Cell, steps: int) -> dict[str, Any]:
    """Train: losses and gradient norms of every step as exact numbers, and the loads of all steps added up."""
    parts = cell.train.get("accumulate", 1)
    train = {"seq_len": SEQ_LEN, "batch_size": ROWS // parts, "precision": cell.precision} | cell.train
    step = access.start({"model": MODEL | cell.model, "train": train}, cell.precision, fill)
    reports = [step(make_rows(number, parts), number) for number in range(steps)]
    return {
        "losses": [report.loss.hex() for report in reports],
        "grad_norms": [report.grad_norm.hex() for report in reports],
        "loads": torch.stack([report.loads for report in reports]).sum(0).tolist(),
    }


def use_exact_roots() -> None:
    """Replace torch's square root: MKL refines the CPU's own approximation of 1/√x, in which vendors differ."""
    torch.Tensor.sqrt = torch.sqrt = lambda x: x * x.rsqrt()  # type: ignore[assignment, method-assign, misc]


def main() -> None:
    """Print the results of all cells, or in loose mode the first steps of those in fp32."""
    exact = sys.argv[1] == "exact"
    torch.set_num_threads(1)
    if exact:
        use_exact_roots()
        access.force_kernels()
    chosen = {name: cell for name, cell in all_cells().items() if exact or cell.precision == "fp32"}
    names = sys.argv[2:] or list(chosen)
    print(json.dumps({name: run_cell(chosen[name], STEPS if exact else LOOSE_STEPS) for name in names}))


if __name__ == "__main__":
    main()
