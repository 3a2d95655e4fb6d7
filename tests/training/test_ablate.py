"""Ablations against a model computed in loops, against models made by hand, and what must be left untouched."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moestro.config import Config, ModelConfig, build_config
from moestro.data.batches import Batch
from moestro.errors import ConfigError
from moestro.model.attention import Context
from moestro.model.experts import MoE
from moestro.model.rope import rope_tables
from moestro.model.transformer import Block, Transformer, init_weights
from moestro.routing.router import Router
from moestro.training.ablate import AblatedRouter, Cut, ablate, apply_cut, draw_masks, moe_layers
from moestro.training.evaluate import Domains, score_domains
from moestro.training.loss import attention_batch

Make = Callable[..., Config]
Choose = Callable[[Router, list[float]], list[int]]
TOKEN_BYTES = torch.full((300,), 2)
NONE_MASKED = torch.zeros(8, dtype=torch.bool)


def once(batch: Batch) -> Iterator[Batch]:
    yield batch


def sample_domains(names: str = "ab", length: int = 14) -> dict[str, Callable[[], Iterator[Batch]]]:
    """One row of random tokens per domain, of token ids that no other domain has."""
    generator = torch.Generator().manual_seed(8)
    rows = [torch.randint(50 * i, 50 * i + 50, (1, length), generator=generator) for i in range(len(names))]
    return {name: partial(once, Batch(row, torch.zeros_like(row))) for name, row in zip(names, rows, strict=True)}


def build(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights large enough for experts to matter, and uneven biases."""
    model = Transformer(config.model_copy(update={"init_std": 0.3}))
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, router in model.routers():
        router.bias.copy_(torch.randn(config.num_experts, generator=generator) * 0.2)
    return model.eval()


