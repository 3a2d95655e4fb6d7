"""What a training run shows while it runs: a live panel on a terminal, plain lines everywhere else.

The panel's strip draws every MoE layer as one row and every expert as one block, as high as its load relative
to the mean: a level row of half-height blocks is perfect balance, a red mark is an expert without a token.
Loads are those of the latest step, not smoothed, so some flicker is real.

Everything goes to standard error; standard output stays free for results. The panel is drawn when a step
arrives, at most four times a second and without a thread of its own, so it never takes a core from the
training. Lines are ASCII, without carriage returns, and come at most every `LINE_SECONDS`. NO_COLOR is respected.
A terminal that has closed, or a reader that is gone, ends the display and not the training.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moestro.terminal import printable_lines

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

Record = Mapping[str, Any]

BLOCKS = "▁▂▃▄▅▆▇█"
DEAD = "×"
LINE_SECONDS = 5.0
FRAME_SECONDS = 0.25
SPEED_WINDOW = 50
PANEL_WIDTH = 96
SPARK_WIDTH = 18
TWO_COLUMNS = 76  # narrower than this, figures stand below each other
OTHER_LINES = 12  # besides figures and load rows: frame, bar, headings, validation, prompt

# (key of the record, label in the panel, label in a line, format), in reading order. "bias" joins two keys.
FIELDS = (
    ("loss_main", "loss", "loss", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "bits/byte", "{:.3f}"),
    ("max_over_mean", "load max/mean", "load", "{:.2f}"),
    ("max_vio", "MaxVio", "MaxVio", "{:.2f}"),
    ("dead_experts", "dead experts", "dead", "{:.0f}"),
    ("bias", "bias range", "bias", "{}"),
    ("loss_mtp", "MTP loss", "mtp", "{:.4f}"),
    ("mtp_agreement", "MTP agreement", "agree", "{:.0%}"),
    ("tokens_per_second", "tokens/s", "tok/s", "{:.0f}"),
    ("memory_gib", "memory", "mem", "{:.1f} GiB"),
    ("grad_norm", "grad norm", "grad", "{:.2f}"),
    ("lr", "learning rate", "lr", "{:.1e}"),
    ("skipped", "skipped steps", "skipped", "{:.0f}"),
)
# what the figures mean, by key of the record; shown once, or below the panel's figures
MEANINGS = {
    "loss_main": "loss: nats per token of this step's text, next token only; lower is better",
    "max_vio": "MaxVio: how far the busiest expert lies above its layer's mean load; 0 is even, 1 is twice the mean",
    "bias": "bias: the range of what the bias rule adds to experts' scores to even out their loads",
    "mtp_agreement": "agree: how often MTP's guess, one token ahead, is the main model's own first choice",
}
LABEL_WIDTH = max(len(label) for _, label, _, _ in FIELDS)
ROUTING_KEYS = frozenset({"max_over_mean", "max_vio", "dead_experts", "bias_min", "bias_max"})
ALARMING = {"dead_experts": "red", "skipped": "yellow"}


class Progress:
    """Shows the steps of one run; a context manager. `quiet` shows nothing at all.

    `layer_names` names the rows of the loads, in their order; without it the model is dense, and no routing
    is shown. `console` replaces standard error; whether it is a terminal decides between panel and lines.
    """

    def __init__(
        self,
        total_steps: int,
        layer_names: Sequence[str] = (),
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        self._total = total_steps
        self._layers = list(layer_names)
        self._quiet = quiet
        self._console = console
        self._live: Live | None = None
        self._record: Record = {}
        self._loads: NDArray[np.float64] | None = None
        self._losses: list[float] = []
        self._evaluations: list[Record] = []
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=SPEED_WINDOW)
        self._shown_at = -math.inf
        self._explained = False

    def __enter__(self) -> Self:
        if self._quiet:
            return self
        console = self._console or _terminal()
        if console is not None and console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            self._console = console
            self._live = Live(self._panel(console), console=console, auto_refresh=False)
            self._try(self._live.start)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the terminal, whatever ended the run."""
        if self._live is not None:
            self._draw(force=True)
            with suppress(OSError):
                self._live.stop()
            self._live = None

    def _try(self, show: Callable[[], None]) -> None:
        """Show something; nothing more once the terminal is gone."""
        try:
            show()
        except OSError:
            self._quiet = True

    def set_total(self, total_steps: int) -> None:
        """Change the length of the run, as `train.minutes` does once the speed is known."""
        self._total = total_steps

    def message(self, text: str) -> None:
        """Show one line of text above the panel."""
        if self._quiet:
            return
        live = self._live
        if live is not None:
            self._try(lambda: live.console.print(text, markup=False, highlight=False))
        else:
            self._print(text)

    def step(self, record: Record, loads: ArrayLike | None = None) -> None:
        """Show one training step. Keys that are absent or None are left out; `loads` are counts [L, E]."""
        if self._quiet:
            return
        now = time.monotonic()
        self._record = record = record if self._layers else _without_routing(record)
        self._loads = None if loads is None else np.asarray(loads, np.float64)
        self._losses.append(float(record["loss_main"]))
        self._arrivals.append((int(record["step"]), now))
        if self._live is not None:
            self._draw(force=record["step"] >= self._total)
        elif now - self._shown_at >= LINE_SECONDS or record["step"] >= self._total:
            self._shown_at = now
            if not self._explained:
                self._explained = True
                self._print("\n".join(explain(record)))
            self._print(format_step(record, self._total, self.seconds_left()))

    def evaluation(self, record: Record) -> None:
        """Show one validation: `step`, `bits_per_byte`, and `domains` of `{name: {"bits_per_byte": …}}`."""
        if self._quiet:
            return
        last = [] if record.get("final") else self._evaluations[-1:]  # on other text: no change to show
        self._evaluations = [*last, record]
        if self._live is not None:
            self._draw(force=True)
        else:
            self._print(format_evaluation(record))

    def seconds_left(self) -> float | None:
        """Estimated from the last `SPEED_WINDOW` steps, pauses for evaluation included; None at first."""
        if len(self._arrivals) < 2:
            return None
        (first, start), (last, end) = self._arrivals[0], self._arrivals[-1]
        return max(0, self._total - last) * (end - start) / max(1, last - first)

    def _print(self, text: str) -> None:
        say(text, self._console.file if self._console is not None else sys.stderr)

    def _draw(self, force: bool = False) -> None:
        now = time.monotonic()
        if self._live is None or (not force and now - self._shown_at < FRAME_SECONDS):
            return
        self._shown_at = now
        live = self._live
        self._try(lambda: live.update(self._panel(live.console), refresh=True))

    def _panel(self, console: Console) -> Panel:
        from rich import box
        from rich.panel import Panel
        from rich.text import Text

        width = min(console.width, PANEL_WIDTH)
        step = int(self._record.get("step", 0))
        return Panel(
            self._body(width - 4, console.height),
            box=box.ROUNDED,
            border_style="bright_black",
            title=Text("moestro", "bold"),
            title_align="left",
            subtitle=Text(f"step {step} / {self._total}", "bright_black"),
            subtitle_align="right",
            width=width,
            padding=(0, 1),
        )

    def _body(self, width: int, height: int) -> Group:
        from rich.console import Group
        from rich.text import Text

        if not self._record:
            return Group(Text("waiting for the first step", "bright_black"))
        figures = self._figures(width)
        parts: list[RenderableType] = [self._bar(width), Text(), figures]
        if self._loads is not None and self._loads.size:
            rows = max(1, height - OTHER_LINES - figures.row_count)
            parts += [Text(), *draw_loads(self._loads, self._layers, width, rows)]
        if self._evaluations:
            parts += [Text(), *draw_evaluation(self._evaluations, width)]
        notes = explain(self._record)
        if len(self._layers) + figures.row_count + OTHER_LINES + len(notes) <= height:
            parts += [Text(), *(Text(note, "bright_black", no_wrap=True, overflow="ellipsis") for note in notes)]
        return Group(*parts)

    def _bar(self, width: int) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        step, left = int(self._record["step"]), self.seconds_left()
        share = min(1.0, step / max(1, self._total))
        tail = f" {share:4.0%}  {format_duration(left) + ' left' if left else ''}"
        grid = Table.grid(expand=False)
        bar = ProgressBar(
            self._total,
            step,
            width=max(8, width - len(tail)),
            complete_style="cyan",
            finished_style="cyan",
            style="bright_black",
        )
        grid.add_row(bar, Text(tail))
        return grid

    def _figures(self, width: int) -> Table:
        from rich.table import Table
        from rich.text import Text

        cells = []
        for key, label, _, value in _figures(self._record):
            style = ALARMING.get(key, "") if self._record.get(key) else ""
            cell = Text.assemble((f"{label:<{LABEL_WIDTH}}  ", "bright_black"), (value, style or "bold"))
            if key == "loss_main":
                cell.append("  " + draw_sparkline(self._losses, SPARK_WIDTH), "cyan")
            cells.append(cell)
        columns = 2 if width >= TWO_COLUMNS else 1
        grid = Table.grid(padding=(0, 2), expand=True)
        for _ in range(columns):
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for start in range(0, len(cells), columns):
            grid.add_row(*cells[start : start + columns])
        return grid


