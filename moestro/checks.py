"""Settings that mean nothing for training: combinations to refuse, and settings without effect to tell about.

They are no errors of a configuration as such: a published model may have any of them and is served all the same. So
`Config` accepts them, and what trains calls these functions.
"""

from __future__ import annotations

from collections.abc import Iterator

from moestro.config import SHARE_KINDS, Config, Frozen, ModelConfig, RouterConfig
from moestro.errors import ConfigError


def refuse_futile(config: Config) -> None:
    """Raise one `ConfigError` that names all combinations under which a part of the model cannot be trained."""
    problems = list(_futile(config))
    if problems:
        raise ConfigError("; ".join(problems))


def idle_settings(config: Config) -> list[str]:
    """One line for each setting that has no effect beside the others. Defaults are passed over in silence."""
    return [*_idle_in_model(config.model), *_idle_in_router(config), *_idle_in_training(config)]


def _futile(config: Config) -> Iterator[str]:
    model, router, train = config.model, config.model.router, config.train
    if model.num_moe_layers and model.top_k == 1 and router.normalize and router.score != "constant":
        yield (
            "model.top_k=1 with model.router.normalize=true gives the one expert weight 1 always, so that the router "
            "learns nothing from the text: set model.router.normalize=false, as Switch does, or model.top_k=2 or more"
        )
    if model.mtp_depth and model.mtp_depth + 1 >= train.seq_len:
        yield f"model.mtp_depth={model.mtp_depth} looks beyond train.seq_len={train.seq_len}: it has no targets"
    if model.mtp_depth and not train.mtp_weight and not train.mtp_weight_late:
        yield (
            f"train.mtp_weight=0 leaves the MTP modules untrained: set model.mtp_depth=0 instead of {model.mtp_depth}, "
            "or a weight"
        )


def _changed(section: Frozen, prefix: str, *names: str) -> list[str]:
    """Those of the settings that differ from their defaults, by their full names."""
    default = type(section)()
    return [f"{prefix}.{name}" for name in names if getattr(section, name) != getattr(default, name)]


def _without_effect(names: list[str], reason: str) -> Iterator[str]:
    if names:
        yield f"{', '.join(names)}: without effect, since {reason}"


def _idle_in_model(model: ModelConfig) -> Iterator[str]:
    if model.attention != "mla":
        names = _changed(model, "model", "q_lora_rank", "kv_lora_rank")
        yield from _without_effect(names, f"model.attention={model.attention} has no latents")
    if model.attention != "gqa":
        yield from _without_effect(_changed(model, "model", "num_kv_heads"), "model.attention is not gqa")
    if model.init_scale:
        yield from _without_effect(_changed(model, "model", "init_std"), "model.init_scale takes its place")
    if model.rope.factor == 1:
        names = _changed(model.rope, "model.rope", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
        yield from _without_effect(names, "model.rope.factor=1 stretches nothing")


def _idle_in_router(config: Config) -> Iterator[str]:
    model, router = config.model, config.model.router
    if not model.num_moe_layers:
        shape = _changed(model, "model", "top_k", "num_groups", "top_k_groups", "expert_dim", "num_shared_experts")
        names = [*shape, *_changed(router, "model.router", *RouterConfig.model_fields)]
        reason = "model.num_experts=0" if not model.num_experts else "all layers are dense (model.num_dense_layers)"
        yield from _without_effect(names, reason)
        return
    if router.selection == "hash":
        names = _changed(router, "model.router", "num_hash_layers", "noise")
        names += ["model.router.bias"] if router.bias != "none" else []
        yield from _without_effect(names, "model.router.selection=hash chooses experts by the token alone")
    elif model.top_k == model.num_experts:
        names = ["model.router.bias"] if router.bias != "none" else []
        yield from _without_effect(names, f"all {model.num_experts} experts are chosen")
    elif router.bias != "none" and not router.bias_speed and not config.train.start_from:
        yield from _without_effect([f"model.router.bias={router.bias}"], "model.router.bias_speed=0 never moves it")
    if router.bias == "none":
        yield from _without_effect(_changed(router, "model.router", "bias_speed"), "model.router.bias=none")
    if model.top_k == 1 and router.random_second:
        yield from _without_effect(["model.router.random_second"], "model.top_k=1")
    yield from _idle_groups(model)
    yield from _idle_losses(router)
    capacity = router.capacity
    names = _changed(capacity, "model.router.capacity", "unit", "order", "spared_fraction")
    if not capacity.factor and not capacity.eval_factor:
        yield from _without_effect(names, "model.router.capacity.factor=0 is no limit")


def _idle_groups(model: ModelConfig) -> Iterator[str]:
    """Groups are devices for some losses and for capacities, even where every group may be chosen."""
    router = model.router
    are_devices = router.capacity.unit == "device" or any(term.kind in SHARE_KINDS[1:] for term in router.balance)
    if model.num_groups > 1 and model.top_k_groups == model.num_groups and not are_devices:
        names = [f"model.num_groups={model.num_groups}"]
        yield from _without_effect(names, f"model.top_k_groups={model.top_k_groups} takes every group")


def _idle_losses(router: RouterConfig) -> Iterator[str]:
    for term in router.balance:
        if not term.weight:
            yield f"the balance term '{term.kind}' in model.router.balance: without effect, since its weight is 0"
        elif term.kind == "z" and router.score != "softmax":
            yield (
                f"the balance term 'z' in model.router.balance keeps a softmax from growing; with "
                f"model.router.score={router.score} it only pulls all scores down"
            )


def _idle_in_training(config: Config) -> Iterator[str]:
    train, model = config.train, config.model
    if train.precision not in ("auto", "fp8"):
        names = _changed(config.fp8, "fp8", *type(config.fp8).model_fields)
        yield from _without_effect(names, f"train.precision={train.precision}")
    elif train.precision == "auto":
        yield from _without_effect(_changed(config.fp8, "fp8", *type(config.fp8).model_fields), "auto never takes fp8")
    if not model.mtp_depth:
        names = _changed(train, "train", "mtp_weight", "mtp_weight_late")
        yield from _without_effect(names, "model.mtp_depth=0")
    if not train.decay_fraction:
        yield from _without_effect(_changed(train, "train", "final_lr_ratio"), "train.decay_fraction=0")
    if train.minutes:
        return
    if train.warmup_steps >= train.steps:
        yield f"train.warmup_steps={train.warmup_steps} leaves none of {train.steps} steps at the full train.lr"
    for name in ("eval_every", "checkpoint_every"):
        if getattr(train, name) > train.steps:
            names = _changed(train, "train", name)
            yield from _without_effect(names, f"the run has {train.steps} steps; it happens at the end alone")
