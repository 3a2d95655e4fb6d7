"""The other spelling of routed experts in model files."""

from __future__ import annotations

import torch


def fuse(tensors: dict[str, torch.Tensor]) -> None:
    """Experts of a layer in one tensor, as newer transformers write them."""
    for prefix in {name.split(".experts.")[0] for name in tensors if ".mlp.experts." in name}:
        parts = {
            kind: [tensors.pop(f"{prefix}.experts.{e}.{kind}_proj.weight") for e in range(8)]
            for kind in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}.experts.down_proj"] = torch.stack(parts["down"])
