"""The log of a run: what a run directory records about the training, step by step.

    metrics.jsonl        one object a step: `STEP_KEYS` and what else the loop passes
    evals.jsonl          {step, tokens, seconds, final, loss, bits_per_byte, domains: {name: {...}}}
    samples.jsonl        {step, domain, prompt, text}
    fp8.jsonl            {step, tokens, layers: {block: {matrix: {kind: {...}}}}} per evaluation; only in FP8 runs
    routing.json         {version, layers: ["3", ..., "mtp.0"], num_experts}; absent in a dense model
    routing.bin          little-endian records: step int64, loads uint32[L, E], biases float32[L, E]
    domain_loads/        step-%08d.npy, uint64[D, L, E] per evaluation, and the domain names in domains.json

Files are appended to or replaced whole, so a killed process loses at most the record it was writing: readers
ignore an incomplete last record, `RunLog.open` cuts it. A JSON line without its newline does not count.
Resuming from step S cuts every file to the records with step <= S. Records reach the operating system at once
and the disk on `sync()`, which belongs before a checkpoint. NaN and infinity are written as null.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro import machine
from moestro.errors import ConfigError, MoestroError

STEP_KEYS = (
    *("step", "tokens", "loss", "loss_main", "loss_mtp", "loss_balance", "lr", "grad_norm"),
    *("tokens_per_second", "max_vio", "dead_experts", "seconds"),
)
ROUTING_VERSION = 1

Record = dict[str, Any]


class RunLog:
    """Writes the log of one run. Make one with `RunLog.open`; every method appends and flushes.

    An `OSError` (disk full) passes through, after the partial record has been removed.
    """

    def __init__(self, run: Path, layers: Sequence[str], num_experts: int) -> None:
        """Only opens the files; use `RunLog.open`, which first cuts them."""
        self._run = run
        self._dtype = routing_dtype(len(layers), num_experts) if layers else None
        self._metrics = _open_append(run / "metrics.jsonl")
        self._evals = _open_append(run / "evals.jsonl")
        self._samples = _open_append(run / "samples.jsonl")
        self._routing = _open_append(run / "routing.bin") if layers else None
        self._fp8: io.FileIO | None = None  # most runs have none

    @classmethod
    def open(cls, run: Path, layers: Sequence[str], num_experts: int, resume_step: int | None = None) -> Self:
        """Start a fresh log (`resume_step` None or 0: older files are emptied), or go on after that step.

        `layers` names the blocks with a router, in the order of the loads; empty for a dense model. Raises
        `MoestroError` for a damaged file and for a routing log of another model.
        """
        last = resume_step or 0
        run.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "evals.jsonl", "samples.jsonl", "fp8.jsonl"):
            _cut_lines(run / name, last)
        _cut_routing(run, list(layers), num_experts, last)
        _cut_domain_loads(run / "domain_loads", last)
        return cls(run, layers, num_experts)

    def step(self, record: Mapping[str, Any], loads: ArrayLike | None, biases: ArrayLike | None) -> None:
        """Append one training step; `loads` and `biases` are [L, E], or None where no router ran."""
        missing = [key for key in STEP_KEYS if key not in record]
        if missing:
            raise ValueError(f"step record lacks {', '.join(missing)}")
        if self._routing is not None and self._dtype is not None and loads is not None and biases is not None:
            entry = np.zeros((), self._dtype)
            entry["step"] = record["step"]
            for field, values in (("loads", loads), ("biases", biases)):
                entry[field] = _of_shape(values, self._dtype[field].shape, field)
            _append(self._routing, entry.tobytes())
        _append_line(self._metrics, {key: record[key] for key in STEP_KEYS} | dict(record))

    def evaluation(self, record: Mapping[str, Any], domain_loads: ArrayLike | None) -> None:
        """Append one evaluation; `domain_loads` is [D, L, E] in the order of `record["domains"]`."""
        if self._dtype is not None and domain_loads is not None:
            names = list(record["domains"])
            loads = _of_shape(domain_loads, (len(names), *self._dtype["loads"].shape), "domain_loads")
            self._write_domain_loads(int(record["step"]), names, loads)
        _append_line(self._evals, record)

    def sample(self, step: int, domain: str, prompt: str, text: str) -> None:
        """Append one generated text."""
        _append_line(self._samples, {"step": step, "domain": domain, "prompt": prompt, "text": text})

    def fp8(self, record: Mapping[str, Any]) -> None:
        """Append what `fp8_stats` measured at an evaluation."""
        if self._fp8 is None:
            self._fp8 = _open_append(self._run / "fp8.jsonl")
        _append_line(self._fp8, record)

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        for file in self._files():
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; the log cannot be written to afterwards."""
        for file in self._files():
            file.close()

    def _files(self) -> list[io.FileIO]:
        files = (self._metrics, self._evals, self._samples, self._routing, self._fp8)
        return [file for file in files if file is not None]

    def _write_domain_loads(self, step: int, names: list[str], loads: NDArray[Any]) -> None:
        folder = self._run / "domain_loads"
        folder.mkdir(exist_ok=True)
        index = folder / "domains.json"
        if not index.exists():
            write_atomic(index, _to_json(names))
        elif (known := _read_json(index)) != names:
            raise MoestroError(f"{index} lists {known}, this evaluation has {names}", hint="use another --out")
        buffer = io.BytesIO()
        np.save(buffer, loads.astype("<u8"), allow_pickle=False)
        write_atomic(folder / f"step-{step:08d}.npy", buffer.getvalue())


