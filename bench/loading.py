"""Memory and seconds of loading a model directory (files), of packing it (pack), and of loading that (packed).

    python bench/loading.py                            # Moonlight's layers, two of them, random weights in bf16
    python bench/loading.py --layers 8 --experts 64    # 4.5B parameters
    python bench/loading.py --model DIR --formats int4

Each case is a process of its own, which loads a tiny model first, so that what torch itself needs is there before
anything is counted. Peaks are beyond that: of private memory (RssAnon), of mapped file pages, which the kernel may
drop (RssFile), and of both together (VmHWM); in parts of the packed weights, embeddings and norms included. "all" is
until the model can be asked or is packed, "token" the first one of a prompt of 16, then the mean of the next eight.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

PRESET = ("--preset", "moonlight-16b-a3b", "model.vocab_size=16384", "model.q_lora_rank=1024")
TINY = ("--preset", "demo", "model.num_layers=2")
FIELDS = ("RssAnon", "RssFile", "VmRSS", "VmHWM")


def read_memory() -> dict[str, int]:
    """Bytes of this process, by the kernel's names."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in FIELDS}


class Peaks:
    """The most that the process holds while this is entered, beyond what it held before; read every 2 ms."""

    def __enter__(self) -> Peaks:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.before = self.most = read_memory()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.002):
            now = read_memory()
            self.most = {name: max(self.most[name], now[name]) for name in FIELDS}

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def over(self, name: str) -> int:
        """Bytes beyond those before."""
        return self.most[name] - self.before["VmRSS" if name == "VmHWM" else name]


def measure(directory: str, tiny: str, format: str, out: str) -> None:
    """The worker: load and ask, or, where there is an `out`, pack into it; prints one JSON object."""
    from moestro.engine.engine import Engine
    from moestro.engine.language_model import load, pack
    from moestro.engine.sequence import Request, SamplingParams

    list(load(tiny, weights=format).stream_ids([1, 2], max_tokens=2))
    times: list[float] = []
    start = time.perf_counter()
    with Peaks() as peaks:
        if out:
            packed = pack(Path(directory), Path(out), weights=format).nbytes
        else:
            language_model = load(directory, weights=format)
            packed = sum(tensor.nbytes for tensor in language_model.runtime.tensors.values())
    seconds = time.perf_counter() - start
    if not out:
        engine = Engine(
            language_model.runtime,
            language_model.tokenizer,
            language_model.stop_ids,
            memory_bytes=2**28,
            draft_tokens=0,
        )
        engine.add(Request(list(range(16)), SamplingParams(max_tokens=9)))
        while engine.has_work:
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
    found = {name: peaks.over(name) for name in FIELDS}
    print(json.dumps(found | {"packed": packed, "seconds": seconds, "times": times}))


def run_worker(*arguments: object) -> dict[str, Any]:
    """What a worker prints."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_model(out: Path, *settings: str) -> Path:
    """A directory of random weights."""
    if not out.exists():
        command = [sys.executable, "-m", "moestro", "init", *settings, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def compare(model: Path | None, formats: list[str], settings: list[str]) -> None:
    """Print the table."""
    from moestro.machine import describe_machine

    machine = describe_machine()
    print(f"{machine.cpu}, {machine.threads} threads, torch {machine.torch}")
    print(f"{'weights':<8} {'from':<9} {'packed, GB':>10} {'private':>8} {'mapped':>7} {'both':>6} {'all, s':>8}"
          f" {'token, s':>9} {'next, ms':>9}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="moestro-") as folder:
        tiny = make_model(Path(folder) / "tiny", *TINY)
        model = model or make_model(Path(folder) / "model", *PRESET, *settings)
        for format in formats:
            out = Path(folder) / format
            for name, source, place in (("files", model, ""), ("pack", model, out), ("packed", out, "")):
                found = run_worker(source, tiny, format, place)
                parts = " ".join(
                    f"{found[field] / found['packed']:>{width}.3f}"
                    for field, width in (("RssAnon", 8), ("RssFile", 7), ("VmHWM", 6))
                )
                first, *others = found["times"] or [math.nan]
                following = 1000 * statistics.mean(others or [math.nan])
                print(f"{format:<8} {name:<9} {found['packed'] / 1e9:>10.2f} {parts} {found['seconds']:>8.2f}"
                      f" {first:>9.2f} {following:>9.1f}", flush=True)  # fmt: skip
            shutil.rmtree(out)


def main() -> None:
    """Parse the command line."""
    if sys.argv[1:2] == ["--worker"]:
        measure(*sys.argv[2:6])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory in place of random weights")
    parser.add_argument("--formats", default="bf16,int8,int4,fp32")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=32)
    options = parser.parse_args()
    settings = [f"model.num_layers={options.layers}", f"model.num_experts={options.experts}"]
    compare(options.model, options.formats.split(","), settings)


if __name__ == "__main__":
    main()
