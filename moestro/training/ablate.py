"""Ablation: bits per byte of a trained model with experts masked, against the intact model, per domain.

    top:m       every token goes without the m experts it would choose first (DeepSeekMoE fig. 4); top1 is top:1
    fraction:f  a share f of each layer's experts, drawn at random, is masked for all tokens
    shared      the shared experts are removed; shared+1: and one more routed expert used (DeepSeekMoE §4.4)
    domain:d    the experts of each layer that domain d prefers most are masked; `domains`: each domain in turn.
                Its control masks as many experts at random

A masked expert scores below all others before groups and experts are chosen, so the next best takes its place, and
the weights are those of the experts finally chosen. Nothing is retrained: the other experts never learnt to stand in,
so a difference measures what the model relies on, not where its knowledge lies. Layers that route by a hash of the
token have no next best and are left alone. So are MTP modules, which do not affect bits per byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.errors import ConfigError
from moestro.model.experts import MoE
from moestro.model.transformer import Transformer
from moestro.routing.router import Router
from moestro.routing.selection import add_bias, choose
from moestro.routing.stats import specialisation
from moestro.training.evaluate import Domains, score_domains

KNOWN = ("top1", "top:M", "fraction:F", "shared", "shared+1", "domain:NAME", "domains")
EVERY = ("top1", "fraction:0.25", "shared", "shared+1", "domains")  # what is done where nothing is named


class AblatedRouter(Router):
    """A router on the parameters of another that never chooses some of the experts.

    masked [E] bool: experts masked for every token; `top`: how many of each token's first choices are masked besides;
    `extra`: experts that a token uses beyond the other router's top_k. Raises ConfigError if too few are left.
    """

    masked: Tensor

    def __init__(self, router: Router, masked: Tensor, *, top: int = 0, extra: int = 0) -> None:
        if router.hashed:
            raise ValueError("a router that hashes token ids has no next best expert")
        config = router.config.model_copy(update={"top_k": router.config.top_k + extra})
        check_left(config, masked, top=top, what="the mask")
        super().__init__(config, router.layer)
        self.weight, self.noise, self.bias = router.weight, router.noise, router.bias
        self.top = top
        self.register_buffer("masked", masked)
        self.train(router.training)

    def choose(self, scores: Tensor, tokens: Tensor | None) -> Tensor:
        """Biased selection among the experts that are not masked: ids [N, A]."""
        free = scores.detach()
        masked = self.masked.expand_as(free)
        if self.top:
            first = first_choices(free, super().choose(scores, tokens), self.top)
            masked = masked.scatter(1, first, True)
        biased = add_bias(scores, self.selection)
        # below every pair of scores, yet finite: of groups with a single expert left, the one with the better counts
        low = 2 * biased.amin(-1, keepdim=True) - biased.amax(-1, keepdim=True) - 1
        return choose(torch.where(masked, low, biased), self.selection)


def first_choices(scores: Tensor, chosen: Tensor, count: int) -> Tensor:
    """scores [N, E], chosen [N, A] -> ids [N, count]: the chosen experts by score, then the others by score.

    Without bias and groups, as in DeepSeekMoE, these are the experts with the highest scores.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    is_chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
    before = is_chosen.gather(1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order.gather(1, before)[:, :count]


def check_left(config: ModelConfig, masked: Tensor, *, top: int = 0, what: str) -> None:
    """Raise ConfigError unless top_k experts are left in whichever groups a token reaches; masked [..., E] bool."""
    groups = (~masked).unflatten(-1, (config.num_groups, -1)).sum(-1)
    left = int(groups.sort(-1).values[..., : config.top_k_groups].sum(-1).min()) - top
    if left < config.top_k:
        where = f" in the {config.top_k_groups} groups it reaches" if config.num_groups > config.top_k_groups else ""
        raise ConfigError(
            f"{what} leaves a token as few as {max(left, 0)} experts to choose from{where}, "
            f"and it is to use {config.top_k}"
        )


@dataclass(frozen=True)
class Cut:
    """What one evaluation leaves out; `masked` [L, E] over the main MoE layers, else as in `AblatedRouter`."""

    masked: Tensor
    top: int = 0
    extra: int = 0
    shared: bool = False


@contextmanager
def apply_cut(model: Transformer, cut: Cut) -> Iterator[None]:
    """The model with a cut, inside `with`; its routers and shared experts are always put back."""
    layers = moe_layers(model)
    whole = [(moe, moe.router, moe.shared) for _, moe in layers]
    try:
        for (moe, router, shared), masked in zip(whole, cut.masked, strict=True):
            if not router.hashed:
                moe.router = AblatedRouter(router, masked, top=cut.top, extra=cut.extra)
            moe.shared = None if cut.shared else shared
        yield
    finally:
        for moe, router, shared in whole:
            moe.router, moe.shared = router, shared


def moe_layers(model: Transformer) -> list[tuple[str, MoE]]:
    """The main model's layers with experts, by the name of their block."""
    main = model.blocks()[: model.config.num_layers]
    return [(name, block.ffn) for name, block in main if isinstance(block.ffn, MoE)]


@dataclass(frozen=True)
class Ablation:
    """One row of the result: `masked` says what in words; the mean over `cuts` is reported.

    The cut of a `domain` is known only once the intact model's loads are counted.
    """

    name: str
    masked: str
    cuts: tuple[Cut, ...] = ()
    domain: str | None = None


class Planner:
    """Turns names into ablations; every mistake in a name is found here, before anything is evaluated."""

    def __init__(self, model: Transformer, domains: Sequence[str], seeds: Sequence[int], count: int) -> None:
        """`seeds`: one random draw each; `count`: experts that are masked per layer for a domain."""
        self.config, self.domains, self.seeds, self.count = model.config, domains, seeds, count
        self.routers = [moe.router for _, moe in moe_layers(model)]
        if not self.routers:
            raise ConfigError("this is a dense model: it has no experts to mask")
        if not 1 <= count <= self.config.num_experts:
            raise ConfigError(f"experts per layer must be 1 to {self.config.num_experts}, not {count}")
        self.nothing = torch.zeros(len(self.routers), self.config.num_experts, dtype=torch.bool)

    def plan(self, name: str) -> list[Ablation]:
        """The ablations that a name stands for; raises ConfigError if it means nothing for this model."""
        kind, _, value = name.partition(":")
        if name != "shared" and all(router.hashed for router in self.routers):
            raise ConfigError(f"every layer routes by a hash of the token: masking experts ({name}) does not apply")
        if name == "top1" or (kind == "top" and value):
            return [self.plan_top(name, value or "1")]
        if kind == "fraction" and value:
            return [self.plan_fraction(name, value)]
        if name in ("shared", "shared+1"):
            return [self.plan_shared(name)]
        if name == "domains" or (kind == "domain" and value):
            return self.plan_domains(name, [value] if value else self.domains)
        raise ConfigError(f"there is no ablation '{name}'; there are: {', '.join(KNOWN)}")

    def plan_top(self, name: str, value: str) -> Ablation:
        """The first choices of every token."""
        top = int(value) if value.isdecimal() else 0
        if top < 1:
            raise ConfigError(f"{name}: the number of experts to mask must be 1 or more, such as top:2")
        check_left(self.config, self.nothing, top=top, what=name)
        return Ablation(
            name, f"{plural(top)} for each token, those it would choose first", (Cut(self.nothing, top=top),)
        )

    def plan_fraction(self, name: str, value: str) -> Ablation:
        """A share of the experts, one draw for each seed."""
        fraction = parse_float(value)
        if not 0 < fraction < 1:
            raise ConfigError(f"{name}: the share of experts must be between 0 and 1, such as fraction:0.25")
        count = round(fraction * self.config.num_experts)
        if count == 0:
            raise ConfigError(f"{name} is less than one of {self.config.num_experts} experts")
        return self.plan_random(name, count)

    def plan_random(self, name: str, count: int) -> Ablation:
        """So many experts of each layer, one draw for each seed."""
        masks = [draw_masks(*self.nothing.shape, count=count, seed=seed) for seed in self.seeds]
        check_left(self.config, torch.stack(masks), what=name)
        return Ablation(name, f"{plural(count)} of each layer at random", tuple(map(Cut, masks)))

    def plan_shared(self, name: str) -> Ablation:
        """Without the shared experts, and with one more routed expert or not."""
        if not self.config.num_shared_experts:
            raise ConfigError(f"{name}: the model has no shared expert")
        extra = int(name == "shared+1")
        config = self.config.model_copy(update={"top_k": self.config.top_k + extra})
        check_left(config, self.nothing, what=name)
        words = f"the shared experts; {config.top_k} routed experts used" if extra else "the shared experts"
        return Ablation(name, words, (Cut(self.nothing, extra=extra, shared=True),))

    def plan_domains(self, name: str, chosen: Sequence[str]) -> list[Ablation]:
        """The experts that domains prefer, and a control."""
        if unknown := [domain for domain in chosen if domain not in self.domains]:
            raise ConfigError(f"{name}: no domain '{unknown[0]}' in the text; there are: {', '.join(self.domains)}")
        if len(self.domains) < 2:
            raise ConfigError(f"{name}: the text has one domain, and a preference needs two to compare")
        # which experts it will be is open: the worst case is that all are in reach of one token
        check_left(self.config, torch.arange(self.config.num_experts) < self.count, what=name)
        words = f"{plural(self.count)} of each layer that {{}} prefers most"
        return [
            *(Ablation(f"domain:{domain}", words.format(domain), domain=domain) for domain in chosen),
            self.plan_random("control", self.count),
        ]


def plural(count: int) -> str:
    """As "1 expert" or "3 experts"."""
    return "1 expert" if count == 1 else f"{count} experts"


def parse_float(text: str) -> float:
    """The number, or NaN if the text is not a number."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def draw_masks(num_layers: int, num_experts: int, *, count: int, seed: int) -> Tensor:
    """[L, E] bool: `count` random experts of each layer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts, generator=generator)[:count] for _ in range(num_layers)])
    return mask_ids(ids, num_experts)