def read_metrics(run: Path) -> list[Record]:
    """Every step of `metrics.jsonl`; empty without the file. Raises `MoestroError` at a damaged line."""
    return [record for record, _ in _lines(run / "metrics.jsonl")]


def read_evals(run: Path) -> list[Record]:
    """The evaluations that make the run's curve, all on the same text, oldest first."""
    return [record for record, _ in _lines(run / "evals.jsonl") if not record.get("final")]


def read_final_evals(run: Path) -> list[Record]:
    """The evaluations on all held-out text: one, and another each time a finished run was trained further."""
    return [record for record, _ in _lines(run / "evals.jsonl") if record.get("final")]


def latest_evaluation(run: Path) -> Record | None:
    """The last evaluation of either kind; None before the first."""
    return max([*read_evals(run), *read_final_evals(run)], key=lambda record: record["step"], default=None)


def describe_gaps(records: Sequence[Record], step: int) -> str | None:
    """What a log of `step` steps lacks or repeats, as "lacks 12 of 40 steps, the first of them 7"; None if whole."""
    counts = Counter(record["step"] for record in records)
    missing = [number for number in range(1, step + 1) if number not in counts]
    repeated = [number for number, count in counts.items() if count > 1]
    faults = [
        f"{verb} {len(steps):,} of {step:,} steps, the first of them {steps[0]:,}"
        for verb, steps in (("lacks", missing), ("repeats", repeated))
        if steps
    ]
    return " and ".join(faults) or None


def read_samples(run: Path) -> list[Record]:
    """Every generated text, oldest first."""
    return [record for record, _ in _lines(run / "samples.jsonl")]


def read_fp8(run: Path) -> list[Record]:
    """What FP8 did to the model at every evaluation, oldest first; empty for a run in another precision."""
    return [record for record, _ in _lines(run / "fp8.jsonl")]


def read_routing_layers(run: Path) -> list[str]:
    """Names of the layers with a router, in the order of the loads; empty for a dense model."""
    layers, _ = _routing_layout(run)
    return layers


def read_routing(run: Path) -> NDArray[np.void]:
    """Records with the fields `step`, `loads` [L, E] and `biases` [L, E], mapped from the file, not read.

    Empty (with L = E = 0) for a dense model or before the first step.
    """
    layers, num_experts = _routing_layout(run)
    dtype = routing_dtype(len(layers), num_experts)
    path = run / "routing.bin"
    count = path.stat().st_size // dtype.itemsize if layers and path.exists() else 0
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def read_domain_loads(run: Path) -> tuple[list[str], dict[int, NDArray[np.uint64]]]:
    """Domain names, and [D, L, E] loads by step, ascending; `([], {})` before the first evaluation."""
    folder = run / "domain_loads"
    if not (folder / "domains.json").exists():
        return [], {}
    loads = {step: _read_array(path) for step, path in _step_arrays(folder)}
    return _read_json(folder / "domains.json"), loads


def routing_dtype(num_layers: int, num_experts: int) -> np.dtype[np.void]:
    """The record of `routing.bin`."""
    shape = (num_layers, num_experts)
    return np.dtype([("step", "<i8"), ("loads", "<u4", shape), ("biases", "<f4", shape)])


def write_atomic(path: Path, data: bytes) -> None:
    """Write a whole file so that a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class TensorBoardMirror:
    """Copies records to TensorBoard event files in RUN/tensorboard (optional extra `tensorboard`)."""

    def __init__(self, run: Path, resume_step: int | None = None) -> None:
        """Raises `ConfigError` when the extra is not installed."""
        writer = _import_extra("torch.utils.tensorboard", "tensorboard")
        purge = resume_step + 1 if resume_step else None
        self._writer: Any = writer.SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=purge)

    def write(self, record: Mapping[str, Any], prefix: str) -> None:
        """Write the numbers of a step (`prefix="train"`) or an evaluation (`prefix="eval"`)."""
        for name, value in scalars(record, prefix).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class TrackioMirror:
    """Copies records to the local trackio database (optional extra `trackio`) under the run's folder name."""

    def __init__(self, run: Path, resume_step: int | None = None) -> None:
        """Raises `ConfigError` when the extra is not installed."""
        self._trackio: Any = _import_extra("trackio", "trackio")
        resume = "allow" if resume_step else "never"
        self._trackio.init(project="moestro", name=run.resolve().name, resume=resume)

    def write(self, record: Mapping[str, Any], prefix: str) -> None:
        """Write the numbers of a step (`prefix="train"`) or an evaluation (`prefix="eval"`)."""
        self._trackio.log(scalars(record, prefix), step=record["step"])

    def close(self) -> None:
        """Mark the trackio run as finished."""
        self._trackio.finish()


