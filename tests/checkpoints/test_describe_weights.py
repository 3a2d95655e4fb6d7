"""What weights take, against the bytes in the files and sizes worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantised_files import DEEPSEEK, ODD_SIDES, all_tensors, edit_tensors, in_blocks, quantise

from moestro.checkpoints.describe import describe_weights
from moestro.checkpoints.files import ModelFiles
from moestro.checkpoints.random_weights import write_random_model
from moestro.config import Config

KV_UP = 2 * (32 + 64) * 512  # heads x (keys without rotation + values) x latents


@pytest.fixture
def directory(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    write_random_model(make_config(*ODD_SIDES).model, tmp_path / "model", seed=3, dtype="bf16")
    return tmp_path / "model"


def test_parts_of_a_plain_model(directory: Path) -> None:
    tree = describe_weights(ModelFiles(directory))
    assert tree["format"] == "bf16 and fp32" and tree["dequantised"] == {}
    assert sum(tree["stored"].values()) == sum(tensor.nbytes for tensor in all_tensors(directory).values())
    assert tree["parts"]["routed experts"] == {"bf16": 8 * 3 * 64 * 256 * 2}
    assert tree["parts"]["embedding and head"] == {"bf16": 2 * 300 * 256 * 2}
    assert tree["parts"]["routers"] == {"bf16": 8 * 256 * 2, "fp32": 8 * 4}
    routers = 2 * (8 * 256 * 4 + 8 * 4)  # served in fp32, with their biases
    assert tree["served"] == {"fp32": routers, "bf16": tree["stored"]["bf16"] - 2 * 8 * 256 * 2}


def test_codes_are_served_as_codes_but_for_the_absorbed_form(directory: Path) -> None:
    quantise(directory, DEEPSEEK, in_blocks(128, 128))
    edit_tensors(directory, lambda t: t["model.layers.0.mlp.up_proj.weight"].view(torch.uint8).fill_(0x7F))  # unread
    tree = describe_weights(ModelFiles(directory))
    assert tree["format"] == "fp8, blocks 128 x 128, fp32 scales"
    assert sum(tree["stored"].values()) == sum(tensor.nbytes for tensor in all_tensors(directory).values())
    assert tree["parts"]["routed experts"] == {"fp8": 8 * 3 * (64 * 256 + 2 * 4)}  # two blocks a matrix, of 4 bytes
    assert tree["parts"]["dense layers"] == {"fp8": 3 * (320 * 256 + 3 * 2 * 4)}
    assert tree["dequantised"] == {"the absorbed form of MLA": 3 * KV_UP * 2}  # bf16, in all three blocks
    blocks = 2 * 4  # of kv_b_proj [192, 512]
    assert tree["served"]["fp8"] == tree["stored"]["fp8"] - 3 * (KV_UP + 4 * blocks)


def test_a_product_with_plain_weights_is_dequantised(directory: Path) -> None:
    def chosen(name: str) -> bool:
        return name == "model.layers.0.self_attn.q_proj.weight"  # shares a product with kv_a_proj_with_mqa

    quantise(directory, DEEPSEEK, in_blocks(128, 128), chosen=chosen)
    tree = describe_weights(ModelFiles(directory))
    assert tree["dequantised"] == {"products shared with plain weights": (192 + 576) * 256 * 2}
    assert "fp8" not in tree["served"]
