"""The training loop: step, log, evaluate, save; stop cleanly on a signal, on a full disk, on a diverging loss."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moestro import machine
from moestro.config import SETTINGS, Config
from moestro.data.batches import PackState
from moestro.data.corpus import fingerprint_files
from moestro.engine.language_model import LanguageModel
from moestro.errors import ConfigError, MoestroError
from moestro.model.size import measure_size
from moestro.parallel.world import ONE, World
from moestro.routing import stats
from moestro.training import optim
from moestro.training.checkpoint import newest_step, save_checkpoint
from moestro.training.evaluate import pad_token_bytes, score_domains
from moestro.training.fp8_stats import TOKENS, choose_rows, measure_fp8
from moestro.training.metrics import (
    RunLog,
    TensorBoardMirror,
    TrackioMirror,
    describe_gaps,
    latest_evaluation,
    read_evals,
    read_final_evals,
    read_metrics,
)
from moestro.training.ownership import own_directory
from moestro.training.prepare import Log, Session, open_session
from moestro.training.progress import Progress, say
from moestro.training.run_info import RunInfo, read_run_info
from moestro.training.signals import Interrupted, StopRequest, stop_on_signal
from moestro.training.step import StepResult, train_step

MEASURED_STEPS = 20  # under train.minutes, the pace of these (less the first quarter) sets the number of steps
MAX_SKIPPED_IN_A_ROW = 5
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 80


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the run, steps done of planned, the last evaluation, samples, the signal that stopped it.

    `steps_now` of the steps were done by this call; 0 if the run was finished before.
    """

    run: Path
    step: int
    total_steps: int
    evaluation: dict[str, Any] | None
    samples: list[dict[str, str]]
    stopped_by: int | None
    steps_now: int


def train(
    config: Config,
    out: str | Path = "runs/model",
    *,
    resume: bool = False,
    quiet: bool = False,
    world: World = ONE,
) -> Outcome:
    """Train `config` into the run directory `out`. Raises MoestroError for problems the user can fix.

    `resume` goes on with the run in `out`; one that is finished is left as it is unless `config` asks for more steps.
    A start that fails before the first step leaves nothing behind. SIGINT, SIGTERM and SIGHUP save and return; before
    the first step, and the second time, they raise `Interrupted`, a KeyboardInterrupt. Every process of a `world`
    calls this; only the main one writes files and messages.
    """
    run, quiet = Path(out), quiet or not world.is_main
    log = _say_nothing if quiet else say
    own: AbstractContextManager[None] = own_directory(run, has_trained) if world.is_main else nullcontext()
    if resume and not (run / SETTINGS).exists():
        raise ConfigError(f"there is no run in {run} to go on with", hint="start one without --resume")
    with explain_failures(run), stop_on_signal(can_wait=False) as stop, own:
        session = open_session(config, run, resume=resume, log=log, world=world)
        if session.state.step >= session.state.total_steps and read_run_info(run).get("finished"):
            return finished_before(session, log)
        layers = [name for name, _ in session.model.routers()]
        step_log = open_log(session, layers, log) if world.is_main else None
        progress = Progress(session.state.total_steps, layers, quiet=quiet)
        with closing(step_log) if step_log else nullcontext(), progress:
            stop.can_wait = True
            return Loop(session, step_log, progress, stop).run()


def has_trained(run: Path) -> bool:
    """Whether a run has anything worth keeping: a step in its log, or a checkpoint."""
    log = run / "metrics.jsonl"
    return (log.exists() and log.stat().st_size > 0) or newest_step(run) is not None


def finished_before(session: Session, log: Log) -> Outcome:
    """The outcome of resuming a finished run without asking for more."""
    step, run = session.state.step, session.run
    log(f"{run} is finished: {step:,} of {step:,} steps are done. More train.steps would train it further.")
    return Outcome(run, step, step, latest_evaluation(run), [], stopped_by=None, steps_now=0)


def open_log(session: Session, layers: list[str], log: Log) -> RunLog:
    """The log of the run, from the session's step on; says what it lacks."""
    step = session.state.step
    opened = RunLog.open(session.run, layers, session.config.model.num_experts, step)
    if gaps := describe_gaps(read_metrics(session.run), step):
        log(f"metrics.jsonl {gaps}; the run itself is whole, figures and tables are not")
    return opened


