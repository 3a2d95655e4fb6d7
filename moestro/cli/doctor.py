"""`moestro doctor`: what this machine offers, how fast it is, and what is wrong with it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from moestro.cli.output import print_json, print_rows
from moestro.cli.process import Threads, use_threads


def doctor(
    *,
    seconds: float = 3.0,
    threads: Threads = 0,
    json_output: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> None:
    """Check this machine: kernels, threads, memory and speed, with advice.

    Memory bandwidth and matrix products are measured, in a few seconds.

    Parameters
    ----------
    seconds
        How long to measure.
    json_output
        Print everything as one JSON object.
    """
    from moestro import machine as machines
    from moestro.errors import ConfigError
    from moestro.ops import library

    if not 0.5 <= seconds <= 60:
        raise ConfigError(f"--seconds must lie between 0.5 and 60, not {seconds:g}")
    use_threads(threads)
    isa = library.current_isa()  # first, so that the description includes the kernels' OpenMP runtime
    machine = machines.describe_machine()
    measured = machines.measure_machine(seconds)
    problems = machine.problems() + measured.problems()
    if not isa and not {"avx2", "asimd"}.isdisjoint(machine.instruction_sets):
        problems.append(f"native kernels are not built: install a C++ compiler, then: {machines.how_to_build()}")
    if json_output:
        print_json({"machine": asdict(machine), "measured": asdict(measured), "native": isa, "problems": problems})
        return
    print_rows(
        [
            ("system", f"{machine.os}, Python {machine.python}, torch {machine.torch}"),
            ("CPU", f"{machine.cpu}, {machine.cores} usable cores, {machine.threads} threads"),
            ("instruction sets", " ".join(machine.instruction_sets) or "unknown"),
            ("native kernels", isa or "none: plain torch computes"),
            ("memory", f"{machine.memory_gib:.1f} GiB, {machine.available_gib:.1f} GiB free"),
            ("GPU", ", ".join(machine.gpus) or "none"),
            ("OpenMP", ", ".join(machine.openmp) or "none loaded"),
            ("memory read", f"{measured.read_gb_per_second:.1f} GB/s"),
            (
                "matrix products",
                f"{measured.fp32_gflops:.0f} GFLOP/s fp32, {measured.bf16_gflops:.0f} GFLOP/s bf16",
            ),
        ]
    )
    print("\n".join(f"! {problem}" for problem in problems) or "All is well.")