def scalars(record: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """The finite numbers of a record as `prefix/key`, nested as `prefix/key/key`; without the step."""
    result: dict[str, float] = {}
    for key, value in record.items():
        name = f"{prefix}/{key}"
        if isinstance(value, Mapping):
            result.update(scalars(value, name))
        elif key != "step" and isinstance(value, (int, float, np.number)) and math.isfinite(value):
            result[name] = float(value)
    return result


def _import_extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{extra} is missing: {machine.how_to_install(extra)}") from error


def _open_append(path: Path) -> io.FileIO:
    return io.FileIO(path, "a")


def _append(file: io.FileIO, data: bytes) -> None:
    """Writes all of `data` or nothing: what a full disk let through is cut off again."""
    start = file.seek(0, os.SEEK_END)
    view = memoryview(data)
    try:
        while view:
            view = view[file.write(view) or 0 :]
    except OSError:
        file.truncate(start)
        raise


def _append_line(file: io.FileIO, record: Mapping[str, Any]) -> None:
    _append(file, _to_json(record) + b"\n")


def _to_json(value: Any) -> bytes:
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "backslashreplace")  # a lone surrogate becomes its escape, which is JSON


def _finite(value: Any) -> Any:
    """A copy that JSON can hold: NaN and infinity as None, numpy scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[tuple[Record, int]]:
    """(record, offset of its end) of every complete line."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield _parse_line(path, number, line), end


def _parse_line(path: Path, number: int, line: bytes) -> Record:
    try:
        record: Record = json.loads(line)
        if isinstance(record["step"], int):
            return record
    except (ValueError, TypeError, KeyError):
        pass
    raise MoestroError(f"{path}, line {number} is damaged (no object with a step); remove it to go on")


def _cut_lines(path: Path, last: int) -> None:
    if not path.exists():
        return
    keep = 0
    if last:
        for record, end in _lines(path):
            if record["step"] > last:
                break
            keep = end
    os.truncate(path, keep)


def _cut_routing(run: Path, layers: list[str], num_experts: int, last: int) -> None:
    data, index = run / "routing.bin", run / "routing.json"
    layout = {"version": ROUTING_VERSION, "layers": layers, "num_experts": num_experts}
    if last and index.exists():
        if _read_json(index) != layout:
            raise MoestroError(f"{index} belongs to a model with other layers or experts", hint="use another --out")
        records = read_routing(run)
        keep = int(np.searchsorted(records["step"], last, side="right")) * records.itemsize
        del records  # unmap before the file shrinks
        if data.exists():
            os.truncate(data, keep)
        return
    data.unlink(missing_ok=True)
    index.unlink(missing_ok=True)
    if layers:
        write_atomic(index, _to_json(layout))


def _cut_domain_loads(folder: Path, last: int) -> None:
    for step, path in _step_arrays(folder):
        if step > last:
            path.unlink()
    if not last:
        (folder / "domains.json").unlink(missing_ok=True)
    for path in folder.glob(".*.tmp"):
        path.unlink()


def _step_arrays(folder: Path) -> list[tuple[int, Path]]:
    found = ((path.stem.removeprefix("step-"), path) for path in folder.glob("step-*.npy"))
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def _routing_layout(run: Path) -> tuple[list[str], int]:
    path = run / "routing.json"
    if not path.exists():
        return [], 0
    layout = _read_json(path)
    if not isinstance(layout, dict) or layout.get("version") != ROUTING_VERSION:
        raise MoestroError(f"{path} is not a routing log of version {ROUTING_VERSION}")
    return list(layout["layers"]), int(layout["num_experts"])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise MoestroError(f"{path} is damaged: {error}") from error


def _read_array(path: Path) -> NDArray[np.uint64]:
    try:
        array: NDArray[np.uint64] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise MoestroError(f"{path} is damaged: {error}; remove it to go on") from error
    return array


def _of_shape(values: ArrayLike, shape: tuple[int, ...], name: str) -> NDArray[Any]:
    array = np.asarray(values)
    if array.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(array.shape)}")
    return array