def mask_ids(ids: Tensor, num_experts: int) -> Tensor:
    """Expert ids [L, n] -> [L, E] bool."""
    return torch.zeros(len(ids), num_experts, dtype=torch.bool).scatter_(1, ids, True)


def ablate(
    model: Transformer,
    domains: Domains,
    token_bytes: Tensor,
    names: Sequence[str] | None = None,
    *,
    seed: int = 0,
    draws: int = 3,
    experts_per_layer: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate the intact model, then each ablation in `names` (None: all of `EVERY` that the model allows).

    Random masks are drawn `draws` times, with seed, seed + 1, …; `experts_per_layer`, by default top_k, are masked
    for a domain. `announce` is told what is evaluated next. In bits per byte, + is worse::

        {"intact": {"bits_per_byte", "domains": {name: {"bits_per_byte", …}}, …}, "tokens",
         "ablations": [{"name", "masked", "draws", "bits_per_byte", "difference", "spread",
                        "domains": {name: {"bits_per_byte", "difference", "spread"}}}],
         "left_out": {name: why}, "hash_layers": [blocks left alone]}

    `spread` is the standard deviation over draws, None for a single one. Raises ConfigError before any evaluation.
    """
    if draws < 1:
        raise ConfigError(f"the number of random draws must be at least 1, not {draws}")
    if not 0 <= seed < 2**63:
        raise ConfigError(f"the seed must be 0 or more and below 2⁶³, not {seed}")
    count = model.config.top_k if experts_per_layer is None else experts_per_layer
    planner = Planner(model, list(domains), range(seed, seed + draws), count)
    ablations, left_out = plan_all(planner, names)
    announce = announce or (lambda name: None)
    announce("intact")
    intact, loads = score_domains(model, domains, token_bytes)
    layers = moe_layers(model)
    # loads of MTP modules come last
    preference = torch.from_numpy(specialisation(loads[:, : len(layers)]))
    rows = []
    for ablation in ablations:
        announce(ablation.name)
        cuts = ablation.cuts
        if ablation.domain is not None:
            ranked = preference[list(domains).index(ablation.domain)].argsort(dim=-1, descending=True, stable=True)
            cuts = (Cut(mask_ids(ranked[:, :count], model.config.num_experts)),)
        rows.append(compare(ablation, intact, [score_cut(model, cut, domains, token_bytes) for cut in cuts]))
    hashed = [name for name, moe in layers if moe.router.hashed]
    return {
        "intact": intact,
        "ablations": rows,
        "tokens": intact["tokens"],
        "left_out": left_out,
        "hash_layers": hashed,
    }


def plan_all(planner: Planner, names: Sequence[str] | None) -> tuple[list[Ablation], dict[str, str]]:
    """The ablations of all names, each once; without names, all that apply, and why the others do not."""
    planned: dict[str, Ablation] = {}
    left_out: dict[str, str] = {}
    for name in EVERY if names is None else names:
        try:
            planned |= {ablation.name: ablation for ablation in planner.plan(name)}
        except ConfigError as error:
            if names is not None:
                raise
            left_out[name] = str(error)
    if not planned:
        raise ConfigError(next(iter(left_out.values()), f"name at least one ablation of: {', '.join(KNOWN)}"))
    return list(planned.values()), left_out


def score_cut(model: Transformer, cut: Cut, domains: Domains, token_bytes: Tensor) -> dict[str, Any]:
    """The evaluation record of the model with a cut."""
    with apply_cut(model, cut):
        return score_domains(model, domains, token_bytes)[0]


def compare(ablation: Ablation, intact: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One entry of the result: the mean of the records of all draws, and how far it is from the intact model."""

    def against(before: Mapping[str, Any], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        values = [record["bits_per_byte"] for record in after]
        mean = fmean(values)
        return {
            "bits_per_byte": mean,
            "difference": mean - before["bits_per_byte"],
            "spread": stdev(values) if len(values) > 1 else None,
        }

    row = {"name": ablation.name, "masked": ablation.masked, "draws": len(records)} | against(intact, records)
    scores = intact["domains"].items()
    return row | {"domains": {name: against(score, [r["domains"][name] for r in records]) for name, score in scores}}
