"""Settings that mean nothing: refused where a part cannot be trained, told where one has no effect."""

from __future__ import annotations

import pytest

from moestro.checks import idle_settings, refuse_futile
from moestro.config import build_config, load_preset, preset_names
from moestro.errors import ConfigError


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.top_k=1"], ["model.top_k=1", "model.router.normalize=false", "model.top_k=2"]),
        (["model.top_k=1", "model.router.selection=hash"], ["model.router.normalize=false"]),
        (
            ["model.mtp_depth=1", "train.mtp_weight=0", "train.mtp_weight_late=0"],
            ["train.mtp_weight", "model.mtp_depth=0"],
        ),
        (["model.mtp_depth=3", "train.seq_len=4"], ["model.mtp_depth=3", "train.seq_len=4"]),
    ],
)
def test_what_trains_nothing_is_refused_with_the_settings_to_change(overrides: list[str], named: list[str]) -> None:
    config = build_config({}, overrides)  # a model like this is legitimate: it is training that is refused
    with pytest.raises(ConfigError) as caught:
        refuse_futile(config)
    assert all(name in str(caught.value) for name in named) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.top_k=1", "model.router.normalize=false"],
        ["model.top_k=1", "model.num_experts=0"],
        ["model.top_k=1", "model.num_dense_layers=6"],
        ["model.top_k=1", "model.router.selection=hash", "model.router.score=constant", "model.router.balance=[]"],
        ["model.mtp_depth=1", "train.mtp_weight_late=0"],
    ],
)
def test_what_trains_is_not_refused(overrides: list[str]) -> None:
    refuse_futile(build_config({}, overrides))


@pytest.mark.parametrize("name", preset_names())
def test_presets_train_and_use_all_they_set(name: str) -> None:
    config = build_config(load_preset(name), ["train.steps=100000"])
    refuse_futile(config)
    assert idle_settings(config) == []


@pytest.mark.parametrize("name", [name for name in preset_names("presets/routers") if name != "dense"])
def test_router_schemes_train_and_use_all_they_set(name: str) -> None:
    tree = load_preset(name, "presets/routers")
    tree["model"]["num_experts"] = 48
    config = build_config(tree)
    refuse_futile(config)
    assert idle_settings(config) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["model.num_experts=0", "model.top_k=3"], "model.top_k: without effect, since model.num_experts=0"),
        (
            ["model.num_experts=0", "model.router.balance=[{kind='expert', weight=1.0}]"],
            "balance: without",
        ),
        (["model.num_dense_layers=6", "model.router.scale=1.0"], "all layers are dense"),
        (
            ["model.num_groups=4", "model.top_k_groups=4"],
            "model.num_groups=4: without",
        ),
        (["model.num_groups=4", "model.top_k_groups=4", "model.router.balance=[{kind='device', weight=0.1}]"], None),
        (["model.num_groups=4", "model.top_k_groups=2"], None),
        (["model.router.bias_speed=0"], "model.router.bias=sign: without effect, since model.router.bias_speed=0"),
        (["model.router.bias_speed=0", "train.start_from=there"], None),
        (["model.router.bias=none", "model.router.bias_speed=0.5"], "model.router.bias_speed: without effect"),
        (["model.top_k=32"], "model.router.bias: without effect, since all 32 experts"),
        (
            ["model.router.selection=hash", "model.router.noise=jitter"],
            "router.noise, model.router.bias: without",
        ),
        (
            ["model.top_k=1", "model.router.normalize=false", "model.router.random_second=true"],
            "random_second: without",
        ),
        (["model.router.capacity.order=affinity"], "model.router.capacity.order: without effect"),
        (["model.router.capacity.order=affinity", "model.router.capacity.factor=1.0"], None),
        (["model.router.balance=[{kind='z', weight=0.001}]"], "model.router.score=sigmoid it only"),
        (["model.router.balance=[{kind='z', weight=0.001}]", "model.router.score=softmax"], None),
        (["model.router.balance=[{kind='expert', weight=0.0}]"], "its weight is 0"),
        (["model.attention=mha", "model.kv_lora_rank=32"], "model.kv_lora_rank: without effect"),
        (["model.num_kv_heads=2"], "model.num_kv_heads: without effect"),
        (["model.attention=gqa", "model.num_kv_heads=2"], None),
        (["model.init_scale=0.1", "model.init_std=0.5"], "model.init_std: without effect"),
        (["model.rope.mscale=2.0"], "model.rope.mscale: without effect"),
        (["model.rope.mscale=2.0", "model.rope.factor=4.0"], None),
        (["fp8.scale=ue8m0", "train.precision=bf16"], "fp8.scale: without effect, since train.precision=bf16"),
        (["fp8.scale=ue8m0"], "fp8.scale: without effect, since auto never takes fp8"),
        (["fp8.scale=ue8m0", "train.precision=fp8"], None),
        (["train.mtp_weight=0.5"], "train.mtp_weight: without effect, since model.mtp_depth=0"),
        (["train.decay_fraction=0", "train.final_lr_ratio=0.5"], "train.final_lr_ratio: without effect"),
        (["train.warmup_steps=1000"], "leaves none of 1000 steps"),
        (["train.warmup_steps=1000", "train.minutes=5"], None),
        (["train.eval_every=2000"], "train.eval_every: without effect, since the run has 1000 steps"),
        (["train.checkpoint_every=2000"], "train.checkpoint_every: without effect"),
        (["train.steps=50"], None),
    ],
)
def test_settings_without_effect_are_told(overrides: list[str], expected: str | None) -> None:
    found = idle_settings(build_config({}, overrides))
    assert len(found) == (expected is not None), found
    assert expected is None or expected in found[0]
