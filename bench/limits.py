"""What the machine can do, measured in the run that is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moestro import machine
from moestro.ops import library


@dataclass(frozen=True)
class Limits:
    """GB/s read from memory; GFLOP/s of products, the better of torch's large matrices and ours in registers."""

    read: float
    fp32: float
    bf16: float

    def __str__(self) -> str:
        return f"limits: {self.read:.1f} GB/s read, {self.fp32:.0f} GFLOP/s fp32, {self.bf16:.0f} bf16"


def measure_limits(seconds: float = 4) -> Limits:
    """Takes `seconds` and one more."""
    measured = machine.measure_machine(seconds)
    peaks = {torch.float32: measured.fp32_gflops, torch.bfloat16: measured.bf16_gflops}
    if library.load_library() is not None:
        peaks = {dtype: max(peak, library.measure_peak(dtype) / 1e9) for dtype, peak in peaks.items()}
    return Limits(measured.read_gb_per_second, peaks[torch.float32], peaks[torch.bfloat16])
