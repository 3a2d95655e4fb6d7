"""Random-weight model directories of any size, written tensor by tensor: memory holds one shard, never the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from moestro.checkpoints.files import DTYPES, slot_shape, write_tensors
from moestro.checkpoints.hf import config_to_hf, tensor_map
from moestro.config import ModelConfig
from moestro.data.tokenizer import Tokenizer
from moestro.errors import CheckpointError, ConfigError
from moestro.model.transformer import Transformer

STREAM_SHARD_BYTES = 1_000_000_000


def write_random_model(config: ModelConfig, directory: Path, *, seed: int, dtype: str) -> dict[str, Any]:
    """Write config.json, weights and, where the vocabulary has room for it, the built-in tokenizer.

    Returns {"parameters", "bytes"}. Raises ConfigError if the directory is in use, CheckpointError if the disk is full.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be bf16 or fp32, not '{dtype}'")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed must be 0 or more and below 2⁶³, not {seed}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} exists and is not empty", hint="choose another --out")
    counted = {"parameters": 0, "bytes": 0}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in random_tensors(config, seed, DTYPES[dtype]):
            counted["parameters"] += tensor.numel()
            counted["bytes"] += tensor.nbytes
            yield name, tensor

    tokenizer = Tokenizer.builtin()
    stored = str(DTYPES[dtype]).removeprefix("torch.")
    tree = config_to_hf(config, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id, dtype=stored)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory, tensors(), STREAM_SHARD_BYTES)
        if tokenizer.vocab_size <= config.vocab_size:
            tokenizer.save(directory)
        (directory / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot write {directory}: {reason}") from error
    return counted


def random_tensors(config: ModelConfig, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor): matrices are normal(0, init_std), norms one, fp32 biases zero."""
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: t.shape for name, t in [*model.named_parameters(), *model.named_buffers()]}
    generator = torch.Generator().manual_seed(seed)
    for name, slot in tensor_map(config).items():
        shape = slot_shape(shapes[slot.parameter], slot)
        if slot.parameter.endswith("router.bias"):
            yield name, torch.zeros(shape)
        elif len(shape) == 1:
            yield name, torch.ones(shape, dtype=dtype)
        else:
            yield name, torch.empty(shape, dtype=dtype).normal_(0.0, config.init_std, generator=generator)