def draw_loads(loads: NDArray[np.float64], names: Sequence[str], width: int, rows: int) -> list[Text]:
    """One row of blocks a layer, from loads [L, E]; says if experts share a column or layers are left out."""
    from rich.text import Text

    num_layers, num_experts = loads.shape
    labels = [str(name) for name in names] or [str(layer) for layer in range(num_layers)]
    margin = max(map(len, labels)) + 2
    per_column = math.ceil(num_experts / max(1, width - margin - 7))
    shown = np.unique(np.linspace(0, num_layers - 1, min(rows, num_layers)).round().astype(int))
    title = "expert load, relative to the mean of the layer"
    title += f"; the busiest of {per_column} a column" if per_column > 1 else ""
    title += f"; {len(shown)} of {num_layers} layers" if len(shown) < num_layers else ""
    lines = [Text(title, "bright_black", no_wrap=True, overflow="ellipsis")]
    for layer in shown:
        ratio = loads[layer] / max(loads[layer].mean(), 1e-9)
        columns = [ratio[start : start + per_column].max() for start in range(0, num_experts, per_column)]
        line = Text(f"{labels[layer]:>{margin - 2}}  ", "bright_black", no_wrap=True)
        for value in columns:
            line.append(*_block(float(value)))
        line.append(f"  {ratio.max():.2f}x", "bright_black")
        lines.append(line)
    return lines


