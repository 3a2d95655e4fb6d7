"""Runs a plan: one process per run, some at a time, each on its own cores; one that fails does not stop the rest.

Each process has its own session, so Ctrl-C at the terminal reaches only this one, which passes it on once: a training
process takes a second signal as the wish to end without saving.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from moestro.compare.cells import SizedCell
from moestro.compare.plan import Plan
from moestro.compare.results import Record, collect_run, is_finished, write_results
from moestro.training.signals import StopRequest, stop_on_signal

POLL_SECONDS = 0.1

Command = Callable[[Path, Path], list[str]]  # from configuration and run directory


def worker_command(config: Path, run: Path) -> list[str]:
    """The process that trains one run."""
    return [sys.executable, "-m", "moestro.compare.worker", str(config), str(run)]


@dataclass
class Running:
    """A process, and which group of cores it has."""

    cell: SizedCell
    seed: int
    process: subprocess.Popen[bytes]
    slot: int
    started: float


@dataclass
class Runner:
    """Trains unfinished runs; `records` are those of results.jsonl, `report` gets each that changed."""

    plan: Plan
    report: Callable[[Record], None]
    command: Command = worker_command
    records: dict[tuple[str, int], Record] = field(default_factory=dict)
    queue: deque[tuple[SizedCell, int]] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)
    wall: dict[str, list[float]] = field(default_factory=dict)  # seconds that whole runs took, by cell

    def run(self) -> int | None:
        """Train to the end; returns the signal that stopped it, or None. Results are on the disk after every run."""
        plan = self.plan
        for cell in plan.cells:
            for seed in plan.seeds:
                self.records[cell.cell.label, seed] = collect_run(plan.directory, cell.cell, seed)
        self.write()
        self.queue.extend((cell, seed) for cell, seed in plan.runs() if not is_finished(plan.run(cell, seed)))
        with stop_on_signal() as stop:
            try:
                self.work(stop)
            finally:  # nothing is left here unless something broke
                for running in self.running:
                    running.process.kill()
                    running.process.wait()
        return stop.signal

    def work(self, stop: StopRequest) -> None:
        """Keep every slot busy until the queue is empty; on a signal, let the processes save."""
        while (self.queue or self.running) and stop.signal is None:
            free = sorted(set(range(self.plan.jobs)) - {running.slot for running in self.running})
            for slot in free[: len(self.queue)]:
                self.running.append(self.start(*self.queue.popleft(), slot))
            time.sleep(POLL_SECONDS)
            for running in [running for running in self.running if running.process.poll() is not None]:
                self.finish(running, stopped=False)
        for running in self.running:
            running.process.terminate()
        for running in list(self.running):
            running.process.wait()
            self.finish(running, stopped=True)

    def start(self, cell: SizedCell, seed: int, slot: int) -> Running:
        """Start one run on the cores of `slot`; its log holds only the latest attempt."""
        run = self.plan.run(cell, seed)
        cores = core_group(slot, self.plan.threads) if self.plan.jobs > 1 else []
        with run.with_suffix(".log").open("wb") as log, pinned(cores):
            process = subprocess.Popen(
                self.command(run.with_suffix(".json"), run),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Running(cell, seed, process, slot, time.monotonic())

    def finish(self, running: Running, *, stopped: bool) -> None:
        """Record how a process ended."""
        self.running.remove(running)
        cell, seed = running.cell.cell, running.seed
        run = self.plan.run(running.cell, seed)
        code = running.process.returncode
        error = None
        if is_finished(run):
            self.wall.setdefault(cell.label, []).append(time.monotonic() - running.started)
        elif not stopped:
            error = last_line(run.with_suffix(".log")) or f"ended with exit code {code}"
        record = collect_run(self.plan.directory, cell, seed, error)
        self.records[cell.label, seed] = record
        self.write()
        self.report(record)

    def seconds_left(self) -> float | None:
        """Until all runs have ended, from those that finished; a cell without one takes the mean. None without any."""
        if not self.wall:
            return None
        means = {label: fmean(seconds) for label, seconds in self.wall.items()}
        unknown = fmean(means.values())
        now = time.monotonic()
        waiting = [means.get(cell.cell.label, unknown) for cell, _ in self.queue]
        under_way = [
            max(means.get(running.cell.cell.label, unknown) - (now - running.started), 0.0) for running in self.running
        ]
        return (sum(waiting) + sum(under_way)) / self.plan.jobs

    def write(self) -> None:
        """Bring results.jsonl up to date."""
        write_results(self.plan.directory, self.records.values())


def core_group(slot: int, size: int) -> list[int]:
    """The cores of one of the concurrent runs; empty where the system cannot bind processes."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    return sorted(os.sched_getaffinity(0))[slot * size : (slot + 1) * size]


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Processes started inside inherit these cores; if none are given, all."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
