"""Records and statistics of a comparison, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moestro.compare.cells import Cell
from moestro.compare.results import (
    NORMAL_975,
    T_975,
    Difference,
    bits_per_byte,
    collect_run,
    cost_to_target,
    estimate,
    half_interval,
    paired_difference,
    read_results,
    run_path,
    summarise,
    trained_figures,
    verdicts,
    write_results,
)
from moestro.config import Config, build_config
from moestro.errors import MoestroError
from moestro.training.metrics import RunLog

KEYS = ("loss", "loss_main", "loss_mtp", "loss_balance", "lr", "grad_norm", "dead_experts", "seconds")


def record(label: str, seed: int, bits: float | None, *, status: str = "finished", pace: float = 1.0) -> dict[str, Any]:
    """Bits per byte fall in equal parts from 4.0 at 100 tokens to `bits` at 300; a token takes 1 / pace seconds."""
    curve: dict[str, list[float]] = {
        "tokens": [100, 200, 300],
        "bits_per_byte": [4.0, (4.0 + (bits or 4.0)) / 2, bits or 4.0],
    }
    curve["seconds"] = [tokens / pace for tokens in curve["tokens"]]
    curve["flops"] = [tokens * 10 for tokens in curve["tokens"]]
    figures = dict.fromkeys(
        ("steps", "loss", "max_vio_global", "max_over_mean", "load_cv", "entropy", "dropped", "mtp_agreement")
    )
    return {
        "label": label, "seed": seed, "status": status, "error": None, "bits_per_byte": bits, "curve": curve,
        "domains": {} if bits is None else {"words": bits, "code": 2 * bits}, "tokens": 300, "seconds": 300 / pace,
        "tokens_per_second": pace, "max_vio_batch": 0.5 * seed, "dead_experts": seed, **figures,
    }  # fmt: skip


def test_mean_and_deviation_by_hand() -> None:
    result = estimate([1.0, 2.0, 4.0])
    assert result.mean == pytest.approx(7 / 3) and result.n == 3
    assert result.sd == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert estimate([1.0]).sd is None


def test_intervals_by_hand() -> None:
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 * 1.0 / math.sqrt(3))
    assert half_interval([0.0, 2.0]) == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert half_interval([5.0]) is None
    many = [0.0, 1.0] * 20  # 39 degrees of freedom: the normal quantile
    assert half_interval(many) == pytest.approx(1.96 * math.sqrt(40 * 0.25 / 39) / math.sqrt(40))


def test_the_table_of_quantiles_falls_to_the_normal_one() -> None:
    assert len(T_975) == 30 and list(T_975) == sorted(T_975, reverse=True) and T_975[-1] > NORMAL_975
    for freedom, quantile in enumerate(T_975, 1):  # the density from 0 to the quantile sums to 0.475
        t = np.linspace(0, quantile, 20_001)
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
        assert float(((density[1:] + density[:-1]) / 2).sum() * (t[1] - t[0])) == pytest.approx(0.475, abs=4e-5)


def test_differences_are_paired_by_seed() -> None:
    records = [record("a", seed, bits) for seed, bits in enumerate((1.0, 2.0, 3.0, 9.0))]
    records += [record("b", seed, bits) for seed, bits in enumerate((0.9, 1.8, 2.7))]
    records.append(record("b", 3, 0.1, status="failed"))
    difference = paired_difference(records, "b", "a", bits_per_byte)
    assert difference is not None and difference.n == 3
    assert difference.mean == pytest.approx(-0.2)  # of -0.1, -0.2, -0.3: sd 0.1
    assert difference.low == pytest.approx(-0.2 - 4.303 * 0.1 / math.sqrt(3))
    assert difference.high == pytest.approx(-0.2 + 4.303 * 0.1 / math.sqrt(3))
    assert not difference.is_clear
    assert Difference(-1.0, -1.5, -0.5, 3).is_clear and not Difference(-1.0, None, None, 1).is_clear
    assert paired_difference(records, "b", "c", bits_per_byte) is None


def test_costs_are_interpolated_between_evaluations() -> None:
    curve: dict[str, list[float]] = {
        "tokens": [100, 200, 400],
        "seconds": [10.0, 20.0, 60.0],
        "bits_per_byte": [3.0, 2.0, 1.0],
    }
    assert cost_to_target(curve, "tokens", 2.25) == pytest.approx(175)
    assert cost_to_target(curve, "seconds", 1.25) == pytest.approx(50)
    assert cost_to_target(curve, "tokens", 2.0) == 200
    assert cost_to_target(curve, "tokens", 3.5) == 100  # it was there before anyone looked
    assert cost_to_target(curve, "tokens", 0.5) is None
    assert cost_to_target({"tokens": [], "bits_per_byte": []}, "tokens", 1.0) is None


def test_summary_by_hand() -> None:
    records = [record("dense", seed, bits) for seed, bits in enumerate((2.0, 2.2))]
    records += [record("v3", seed, bits, pace=0.5) for seed, bits in enumerate((1.6, 1.7))]
    records += [record("bad", 0, None, status="failed"), record("bad", 1, None, status="waiting")]
    summary = summarise(records)
    dense, v3, bad = summary.cells
    assert summary.baseline == "dense" and summary.target == pytest.approx(2.1)
    assert dense.figures["bits_per_byte"].mean == pytest.approx(2.1) and dense.difference is None
    assert v3.domains["code"].mean == pytest.approx(3.3) and v3.figures["max_vio_batch"].mean == 0.25
    assert v3.difference is not None and v3.difference.mean == pytest.approx(-0.45)
    assert v3.difference.high == pytest.approx(-0.45 + 12.706 * math.sqrt(0.005) / math.sqrt(2))
    # dense falls by 0.01 a token with seed 0, and stays above the target with seed 1
    assert dense.to_target["tokens"].mean == pytest.approx(290) and dense.to_target["tokens"].n == 1
    expected = [100 + 1.9 / 0.012, 100 + 1.9 / 0.0115]
    assert v3.to_target["tokens"].mean == pytest.approx(sum(expected) / 2)
    assert v3.to_target["seconds"].mean == pytest.approx(sum(expected)) and v3.to_target["flops"].n == 2
    assert (bad.finished, bad.failed, bad.figures, bad.difference, bad.to_target) == (0, 1, {}, None, {})
    assert "mtp_agreement" not in v3.figures
    turned = summarise(records, "v3").cells[0].difference
    assert turned is not None and turned.mean == pytest.approx(0.45) and turned.low == pytest.approx(0.45 - 0.6353)
    with pytest.raises(MoestroError, match="'glam'"):
        summarise(records, "glam")
    with pytest.raises(MoestroError, match="no runs"):
        summarise([])


def test_verdicts_by_tokens_and_by_seconds() -> None:
    records = [record("slow", seed, 1.5 + seed / 10, pace=0.2) for seed in range(3)]
    records += [record("fast", seed, 1.8 + seed / 10, pace=2.0) for seed in range(3)]
    records += [record("worst", seed, 2.4 + seed / 10) for seed in range(3)]
    by_tokens, by_seconds = verdicts(records, "tokens")
    assert (by_tokens.axis, by_tokens.measure, by_tokens.label, by_tokens.second) == (
        "tokens", "bits_per_byte", "slow", "fast",
    )  # fmt: skip
    assert by_tokens.value == pytest.approx(1.6)
    assert by_tokens.difference is not None and by_tokens.difference.mean == pytest.approx(-0.3)
    assert (by_seconds.axis, by_seconds.measure, by_seconds.label) == ("seconds", "to_target", "fast")
    assert by_seconds.second == "slow"  # "worst" misses the target, its own mean, with one seed
    noisy = [*records, record("fast", 3, 2.6)]
    assert [verdict.axis for verdict in verdicts(noisy, "tokens")] == ["tokens"]  # "fast" misses it with one, too
    assert [verdict.label for verdict in verdicts(records, "seconds")] == ["slow", "slow"]
    assert [verdict.axis for verdict in verdicts(records, "flops")] == ["flops", "tokens", "seconds"]
    alone = verdicts([record("only", 0, 2.0)], "tokens")
    assert [(verdict.label, verdict.second, verdict.difference) for verdict in alone] == [("only", None, None)] * 2
    assert verdicts([record("bad", 0, None, status="failed")], "tokens") == []


def moe_config() -> Config:
    model = {"vocab_size": 64, "hidden_dim": 16, "num_layers": 2, "num_dense_layers": 0, "num_experts": 4, "top_k": 2}
    return build_config({"model": model, "train": {"seq_len": 8}})


def write_run(run: Path, steps: int) -> None:
    """`steps` steps of 10 tokens, of 0.5 seconds until the last fifth and 1 second there; evaluations at 5 and 10."""
    log = RunLog.open(run, ["0", "1"], 4)
    for step in range(1, steps + 1):
        late = step > 8
        entry = dict.fromkeys(KEYS, 0.0) | {"step": step, "tokens": 10 * step, "max_vio": 3.0 if late else 9.0}
        entry |= {"tokens_per_second": 10.0 if late else 20.0, "dropped": 0.25 if step == 9 else 0.0}
        log.step(entry | {"mtp_agreement": None, "seconds": 99.0}, np.ones((2, 4)), np.zeros((2, 4)))
        if step % 5 == 0:
            domains = {name: {"bits_per_byte": 20 / step + extra} for name, extra in (("x", 0.5), ("y", -0.5))}
            loads = np.array([[[1, 1, 1, 1], [4, 0, 0, 0]], [[3, 3, 3, 3], [4, 8, 0, 0]]]) * step
            log.evaluation(
                {"step": step, "tokens": 777, "seconds": 99.0, "loss": 1.0, "bits_per_byte": 20 / step}
                | {"domains": domains},
                loads,
            )
    log.close()


def test_figures_of_a_run_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 10)
    figures = trained_figures(tmp_path / "run", moe_config(), 7)
    assert (figures["steps"], figures["tokens"], figures["seconds"]) == (10, 100, pytest.approx(8 * 0.5 + 2 * 1.0))
    assert figures["tokens_per_second"] == pytest.approx(100 / 6)
    assert (figures["bits_per_byte"], figures["domains"]) == (2.0, {"x": 2.5, "y": 1.5})
    assert figures["curve"] == {
        "tokens": [50, 100], "seconds": [pytest.approx(2.5), pytest.approx(6.0)], "flops": [350, 700],
        "bits_per_byte": [4.0, 2.0],
    }  # fmt: skip
    assert (figures["max_vio_batch"], figures["dropped"], figures["mtp_agreement"]) == (3.0, 0.125, None)
    # summed over domains: layer 0 has equal loads, layer 1 shares 8, 8, 0, 0
    assert figures["max_vio_global"] == pytest.approx((0 + 1) / 2) and figures["max_over_mean"] == pytest.approx(1.5)
    assert figures["load_cv"] == pytest.approx((0 + 1) / 2) and figures["dead_experts"] == 2
    assert figures["entropy"] == pytest.approx((1 + math.log(2) / math.log(4)) / 2)
    assert trained_figures(tmp_path / "none", moe_config(), 7) == {}


def test_a_record_says_how_a_run_stands(tmp_path: Path) -> None:
    cell = Cell("a b", "switch", ("top_k=2",))
    run = run_path(tmp_path, cell, 1)
    run.mkdir(parents=True)
    run.with_suffix(".json").write_text(moe_config().model_dump_json())
    waiting = collect_run(tmp_path, cell, 1)
    assert (waiting["status"], waiting["tokens"], waiting["curve"]) == ("waiting", None, None)
    assert (waiting["num_experts"], waiting["overrides"], tmp_path / waiting["run"]) == (4, ["top_k=2"], run)
    failed = collect_run(tmp_path, cell, 1, "out of memory")
    assert (failed["status"], failed["error"]) == ("failed", "out of memory") and failed.keys() == waiting.keys()
    write_run(run, 10)
    assert collect_run(tmp_path, cell, 1)["status"] == "stopped"
    (run / "run.json").write_text(json.dumps({"finished": True}))
    finished = collect_run(tmp_path, cell, 1)
    assert (finished["status"], finished["bits_per_byte"]) == ("finished", 2.0) and finished.keys() == waiting.keys()

    write_results(tmp_path, [finished, failed])
    assert read_results(tmp_path) == [finished, failed]
    with pytest.raises(MoestroError, match="no comparison"):
        read_results(run)


def test_a_dense_run_has_no_routing_figures(tmp_path: Path) -> None:
    write_run(tmp_path, 5)
    dense = build_config({"model": {"num_experts": 0}})
    figures = trained_figures(tmp_path, dense, 1)
    assert figures["bits_per_byte"] == 4.0 and not {"max_vio_batch", "dropped", "entropy"} & figures.keys()
