"""Measured figures are plausible, and advise what they should."""

from __future__ import annotations

import dataclasses

from moestro import machine
from moestro.machine import Measurement


def test_measured_bf16_overrules_the_flag() -> None:
    slow = Measurement(2, 20.0, 1.0, True, fp32_gflops=300.0, bf16_gflops=150.0, seconds=3.0)
    assert slow.bf16_speedup == 0.5
    (advice,) = slow.problems()
    assert "0.50" in advice
    assert "train.precision=fp32" in advice
    assert dataclasses.replace(slow, bf16_gflops=600.0).problems() == []


def test_measurement_is_plausible() -> None:
    found = machine.measure_machine(seconds=0.2)
    assert min(found.read_gb_per_second, found.fp32_gflops, found.bf16_gflops) > 0.01