def draw_evaluation(evaluations: Sequence[Record], width: int) -> list[Text]:
    """The last validation: overall, its change since the one before, and lines of domains."""
    from rich.text import Text

    record = evaluations[-1]
    name = "final evaluation " if record.get("final") else "validation "
    head = Text.assemble((name, "bright_black"), (f"{record['bits_per_byte']:.3f}", "bold"))
    text = ", on all held-out text" if record.get("final") else ""
    head.append(f" bits/byte at step {record['step']}{text}", "bright_black")
    if len(evaluations) > 1:
        change = record["bits_per_byte"] - evaluations[-2]["bits_per_byte"]
        head.append(f"  {change:+.3f}", "green" if change < 0 else "yellow")
    lines = [head]
    for name, value in _domain_bits(record):
        item = Text.assemble((f"{name} ", "bright_black"), f"{value:.3f}")
        if lines[-1] is head or len(lines[-1]) + 3 + len(item) > width:
            lines.append(item)
        else:
            lines[-1].append("   ").append_text(item)
    return lines


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """The finite values, averaged into at most `width` blocks between their least and largest."""
    finite = np.asarray([value for value in values if math.isfinite(value)])
    if not finite.size:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, finite.size))])
    span = float(np.ptp(means)) or 1.0
    return "".join(BLOCKS[round((value - means.min()) / span * 7)] for value in means)


def format_step(record: Record, total: int, seconds_left: float | None) -> str:
    """One plain line of a training step."""
    head = f"step {record['step']}/{total}"
    fields = [f"{label} {value}" for _, _, label, value in _figures(record)]
    eta = [] if seconds_left is None else [f"eta {format_duration(seconds_left)}"]
    return "  ".join([head, *fields, *eta])


def format_evaluation(record: Record) -> str:
    """One plain line of a validation."""
    name = "final eval, all held-out text," if record.get("final") else "eval"
    head = f"{name} step {record['step']}  bits/byte {record['bits_per_byte']:.3f}"
    return "  ".join([head, *(f"{name} {value:.3f}" for name, value in _domain_bits(record))])


def explain(record: Record) -> list[str]:
    """What the figures of this record mean, a line each."""
    shown = {key for key, *_ in _figures(record)}
    return [meaning for key, meaning in MEANINGS.items() if key in shown]


def say(text: str, stream: TextIO | Any = None) -> None:
    """Print a line on standard error, or on `stream`; a closed one or a reader that is gone does not matter."""
    target = sys.stderr if stream is None else stream
    if target is not None:
        with suppress(OSError, ValueError):  # ValueError: closed within this process
            print(printable_lines(text), file=target, flush=True)


def format_duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(record: Record) -> list[tuple[str, str, str, str]]:
    """(key, panel label, line label, value) of the figures in the record; a loss_mtp of 0 means no MTP."""
    known = {key: value for key, value in record.items() if value is not None}
    if not known.get("loss_mtp"):
        known.pop("loss_mtp", None)
    if "bias_min" in known and "bias_max" in known:
        known["bias"] = f"{known['bias_min']:+.3f}..{known['bias_max']:+.3f}"
    return [
        (key, panel_label, line_label, form.format(known[key]))
        for key, panel_label, line_label, form in FIELDS
        if key in known
    ]


def _without_routing(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in ROUTING_KEYS}


def _domain_bits(record: Record) -> list[tuple[str, float]]:
    return [(name, domain["bits_per_byte"]) for name, domain in record.get("domains", {}).items()]


def _block(ratio: float) -> tuple[str, str]:
    """Block and colour of an expert with `ratio` times the mean load: half high at 1, full from 2 on."""
    if ratio == 0:
        return DEAD, "bold red"
    colours = ((0.5, "blue"), (1.5, "cyan"), (2.0, "yellow"))
    colour = next((name for limit, name in colours if ratio < limit), "red")
    return BLOCKS[min(7, max(0, round(ratio * 4) - 1))], colour


def _terminal() -> Console | None:
    """A console on standard error if that is a terminal that can show blocks."""
    if sys.stderr is None or not sys.stderr.isatty() or "utf" not in (sys.stderr.encoding or "").lower():
        return None
    return make_console(stderr=True)


def make_console(**options: Any) -> Console:
    """A console that passes on a broken pipe; rich's own ends the process."""
    from rich.console import Console

    class Terminal(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError(errno.EPIPE, "the reader is gone")

    return Terminal(**options)