@contextmanager
def explain_failures(run: Path) -> Iterator[None]:
    """Turn what the system refuses into a MoestroError that says what is left."""
    try:
        yield
    except OSError as error:
        step = newest_step(run)
        left = "nothing had been saved" if step is None else f"the checkpoint of step {step} is intact"
        raise MoestroError(
            f"{error.filename or run}: {error.strerror or error}; {left}",
            hint=None if step is None else "continue with --resume",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not machine.is_memory_error(error):
            raise
        raise MoestroError(
            "there is not enough memory: lower the sizes of the model, train.batch_size or train.seq_len"
        ) from error


def _say_nothing(text: str) -> None:
    pass


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
        self.evaluation: dict[str, Any] | None = latest_evaluation(session.run)
        self.first_step = session.state.step
        self.last_loss: float | None = None
        self.info: RunInfo | None = None
        self.skipped_in_a_row = 0
        self.step_seconds: list[float] = []
        self.mirror = open_mirror(session) if session.world.is_main else None

    def run(self) -> Outcome:
        """Train until the planned step or a signal, then save, evaluate and sample."""
        session, config = self.session, self.session.config.train
        if session.world.is_main:
            self.info = begin_info(session)
        while session.state.step < session.state.total_steps and not self.is_stopped():
            self.one_step()
            step = session.state.step
            if config.minutes and len(self.step_seconds) == MEASURED_STEPS:
                self.plan_steps()
            at_end = step == session.state.total_steps
            if step % config.checkpoint_every == 0 or at_end:
                self.save()
            if step % config.eval_every == 0 and not at_end and not self.is_stopped():
                self.evaluate()
        finished, is_main = session.state.step == session.state.total_steps, session.world.is_main
        if not finished:  # a signal, which may have come in the middle of an evaluation
            self.save_stopped()
        if finished:
            self.evaluate_end()
        samples = self.sample() if finished and self.step_seconds and is_main else []
        stopped_by = None if finished else self.stop.signal
        self.note(ended="finished" if finished else None if stopped_by is None else signal.Signals(stopped_by).name)
        if self.mirror:
            self.mirror.close()
        state = session.state
        done = state.step - self.first_step
        return Outcome(session.run, state.step, state.total_steps, self.evaluation, samples, stopped_by, done)

    def save_stopped(self) -> None:
        """Save on a signal; before the first step of a run there is nothing to save."""
        if self.session.state.step == 0:
            raise Interrupted(self.stop.signal or signal.SIGTERM)
        self.save()

    def note(self, **figures: Any) -> None:
        """Bring run.json up to date."""
        if self.info is None:
            return
        state, evaluation = self.session.state, self.evaluation or {}
        known = {"loss": self.last_loss} if self.last_loss is not None else {}
        known |= {"bits_per_byte": evaluation["bits_per_byte"]} if evaluation else {}
        self.info.update(to_step=state.step, seconds=round(state.seconds, 1), **known, **figures)

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
        lr = config.train.lr * optim.lr_factor(state.step, state.total_steps, config.train, warm_from=state.warm_from)
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
        self.last_loss = result.main if np.isfinite(result.main) else None
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
        self.note()
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

    def evaluate(self) -> None:
        """A point of the run's curve: bits per byte on the same beginning of each domain's held-out text every time."""
        if self.score(self.session.config.train.eval_tokens, final=False):
            self.measure_fp8()

    def evaluate_end(self) -> None:
        """The last point of the curve, and the final evaluation on all held-out text, unless they are logged."""
        step, run = self.session.state.step, self.session.run
        if all(record["step"] != step for record in read_evals(run)):
            self.evaluate()
        if all(record["step"] != step for record in read_final_evals(run)):
            self.score(None, final=True)

    def score(self, max_tokens: int | None, *, final: bool) -> bool:
        """Evaluate on held-out documents, per domain, with the experts each domain chose; False if there are none."""
        domains = self.session.validation(max_tokens)
        if not domains or self.log is None:
            return False
        scores, loads = score_domains(self.session.model, domains, self.token_bytes)
        state = self.session.state
        scores["evaluated_tokens"] = scores.pop("tokens")
        self.evaluation = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "final": final,
            **scores,
        }
        self.log.evaluation(self.evaluation, loads if loads.shape[1] else None)
        self.progress.evaluation(self.evaluation)
        if self.mirror:
            self.mirror.write(self.evaluation, "final" if final else "eval")
        return True

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


def begin_info(session: Session) -> RunInfo:
    """run.json with this start in it."""
    size = measure_size(session.config.model)
    return RunInfo.begin(
        session.run,
        resumed=session.resumed,
        step=session.state.step,
        parameters={"total": size.total, "active": size.active},
        data={
            "source": session.config.data.source,
            "fingerprint": session.shards.source_fingerprint,
            "files": fingerprint_files(session.config.data.source),
        },
    )
