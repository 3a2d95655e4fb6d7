"""The training loop: step, log, evaluate, save; stop cleanly on a signal, on a full disk, on a diverging loss."""

from __future__ import annotations

import json
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from moestro import machine
from moestro.config import Config
from moestro.data.batches import PackState
from moestro.engine.language_model import LanguageModel
from moestro.errors import MoestroError
from moestro.model.size import measure_size
from moestro.parallel.world import ONE, World
from moestro.routing import stats
from moestro.terminal import printable
from moestro.training import optim
from moestro.training.checkpoint import save_checkpoint
from moestro.training.evaluate import pad_token_bytes, score_domains
from moestro.training.fp8_stats import TOKENS, choose_rows, measure_fp8
from moestro.training.metrics import RunLog, TensorBoardMirror, TrackioMirror, read_evals, write_atomic
from moestro.training.prepare import Session, open_session
from moestro.training.progress import Progress
from moestro.training.step import StepResult, train_step
from moestro.version import __version__

MEASURED_STEPS = 20  # under train.minutes, the pace of these (less the first quarter) sets the number of steps
MAX_SKIPPED_IN_A_ROW = 5
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 80


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the run, steps done of planned, the last evaluation, samples, the signal that stopped it."""

    run: Path
    step: int
    total_steps: int
    evaluation: dict[str, Any] | None
    samples: list[dict[str, str]]
    stopped_by: int | None


def train(
    config: Config,
    out: str | Path = "runs/model",
    *,
    resume: bool = False,
    quiet: bool = False,
    world: World = ONE,
) -> Outcome:
    """Train `config` into the run directory `out`. Raises MoestroError for problems the user can fix.

    Every process of a `world` calls this; only the main one writes files and messages.
    """
    run, quiet = Path(out), quiet or not world.is_main
    try:
        session = open_session(config, run, resume=resume, log=_say_nothing if quiet else _say, world=world)
        layers = [name for name, _ in session.model.routers()]
        log = RunLog.open(run, layers, session.config.model.num_experts, session.state.step) if world.is_main else None
        progress = Progress(session.state.total_steps, layers, quiet=quiet)
        with closing(log) if log else nullcontext(), stop_on_signal() as stop, progress:
            return Loop(session, log, progress, stop).run()
    except OSError as error:
        raise MoestroError(
            f"{error.filename or run}: {error.strerror or error}; what was saved is intact",
            hint="continue with --resume",
        ) from error
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no exception class for this
            raise
        raise MoestroError(
            "there is not enough memory: lower the sizes of the model, train.batch_size or train.seq_len"
        ) from error


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass


class StopRequest:
    """Set by SIGINT or SIGTERM; the loop finishes its step, saves and leaves. A second signal ends at once."""

    signal: int | None = None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request; restores the handlers afterwards."""
    stop = StopRequest()

    def request(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise KeyboardInterrupt
        stop.signal = number

    try:
        previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: signals are the caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Loop:
    """One pass from the session's state to the end of the run."""

    def __init__(self, session: Session, log: RunLog | None, progress: Progress, stop: StopRequest) -> None:
        self.session = session
        self.log = log
        self.progress = progress
        self.stop = stop
        self.started = time.perf_counter() - session.state.seconds
        self.pack = PackState.from_json(session.state.pack)
        self.token_bytes = pad_token_bytes(session.tokenizer.token_bytes, session.config.model.vocab_size)
        self.evaluation: dict[str, Any] | None = next(reversed(read_evals(session.run)), None)
        self.skipped_in_a_row = 0
        self.step_seconds: list[float] = []
        self.mirror = open_mirror(session) if session.world.is_main else None

    def run(self) -> Outcome:
        """Train until the planned step or a signal, then save, evaluate and sample."""
        session, config = self.session, self.session.config.train
        if session.world.is_main:
            write_run_info(session, finished=False)
        while session.state.step < session.state.total_steps and not self.is_stopped():
            self.one_step()
            step = session.state.step
            if config.minutes and len(self.step_seconds) == MEASURED_STEPS:
                self.plan_steps()
            at_end = step == session.state.total_steps
            if step % config.checkpoint_every == 0 or at_end:
                self.save()
            if step % config.eval_every == 0 and not at_end and not self.is_stopped():
                self.evaluate(config.eval_tokens)
        finished, is_main = session.state.step == session.state.total_steps, session.world.is_main
        if not finished:  # a signal, which may have come in the middle of an evaluation
            self.save()
        if finished and (self.evaluation or {}).get("step") != session.state.step:
            self.evaluate(None)
        samples = self.sample() if finished and self.step_seconds and is_main else []
        if is_main:
            write_run_info(session, finished=finished)
        if self.mirror:
            self.mirror.close()
        state = session.state
        stopped_by = None if finished else self.stop.signal
        return Outcome(session.run, state.step, state.total_steps, self.evaluation, samples, stopped_by)

    def is_stopped(self) -> bool:
        """Whether any process was asked to stop."""
        return self.session.world.sum_numbers([self.stop.signal is not None])[0] > 0

    def one_step(self) -> None:
        """Fetch the global batch, train on this process's rows of it, log it, move the state forward."""
        session, state, config = self.session, self.session.state, self.session.config
        begun = time.perf_counter()
        batches, pack = [], self.pack
        for _ in range(config.train.accumulate):
            batch, pack = session.packer.next(pack)
            batches.append(batch)
        tokens, share = sum(batch.inputs.numel() for batch in batches), session.world.share
        lr = config.train.lr * optim.lr_factor(state.step, state.total_steps, config.train)
        result = train_step(
            session.model,
            session.optimizers,
            [batch.rows(share) for batch in batches],
            config.train,
            token_bytes=self.token_bytes,
            lr=lr,
            mtp_weight=optim.mtp_weight(state.step, state.total_steps, config.train),
            bias_speed=optim.bias_speed(
                state.step,
                state.total_steps,
                config.model.router.bias_speed,
                config.train.bias_frozen_fraction,
            ),
            noise_seed=config.train.seed * 1_000_003 + state.step,
            world=session.world,
        )
        self.check_divergence(result)
        now = time.perf_counter()
        self.pack = pack
        session.state = replace(
            state,
            step=state.step + 1,
            tokens=state.tokens + tokens,
            seconds=now - self.started,
            skipped=state.skipped + (not result.applied),
            pack=pack.to_json(),
        )
        self.step_seconds.append(now - begun)
        self.record(result, lr, tokens / (now - begun))

    def check_divergence(self, result: StepResult) -> None:
        """Give up after several non-finite steps in a row; single ones are skipped and counted."""
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise MoestroError(
                f"the loss is not finite {MAX_SKIPPED_IN_A_ROW} steps in a row after step {self.session.state.step}; "
                "lower train.lr and resume from the last checkpoint"
            )

    def record(self, result: StepResult, lr: float, tokens_per_second: float) -> None:
        """Write and show one step."""
        state, loads = self.session.state, result.loads.numpy()
        routers = self.session.model.routers()
        biases = np.stack([router.bias.cpu().numpy() for _, router in routers]) if routers else None
        record = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": result.loss,
            "loss_main": result.main,
            "loss_mtp": result.mtp,
            "loss_balance": result.balance,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_second": tokens_per_second,
            "max_vio": float(stats.max_vio(loads).mean()) if routers else 0.0,
            "dead_experts": int(stats.dead_experts(loads).sum()) if routers else 0,
            "seconds": state.seconds,
            "dropped": result.overflow / max(int(loads.sum()), 1),
            "bits_per_byte": result.nll / np.log(2) / max(result.text_bytes, 1),
            "mtp_agreement": result.agreement,
            "max_over_mean": float(stats.max_over_mean(loads).mean()) if routers else 0.0,
            "bias_min": float(biases.min()) if biases is not None else 0.0,
            "bias_max": float(biases.max()) if biases is not None else 0.0,
            "memory_gib": machine.process_memory_gib(),
            "skipped": state.skipped,
        }
        if self.log is not None:
            self.log.step(record, loads if routers else None, biases)
        self.progress.step(record, loads if routers else None)
        if self.mirror:
            self.mirror.write(record, "train")

    def plan_steps(self) -> None:
        """Lower the number of steps to what `train.minutes` allows, once, from the pace measured so far."""
        session, config = self.session, self.session.config.train
        if session.state.total_steps < config.steps:  # planned before a resume
            return
        tokens_per_step = config.batch_size * config.seq_len * config.accumulate
        step_seconds = float(np.median(self.step_seconds[MEASURED_STEPS // 4 :]))
        # an evaluation is a forward pass, about a third of a step per token
        eval_tokens = config.eval_tokens * len(session.validation(None))
        per_step = step_seconds * (1 + eval_tokens / tokens_per_step / 3 / config.eval_every)
        left = config.minutes * 60 - session.state.seconds
        total = session.world.agree(min(session.state.step + max(int(left / per_step), 1), config.steps))
        session.state = replace(session.state, total_steps=total)
        self.progress.set_total(total)
        self.progress.message(f"{step_seconds:.2f} s a step: {total} steps fill {config.minutes:g} minutes")

    def save(self) -> None:
        """Write a checkpoint; the log reaches the disk first, so that it never lags behind."""
        session = self.session
        if self.log is not None:
            self.log.sync()
        save_checkpoint(
            session.run,
            session.model,
            session.tokenizer,
            session.optimizers,
            session.state,
            keep=session.config.train.keep_checkpoints,
            dtype=session.config.train.save_dtype,
            scale=session.config.fp8.scale,
            world=session.world,
        )

    def evaluate(self, max_tokens: int | None) -> None:
        """Bits per byte on held-out documents, per domain, and the experts each domain chose."""
        domains = self.session.validation(max_tokens)
        if not domains or self.log is None:
            return
        scores, loads = score_domains(self.session.model, domains, self.token_bytes)
        state = self.session.state
        scores["evaluated_tokens"] = scores.pop("tokens")
        self.evaluation = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds} | scores
        self.log.evaluation(self.evaluation, loads if loads.shape[1] else None)
        self.measure_fp8()
        self.progress.evaluation(self.evaluation)
        if self.mirror:
            self.mirror.write(self.evaluation, "eval")

    def measure_fp8(self) -> None:
        """In an FP8 run, what quantisation does to every matrix, on a little held-out text."""
        session, train = self.session, self.session.config.train
        batch = choose_rows(session.validation(TOKENS)) if train.precision == "fp8" else None
        if batch is None or self.log is None:
            return
        state, step_tokens = session.state, train.batch_size * train.seq_len * train.accumulate
        layers = measure_fp8(
            session.model,
            batch,
            mtp_weight=optim.mtp_weight(state.step, state.total_steps, train),
            share=batch.inputs.numel() / step_tokens,
            mask_documents=train.mask_documents,
        )
        self.log.fp8({"step": state.step, "tokens": state.tokens, "layers": layers})

    def sample(self) -> list[dict[str, str]]:
        """Continue the beginning of one held-out document of every domain."""
        session = self.session
        writer = LanguageModel(session.model, session.tokenizer, frozenset([session.tokenizer.eos_id]))
        samples = []
        for domain in session.validation(None):
            start, end = session.shards.offsets(domain, "valid")[:2].tolist()
            longest = min(PROMPT_TOKENS, session.config.model.max_seq_len // 2)
            prompt = session.shards.tokens(domain, "valid")[start : min(end - 1, start + longest)].tolist()
            length = min(SAMPLE_TOKENS, session.config.model.max_seq_len - len(prompt))
            written = writer.generate(prompt, max_tokens=length, temperature=0.7, top_p=0.9, seed=0)
            sample = {"domain": domain, "prompt": session.tokenizer.decode(prompt), "text": written.text}
            if self.log is not None:
                self.log.sample(session.state.step, **sample)
            samples.append(sample)
        return samples


def open_mirror(session: Session) -> TensorBoardMirror | TrackioMirror | None:
    """The tracker named by `train.mirror`."""
    kinds: dict[str, type[TensorBoardMirror] | type[TrackioMirror]] = {
        "tensorboard": TensorBoardMirror,
        "trackio": TrackioMirror,
    }
    kind = kinds.get(session.config.train.mirror)
    return kind(session.run, session.state.step) if kind else None


def write_run_info(session: Session, *, finished: bool) -> None:
    """RUN/run.json: what was run, where, with which versions."""
    size = measure_size(session.config.model)
    info = {
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() - session.state.seconds)),
        "parameters": {"total": size.total, "active": size.active},
        "machine": machine.describe_machine().cpu,
        "versions": {
            "moestro": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "command": " ".join(["moestro", *sys.argv[1:]]),
        "finished": finished,
    }
    write_atomic(session.run / "run.json", json.dumps(info, indent=2).encode())
