"""Steps of one rank of a world, for `test_world.py`: prints losses, loads and biases as JSON."""

from __future__ import annotations

import json
import sys

import torch

from moestro.config import build_config
from moestro.data.batches import Batch
from moestro.model.transformer import Transformer, init_weights
from moestro.parallel.world import World, join
from moestro.training.optim import Optimizers
from moestro.training.step import train_step


def take_steps(world: World, count: int) -> dict[str, object]:
    """Train a small model; every rank has its rows of two micro-batches with unequal numbers of targets."""
    config = build_config(
        {
            "model": {
                "vocab_size": 97, "hidden_dim": 32, "num_layers": 2, "dense_dim": 48, "num_heads": 2, "nope_dim": 8,
                "rope_dim": 4, "v_dim": 8, "kv_lora_rank": 16, "num_experts": 8, "top_k": 2, "expert_dim": 16,
                "mtp_depth": 1, "max_seq_len": 64, "init_std": 0.1,
            }
        }
    )  # fmt: skip
    model = Transformer(config.model)
    init_weights(model, 0)
    optimizers = Optimizers(model, config.train)
    generator = torch.Generator().manual_seed(1)
    found = []
    for step in range(count):
        tokens = torch.randint(0, 97, (2, 4, 33), generator=generator)
        segments = (torch.rand(2, 4, 33, generator=generator) < 0.2).cumsum(-1)
        segments[1, 2:, 20:] = -1
        batches = [Batch(t, s).rows(world.share) for t, s in zip(tokens, segments, strict=True)]
        settings = {"lr": 1e-3, "mtp_weight": 0.3, "bias_speed": 0.01, "noise_seed": step}
        result = train_step(
            model, optimizers, batches, config.train, token_bytes=torch.ones(97), world=world, **settings
        )
        found.append([result.loss, result.main, result.mtp, result.balance, result.grad_norm, result.nll])
    biases = [router.bias.tolist() for _, router in model.routers()]
    return {"steps": found, "loads": result.loads.tolist(), "biases": biases, "text_bytes": result.text_bytes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join() as joined:
        print(json.dumps(take_steps(joined, int(sys.argv[1]))))
