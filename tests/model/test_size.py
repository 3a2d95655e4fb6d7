"""Sizes against the published figures of DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437, 2505.09343)."""

from __future__ import annotations

import pytest
import torch

from moestro.config import ModelConfig, build_config, load_preset
from moestro.model.size import cache_bytes_per_token, describe_size, measure_size, training_flops
from moestro.model.transformer import Transformer


def preset(name: str) -> ModelConfig:
    return build_config(load_preset(name)).model


def test_v3_parameters() -> None:
    size = measure_size(preset("deepseek-v3"))
    assert size.total == 671_026_419_200
    assert size.active / 1e9 == pytest.approx(37.55, abs=0.005)
    assert size.active_without_embedding / 1e9 == pytest.approx(36.63, abs=0.005)


@pytest.mark.parametrize(
    ("name", "total", "active"), [("deepseek-v2", 235.74, 21.38), ("deepseek-v2-lite", 15.71, None)]
)
def test_v2_parameters(name: str, total: float, active: float | None) -> None:
    size = measure_size(preset(name))
    assert size.total / 1e9 == pytest.approx(total, abs=0.005)
    assert active is None or size.active / 1e9 == pytest.approx(active, abs=0.005)


def test_cache_bytes() -> None:
    assert cache_bytes_per_token(preset("deepseek-v3")) == {"bf16": 70_272, "fp32": 140_544, "fp8": 61 * 656}
    assert "fp8" not in cache_bytes_per_token(preset("deepseek-v3").model_copy(update={"attention": "mha"}))


@pytest.mark.parametrize(("name", "gflops"), [("deepseek-v3", 250), ("deepseek-v2", 155)])
def test_training_flops_per_token(name: str, gflops: int) -> None:
    assert training_flops(preset(name), 4096) / 1e9 == pytest.approx(gflops, abs=1)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_experts": 0}, {"mtp_depth": 2}])
def test_counts_equal_a_model_that_exists(changes: dict[str, object]) -> None:
    config = build_config({"model": {"hidden_dim": 32, "num_layers": 3, "vocab_size": 64} | changes}).model
    model = Transformer(config)
    with torch.no_grad():
        counts = {name: t.numel() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    size = measure_size(config)
    assert size.total + size.mtp == sum(counts.values())
    routed = {name: n for name, n in counts.items() if ".experts." in name}
    idle = sum(n * (config.num_experts - config.top_k) // config.num_experts for n in routed.values())
    assert size.active + size.mtp_active == sum(counts.values()) - idle
    assert size.routed == sum(n for name, n in routed.items() if not name.startswith("mtp."))
    assert describe_size(config)["parameters"]["total"] == size.total