def run(model: Transformer, domains: Domains, *names: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Name -> entry of the result."""
    return {row["name"]: row for row in ablate(model, domains, TOKEN_BYTES, names, **settings)["ablations"]}


# --- the choice, against Python loops


def choose_slowly(router: Router, scores: list[float], masked: set[int], top: int = 0, extra: int = 0) -> list[int]:
    """Ids of one token: V3's selection over what is left once `masked` and the first `top` are gone.

    Groups too small for the sum of their two best come after all others.
    """
    config = router.config
    multiplicative = config.router.bias == "multiplicative"
    bias = router.bias.tolist()
    biased = {i: s * (1 + b) if multiplicative else s + b for i, (s, b) in enumerate(zip(scores, bias, strict=True))}

    def pick(allowed: set[int], count: int) -> list[int]:
        size = config.num_experts // config.num_groups
        groups = [[i for i in range(g * size, g * size + size) if i in allowed] for g in range(config.num_groups)]
        counted = 2 if config.router.group_score == "top2" else 1

        def rank(group: list[int]) -> tuple[bool, float]:
            return len(group) >= counted, sum(sorted((biased[i] for i in group), reverse=True)[:counted])

        if config.num_groups > config.top_k_groups:
            groups = sorted(filter(None, groups), key=rank, reverse=True)[: config.top_k_groups]
        reached = {i for group in groups for i in group}
        return sorted(reached, key=lambda i: -biased[i])[:count]

    every = set(range(config.num_experts))
    first = pick(every, config.top_k)
    order = sorted(first, key=lambda i: -scores[i]) + sorted(every - set(first), key=lambda i: -scores[i])
    return pick(every - masked - set(order[:top]), config.top_k + extra)


@pytest.mark.parametrize("bias", ["sign", "multiplicative"])
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
@pytest.mark.parametrize("shape", [(1, 1, "top2"), (4, 3, "top2"), (4, 3, "max"), (2, 2, "top2")])
@pytest.mark.parametrize("cut", [((), 0, 0), ((), 1, 0), ((), 5, 0), ((1, 2, 3, 9), 0, 0), ((0,), 2, 0), ((), 0, 1)])
def test_the_choice_equals_a_slow_one(
    bias: str, score: str, shape: tuple[int, int, str], cut: tuple[tuple[int, ...], int, int]
) -> None:
    (groups, kept, rule), (masked, top, extra) = shape, cut
    sizes = {"hidden_dim": 6, "num_experts": 16, "top_k": 3, "num_groups": groups, "top_k_groups": kept}
    router_settings = {"score": score, "bias": bias, "group_score": rule, "scale": 1.5}
    router = Router(build_config({"model": sizes | {"router": router_settings}}).model)
    generator = torch.Generator().manual_seed(3)
    assert router.weight is not None
    router.weight.data.normal_(generator=generator)
    router.bias.copy_(torch.randn(16, generator=generator) * 0.5 - 1.0)  # some factors 1 + b are negative
    x = torch.randn(40, 6, generator=generator)
    mask = torch.zeros(16, dtype=torch.bool)
    mask[list(masked)] = True
    with torch.no_grad():
        routes, intact = AblatedRouter(router, mask, top=top, extra=extra)(x), router(x)
    assert torch.equal(routes.scores, intact.scores)
    if not (masked or top or extra):
        assert torch.equal(routes.ids, intact.ids) and torch.equal(routes.weights, intact.weights)
    for scores, ids, weights in zip(intact.scores.tolist(), routes.ids.tolist(), routes.weights.tolist(), strict=True):
        expected = choose_slowly(router, scores, set(masked), top, extra)
        assert sorted(ids) == sorted(expected)
        total = sum(scores[i] for i in expected)
        assert dict(zip(ids, weights, strict=True)) == pytest.approx({i: 1.5 * scores[i] / total for i in expected})


def test_too_few_experts_in_reach_are_refused() -> None:
    shape = {"hidden_dim": 6, "num_experts": 8, "top_k": 3, "num_groups": 4, "top_k_groups": 2}
    router = Router(build_config({"model": shape}).model)
    AblatedRouter(router, NONE_MASKED, top=1)
    AblatedRouter(router, torch.arange(8) == 5)
    for masked, top in [(NONE_MASKED, 2), (torch.arange(8) > 5, 0), (torch.arange(8) == 5, 1)]:
        with pytest.raises(ConfigError, match=r"as few as 2 experts .* 2 groups .* use 3"):
            AblatedRouter(router, masked, top=top)
    hashed = Router(build_config({"model": {"router": {"selection": "hash"}}}).model)
    with pytest.raises(ValueError, match="hash"):
        AblatedRouter(hashed, torch.zeros(32, dtype=torch.bool))


# --- the whole model, against loops over tokens and experts


def moe_slowly(moe: MoE, x: Tensor, choose: Choose, shared: bool) -> Tensor:
    """x [N, D] -> [N, D]: V3 eq. 12–13 for each token."""
    router, config, rows = moe.router, moe.router.config, []
    assert router.weight is not None
    for token in x:
        scores = (router.weight @ token).sigmoid()
        chosen = choose(router, scores.tolist())
        total = sum(float(scores[i]) for i in chosen)
        out = moe.shared(token[None])[0] if shared and moe.shared is not None else torch.zeros_like(token)
        for i in chosen:
            gate, up = (moe.experts.gate_up[i] @ token).chunk(2)
            out = out + config.router.scale * float(scores[i]) / total * (moe.experts.down[i] @ (F.silu(gate) * up))
        rows.append(out)
    return torch.stack(rows)


@torch.no_grad()
def bits_slowly(model: Transformer, batch: Batch, choose: Choose, shared: bool = True) -> float:
    """Bits per byte of one row; `choose` says which experts a token of scores [E] has."""
    attention = attention_batch(batch, mask_documents=True)
    tokens = batch.inputs.flatten()
    context = Context(tokens, rope_tables(model.config, attention.positions), attention)
    x = model.embed(tokens)
    for block in model.layers:
        assert isinstance(block, Block)
        x = x + block.attention(block.attention_norm(x), context.rope, attention)
        normed = block.ffn_norm(x)
        x = x + (moe_slowly(block.ffn, normed, choose, shared) if isinstance(block.ffn, MoE) else block.ffn(normed))
    assert model.head is not None
    logits = model.head(model.norm(x)).double().log_softmax(-1)
    targets = batch.targets(0).flatten().tolist()
    return -sum(float(logits[i, t]) for i, t in enumerate(targets)) / math.log(2) / (2 * len(targets))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 3)])
def test_every_ablation_equals_the_model_in_loops(make_config: Make, groups: int, kept: int) -> None:
    changes = ("model.num_layers=3", f"model.num_groups={groups}", f"model.top_k_groups={kept}")
    model, domains = build(make_config(*changes).model), sample_domains()
    found = run(model, domains, "top1", "top:3", "fraction:0.25", "shared", "shared+1", seed=4, draws=1)
    masks = {
        id(moe.router): m for (_, moe), m in zip(moe_layers(model), draw_masks(2, 8, count=2, seed=4), strict=True)
    }
    ways: dict[str, tuple[Choose, bool]] = {
        "top1": (lambda r, s: choose_slowly(r, s, set(), top=1), True),
        "top:3": (lambda r, s: choose_slowly(r, s, set(), top=3), True),
        "fraction:0.25": (lambda r, s: choose_slowly(r, s, set(masks[id(r)].nonzero().flatten().tolist())), True),
        "shared": (lambda r, s: choose_slowly(r, s, set()), False),
        "shared+1": (lambda r, s: choose_slowly(r, s, set(), extra=1), False),
    }
    assert list(found) == list(ways)
    for domain, batches in domains.items():
        (batch,) = batches()
        intact = bits_slowly(model, batch, lambda r, s: choose_slowly(r, s, set()))
        for name, (choose, shared) in ways.items():
            entry, expected = found[name]["domains"][domain], bits_slowly(model, batch, choose, shared)
            assert entry["bits_per_byte"] == pytest.approx(expected, rel=1e-5), name
            assert entry["difference"] == pytest.approx(expected - intact, rel=1e-3, abs=1e-6), name
            assert abs(entry["difference"]) > 1e-3, f"{name} has to make a difference here"


def test_domains_of_equal_size_average_to_the_whole(make_config: Make) -> None:
    row = run(build(make_config().model), sample_domains("abc"), "top1")["top1"]
    for key in ("bits_per_byte", "difference"):
        assert row[key] == pytest.approx(statistics.fmean(d[key] for d in row["domains"].values()))


def test_draws_are_averaged(make_config: Make) -> None:
    model, domains = build(make_config().model), sample_domains()
    alone = [run(model, domains, "fraction:0.5", seed=seed, draws=1)["fraction:0.5"] for seed in (5, 6, 7)]
    row = run(model, domains, "fraction:0.5", seed=5, draws=3)["fraction:0.5"]
    assert row["draws"] == 3 and alone[0]["spread"] is None
    for part, parts in [(row, alone), (row["domains"]["b"], [a["domains"]["b"] for a in alone])]:
        assert part["bits_per_byte"] == pytest.approx(statistics.fmean(p["bits_per_byte"] for p in parts))
        assert part["difference"] == pytest.approx(statistics.fmean(p["difference"] for p in parts))
        assert part["spread"] == pytest.approx(statistics.stdev(p["difference"] for p in parts)) and part["spread"] > 0


# --- models made by hand


def test_a_domain_hurts_where_its_own_expert_is_masked() -> None:
    """Token i follows itself, and only expert i knows that: without it, all 16 tokens are as likely."""
    shape = {
        "vocab_size": 16, "hidden_dim": 8, "num_layers": 1, "num_dense_layers": 0, "num_heads": 1, "kv_lora_rank": 4,
        "nope_dim": 4, "rope_dim": 2, "v_dim": 4, "num_experts": 4, "num_shared_experts": 0, "top_k": 1,
        "expert_dim": 2,
    }  # fmt: skip
    model = build(build_config({"model": shape}).model)
    (block,) = model.layers
    assert isinstance(block, Block) and isinstance(block.ffn, MoE) and model.head is not None
    for parameter in (*block.attention.parameters(), *block.ffn.parameters(), model.embed.weight, model.head.weight):
        parameter.data.zero_()
    block.ffn.router.bias.zero_()
    assert block.ffn.router.weight is not None
    for i in range(4):
        model.embed.weight.data[i, i] = 1.0
        block.ffn.router.weight.data[i, i] = 1.0
        block.ffn.experts.gate_up.data[i, [0, 2], i] = 1.0
        block.ffn.experts.down.data[i, 4 + i, 0] = 3.0
        model.head.weight.data[i, 4 + i] = 3.0
    rows = {f"d{i}": torch.full((1, 9), i) for i in range(4)}
    domains = {name: partial(once, Batch(row, torch.zeros_like(row))) for name, row in rows.items()}
    ones = torch.ones(16, dtype=torch.int64)
    result = ablate(model, domains, ones, ["domains"], draws=5)
    matrix = {row["name"]: {name: d["difference"] for name, d in row["domains"].items()} for row in result["ablations"]}
    lost = math.log2(16) - result["intact"]["bits_per_byte"]
    assert lost > 3
    control = matrix.pop("control")
    assert list(matrix) == ["domain:d0", "domain:d1", "domain:d2", "domain:d3"]
    for masked, row in matrix.items():
        expected = {name: lost if masked == f"domain:{name}" else 0.0 for name in domains}
        assert row == pytest.approx(expected, abs=1e-6)
    masks = [draw_masks(1, 4, count=1, seed=seed)[0] for seed in range(5)]
    hits = {f"d{i}": sum(bool(mask[i]) for mask in masks) for i in range(4)}
    assert control == pytest.approx({name: lost * count / 5 for name, count in hits.items()}, abs=1e-6)
    (row, _) = ablate(model, domains, ones, ["domain:d2"], experts_per_layer=1)["ablations"]
    assert row["name"] == "domain:d2" and row["difference"] == pytest.approx(lost / 4)


def test_an_expert_that_nobody_uses_is_not_missed(make_config: Make) -> None:
    model, domains = build(make_config().model), sample_domains()
    for _, moe in moe_layers(model):
        moe.router.bias[3] = -100.0
    before, loads = score_domains(model, domains, TOKEN_BYTES)
    assert not loads[:, :1, 3].any()
    with apply_cut(model, Cut(torch.arange(8)[None] == 3)):
        assert score_domains(model, domains, TOKEN_BYTES)[0] == before
    with apply_cut(model, Cut(torch.arange(8)[None] == int(loads[0, 0].argmax()))):
        assert score_domains(model, domains, TOKEN_BYTES)[0] != before


def test_experts_that_do_nothing_are_not_missed(make_config: Make) -> None:
    model, domains = build(make_config().model), sample_domains()
    for _, moe in moe_layers(model):
        moe.experts.down.data.zero_()
    names = ("top1", "top:4", "fraction:0.5", "domain:a")
    assert all(row["difference"] == 0 for row in run(model, domains, *names, draws=2).values())
    assert run(model, domains, "shared")["shared"]["difference"] != 0


# --- what is left alone


def fail_without_shared(model: Transformer) -> None:
    assert moe_layers(model)[0][1].shared is None
    raise KeyError


def test_everything_is_put_back(make_config: Make) -> None:
    model, domains = build(make_config().model), sample_domains()
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, _ = score_domains(model, domains, TOKEN_BYTES)
    result = ablate(model, domains, TOKEN_BYTES)
    assert result["intact"] == before == score_domains(model, domains, TOKEN_BYTES)[0]
    assert len(result["ablations"]) == 4 + 3 and not result["left_out"]
    with pytest.raises(ConfigError), apply_cut(model, Cut(NONE_MASKED[None], top=7, shared=True)):
        pass
    with pytest.raises(KeyError), apply_cut(model, Cut(NONE_MASKED[None], shared=True)):
        fail_without_shared(model)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is module for name, module in modules.items())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_hashed_layers_and_mtp_modules_are_left_alone(make_config: Make) -> None:
    model = build(make_config("model.num_layers=3", "model.router.num_hash_layers=1").model)
    before = dict(model.routers())
    with apply_cut(model, Cut(torch.zeros(2, 8, dtype=torch.bool), top=1)):
        during = dict(model.routers())
        assert [name for name in before if during[name] is not before[name]] == ["2"]
    assert ablate(model, sample_domains(), TOKEN_BYTES, ["top1"])["hash_layers"] == ["1"]


def test_without_names_everything_that_applies_is_done(make_config: Make) -> None:
    heard: list[str] = []
    model = build(make_config("model.num_shared_experts=0").model)
    result = ablate(model, sample_domains("a"), TOKEN_BYTES, draws=1, announce=heard.append)
    assert heard == ["intact", "top1", "fraction:0.25"] == ["intact", *(row["name"] for row in result["ablations"])]
    assert list(result["left_out"]) == ["shared", "shared+1", "domains"]
    assert result["tokens"] == 13

    hashed = build(make_config("model.router.selection='hash'").model)
    result = ablate(hashed, sample_domains(), TOKEN_BYTES)
    assert [row["name"] for row in result["ablations"]] == ["shared"]
    assert "hash" in result["left_out"]["top1"] and result["hash_layers"] == ["1"]


MISTAKES = [
    ((), "top2", "'top2'; there are: top1, top:M, fraction:F, shared"),
    ((), "top:", "no ablation"),
    ((), "shared:2", "no ablation"),
    ((), "top:0", "1 or more"),
    ((), "top:x", "1 or more"),
    ((), "top:7", "top:7 leaves a token as few as 1 experts"),
    ((), "fraction:1", "between 0 and 1"),
    ((), "fraction:nan", "between 0 and 1"),
    ((), "fraction:half", "between 0 and 1"),
    ((), "fraction:0.01", "less than one of 8"),
    ((), "fraction:0.9", "fraction:0.9 leaves"),
    ((), "domain:c", "no domain 'c' in the text; there are: a, b"),
    (("model.num_shared_experts=0",), "shared", "no shared expert"),
    (("model.num_shared_experts=0",), "shared+1", "no shared expert"),
    (("model.top_k=8",), "shared+1", "as few as 8 .* use 9"),
    (("model.num_experts=0",), "top1", "dense model"),
    (("model.num_dense_layers=2",), "top1", "dense model"),
    (("model.router.selection='hash'",), "top1", "hash"),
    (("model.router.num_hash_layers=1",), "domains", "hash"),
    (("model.num_groups=4", "model.top_k_groups=1"), "domains", "1 groups it reaches"),
]


@pytest.mark.parametrize(("changes", "name", "message"), MISTAKES, ids=[" ".join((*c, n)) for c, n, _ in MISTAKES])
def test_mistakes_are_found_before_anything_is_read(
    make_config: Make, changes: tuple[str, ...], name: str, message: str
) -> None:
    def read() -> Iterator[Batch]:
        raise AssertionError("evaluated")

    model = build(make_config(*changes).model)
    with pytest.raises(ConfigError, match=message) as caught:
        ablate(model, {"a": read, "b": read}, TOKEN_BYTES, [name])
    assert "\n" not in str(caught.value)


def test_settings_are_checked(make_config: Make) -> None:
    model, domains = build(make_config().model), sample_domains()
    wrong: list[dict[str, Any]] = [
        {"draws": 0},
        {"seed": -1},
        {"seed": 2**80},
        {"experts_per_layer": 0},
        {"experts_per_layer": 9},
    ]
    for settings in wrong:
        with pytest.raises(ConfigError, match="must be"):
            ablate(model, domains, TOKEN_BYTES, ["domains"], **settings)
    with pytest.raises(ConfigError, match="one domain"):
        ablate(model, sample_domains("a"), TOKEN_BYTES, ["domains"])
    with pytest.raises(ConfigError, match="at least one"):
        ablate(model, domains, TOKEN_BYTES, [])
