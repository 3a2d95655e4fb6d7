"""Quantised directories, damaged in hundreds of ways: each loads as before or says in one line why it does not."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_files import DEEPSEEK, Tensors, compressed, edit_config, edit_tensors, in_blocks, in_groups, quantise

from moestro.checkpoints.files import ModelFiles
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config
from moestro.errors import MoestroError

SMALL = ["model.num_layers=1", "model.num_dense_layers=0", "model.num_experts=2", "model.init_std=0.2"]
VALUES: list[Any] = [None, True, -1, 0, 3, 1.5, "x", "fp8", [], [1], ["a", 2], {}, {"a": {}}, [None, None], 10**30]
TYPES = [torch.int8, torch.int64, torch.float64, torch.float8_e5m2, torch.bool]
BLOCKS = DEEPSEEK | {"weight_block_size": [16, 16]}
GROUPS = compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=8)
FORMS = {"fp8": (BLOCKS, in_blocks(16, 16), "_scale_inv"), "int4": (GROUPS, in_groups(8), "_scale")}


def keys_of(tree: dict[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key, nested ones too."""
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*at, key))


def change_config(rng: random.Random, directory: Path) -> None:
    """Drop a key of config.json, give it another value, or add one."""

    def change(tree: dict[str, Any]) -> None:
        *path, key = rng.choice([*keys_of(tree), ("quantization_config", rng.choice(["fmt", "format", "bits"]))])
        for part in path:
            tree = tree[part]
        if rng.random() < 0.3:
            tree.pop(key, None)
        else:
            tree[key] = rng.choice(VALUES)

    edit_config(directory, change)


def change_tensor(rng: random.Random, directory: Path) -> None:
    """Drop a tensor, or give it another name, shape or type."""

    def change(tensors: Tensors) -> None:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        match rng.randrange(5):
            case 0:
                del tensors[name]
            case 1:
                ends = ["", ".weight", "_scale", "_scale_inv", "_packed", "_shape", "x", "é"]
                tensors[name.removesuffix(rng.choice(ends)) + rng.choice(ends)] = tensors.pop(name)
            case 2:
                tensors[name] = rng.choice([tensor.flatten(), tensor[None], tensor[..., :-1].clone(), tensor[:0]])
            case 3:
                tensors[name] = tensor.float().to(rng.choice(TYPES)) if tensor.is_floating_point() else tensor.float()
            case _:
                tensors[rng.choice(sorted(tensors))] = tensors.pop(name)

    edit_tensors(directory, change)


def change_bytes(rng: random.Random, directory: Path) -> None:
    """Cut a file, or change bytes of its header."""
    path = rng.choice([directory / "config.json", *[directory / "model.safetensors"] * 5])
    data = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        path.write_bytes(data[: rng.randrange(len(data))])
        return
    header = int.from_bytes(data[:8], "little") + 8 if path.suffix == ".safetensors" else len(data)
    for _ in range(rng.randint(1, 3)):
        data[rng.randrange(header)] = rng.choice(b'0123456789"[]{},:xF_.\x00\xff')
    path.write_bytes(data)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    """Every parameter, in fp32."""
    files = ModelFiles(directory, torch.float32)
    values = {}
    for name, shape in files.shapes.items():
        values[name] = torch.empty(shape)
        files.fill(name, values[name])
    return values


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", [change_config, change_tensor, change_bytes])
def test_damage_is_refused_or_changes_nothing(
    make_config: Callable[..., Config], tmp_path: Path, form: str, damage: Callable[[random.Random, Path], None]
) -> None:
    whole, directory = tmp_path / "whole", tmp_path / "damaged"
    write_random_model(make_config(*SMALL).model, whole, seed=0, dtype="bf16")
    config, encode, suffix = FORMS[form]
    quantise(whole, config, encode, suffix=suffix)
    expected, refused = read_all(whole), 0
    for seed in range(60):
        shutil.copytree(whole, directory, dirs_exist_ok=True)
        damage(random.Random(seed), directory)
        try:
            found = read_all(directory)
        except MoestroError as error:
            refused += "\n" not in error.command_line_text
            continue
        except Exception as error:
            raise AssertionError(f"seed {seed}: {json.loads((directory / 'config.json').read_text())}") from error
        assert all(torch.equal(found[name], expected[name]) for name in expected if name in found), seed
    assert refused > 10
