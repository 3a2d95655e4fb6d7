"""What the progress display shows, on a recorded terminal and on a stream that is none."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from moestro.training import progress
from moestro.training.progress import Progress

RECORD: dict[str, Any] = {
    **{"step": 3, "tokens": 24576, "loss": 3.25, "loss_main": 3.2, "loss_mtp": 3.5, "loss_balance": 1e-4},
    **{"lr": 1e-3, "grad_norm": 0.41, "tokens_per_second": 6420.4, "max_vio": 0.62, "dead_experts": 2},
    **{"seconds": 1.5, "bits_per_byte": 1.532, "mtp_agreement": 0.48, "bias_min": -0.021, "bias_max": 0.018},
    **{"memory_gib": 1.93, "skipped": 1, "max_over_mean": 1.62},
}
SHOWN = (
    "3.2000",
    "1.532",
    "1.62",
    "0.62",
    "-0.021..+0.018",
    "3.5000",
    "48%",
    "6420",
    "1.9 GiB",
    "0.41",
    "1.0e-03",
)
EVALUATION = {
    "step": 3,
    "bits_per_byte": 1.7,
    "domains": {"english": {"bits_per_byte": 1.9}, "python": {"bits_per_byte": 1.5}},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time stands still unless a test moves `clock[0]`: for this module alone, servers of other tests go on running."""
    now = [100.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def terminal(width: int = 100, height: int = 40, **options: Any) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        _environ={"TERM": "xterm"},
        **options,
    )


def last_panel(console: Console) -> str:
    """The text of the last frame drawn, without escape sequences."""
    assert isinstance(console.file, io.StringIO)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return plain[plain.rindex("╭") :]


def run_once(console: Console | None, record: dict[str, Any], loads: Any = None, names: tuple[str, ...] = ()) -> None:
    with Progress(10, names, console=console) as shown:
        shown.step(record, loads)
        shown.evaluation(EVALUATION)


def test_terminal_shows_every_figure() -> None:
    console = terminal()
    run_once(console, RECORD, np.full((1, 4), 8), ("mtp.0",))
    panel = last_panel(console)
    for text in (*SHOWN, "step 3 / 10", "30%", "english 1.900", "python 1.500", "mtp.0"):
        assert text in panel


def test_stream_shows_every_figure_in_plain_ascii_lines(clock: list[float]) -> None:
    console = Console(file=io.StringIO())
    run_once(console, RECORD, np.full((1, 4), 8), ("mtp.0",))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    *meanings, step, evaluation = text.splitlines()
    assert [line.split(":")[0] for line in meanings] == ["loss", "MaxVio", "bias", "agree"]
    for value in (*SHOWN, "step 3/10", "dead 2", "skipped 1"):
        assert value in step
    assert evaluation == "eval step 3  bits/byte 1.700  english 1.900  python 1.500"
    assert text.isascii()
    assert "\r" not in text
    assert "\x1b" not in text


def test_lines_are_spaced_in_time_but_the_last_step_always_shows(clock: list[float]) -> None:
    console = Console(file=io.StringIO())
    with Progress(20, console=console) as shown:
        for step in range(1, 21):
            clock[0] += progress.LINE_SECONDS / 4
            shown.step(RECORD | {"step": step})
    assert isinstance(console.file, io.StringIO)
    steps = [
        int(line.split()[1].split("/")[0]) for line in console.file.getvalue().splitlines() if line.startswith("step")
    ]
    assert steps == [1, 5, 9, 13, 17, 20]


def test_time_left_follows_speed_and_a_changed_total(clock: list[float]) -> None:
    with Progress(100, console=Console(file=io.StringIO())) as shown:
        shown.step(RECORD | {"step": 51})
        assert shown.seconds_left() is None
        clock[0] += 4.0
        shown.step(RECORD | {"step": 53})
        assert shown.seconds_left() == pytest.approx(47 * 2.0)
        shown.set_total(60)
        assert shown.seconds_left() == pytest.approx(7 * 2.0)


def test_strip_draws_the_load_relative_to_the_mean() -> None:
    """Mean 8: a dead expert, a quarter, the mean, one and a half times, twice, and more than fits."""
    loads = np.array([[0, 2, 8, 12, 16, 18, 0, 8]])
    assert loads.mean() == 8
    _, row = progress.draw_loads(loads, ["1"], width=60, rows=5)
    assert row.plain == "1  ×▁▄▆██×▄  2.25x"


def test_strip_of_perfect_balance_is_level() -> None:
    _, row = progress.draw_loads(np.full((1, 6), 7.0), ["1"], width=60, rows=5)
    assert row.plain == "1  ▄▄▄▄▄▄  1.00x"


def test_experts_that_share_a_column_show_the_busiest_and_say_so() -> None:
    loads = np.ones((1, 256))
    loads[0, 201] = 3.0
    title, row = progress.draw_loads(loads, ["1"], width=80, rows=5)
    assert "busiest of 4 a column" in title.plain
    blocks = row.plain.split()[1]
    assert len(blocks) == 64
    assert [place for place, block in enumerate(blocks) if block == "█"] == [201 // 4]


def test_layers_that_do_not_fit_are_counted_and_first_and_last_stay() -> None:
    names = [str(layer) for layer in range(58)]
    title, *rows = progress.draw_loads(np.ones((58, 8)), names, width=80, rows=5)
    assert "5 of 58 layers" in title.plain
    assert [row.plain.split()[0] for row in (rows[0], rows[-1])] == ["0", "57"]
    assert len(rows) == 5


def test_a_layer_without_a_token_is_all_dead() -> None:
    _, row = progress.draw_loads(np.zeros((1, 3)), ["1"], width=60, rows=5)
    assert row.plain.startswith("1  ×××")


@pytest.mark.parametrize(("width", "height"), [(100, 40), (60, 40), (40, 24)])
def test_panel_keeps_within_the_terminal(width: int, height: int) -> None:
    console = terminal(width, height)
    run_once(console, RECORD, np.ones((58, 256)), tuple(str(layer) for layer in range(58)))
    lines = last_panel(console).rstrip("\n").splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_a_dense_model_without_mtp_shows_neither() -> None:
    console = terminal()
    run_once(console, RECORD | {"loss_mtp": 0.0, "mtp_agreement": None})
    for text in ("MTP", "expert", "bias", "MaxVio"):
        assert text not in last_panel(console)


def test_the_final_evaluation_is_named_apart_and_shows_no_change_to_one_on_other_text(clock: list[float]) -> None:
    console, lines = terminal(), Console(file=io.StringIO())
    for target in (console, lines):
        with Progress(10, console=target) as shown:
            shown.step(RECORD)
            for bits, final in ((1.7, False), (1.5, False), (1.9, True)):
                shown.evaluation(EVALUATION | {"bits_per_byte": bits, "final": final})
    assert "final evaluation 1.900 bits/byte at step 3, on all held-out text" in last_panel(console)
    assert "+0.400" not in last_panel(console) and "-0.200" in lines_of(console)
    assert isinstance(lines.file, io.StringIO)
    assert "final eval, all held-out text, step 3  bits/byte 1.900" in lines.file.getvalue()


def lines_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_an_output_that_fails_ends_the_display_only(error: OSError, is_terminal: bool) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise error

    console = progress.make_console(
        file=Broken(), force_terminal=is_terminal, _environ={"TERM": "xterm"}, width=80, height=40
    )
    with Progress(10, console=console) as shown:
        shown.message("hello")
        shown.step(RECORD)
        shown.evaluation(EVALUATION)


def test_a_closed_standard_error_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    run_once(None, RECORD)


def test_sparkline_spans_least_to_largest_and_skips_what_is_not_finite() -> None:
    assert progress.draw_sparkline([0, 1, float("nan"), 2, 3, 4, 5, 6, float("inf"), 7], 8) == "▁▂▃▄▅▆▇█"
    assert progress.draw_sparkline([5.0, 5.0], 8) == "▁▁"
    assert progress.draw_sparkline([float("nan")], 8) == ""
    assert len(progress.draw_sparkline(range(1000), 18)) == 18


def test_a_loss_that_is_not_finite_is_shown_as_it_is() -> None:
    console = terminal()
    run_once(console, RECORD | {"loss_main": float("nan")})
    assert "nan" in last_panel(console)


def test_messages_are_plain_text_above_the_panel() -> None:
    console = terminal()
    with Progress(10, console=console) as shown:
        shown.message("saved [bold] checkpoint")
    assert isinstance(console.file, io.StringIO)
    assert "saved [bold] checkpoint" in console.file.getvalue()
    assert "saved" not in last_panel(console)


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours are SGR 30–37, 90–97 and their background and extended forms; bold (1) may stay."""
    found = {}
    for no_color in (False, True):
        console = terminal(no_color=no_color)
        run_once(console, RECORD, np.ones((1, 4)))
        assert isinstance(console.file, io.StringIO)
        codes = ";".join(re.findall(r"\x1b\[([0-9;]*)m", console.file.getvalue())).split(";")
        found[no_color] = [code for code in codes if code and 30 <= int(code) <= 107]
    assert found[False]
    assert not found[True]


def test_quiet_shows_nothing() -> None:
    console = terminal()
    with Progress(10, quiet=True, console=console) as shown:
        shown.message("hello")
        shown.step(RECORD)
        shown.evaluation(EVALUATION)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue() == ""


def test_the_terminal_is_left_usable_after_an_error() -> None:
    console = terminal()

    def fail() -> None:
        with Progress(10, console=console) as shown:
            shown.step(RECORD)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")


def test_lines_go_to_standard_error_even_when_colour_is_forced() -> None:
    code = (
        "from moestro.training.progress import Progress\n"
        "with Progress(1) as shown:\n"
        "    shown.step({'step': 1, 'loss_main': 2.0})\n"
    )
    environment = {**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == ""
    assert run.stderr.splitlines()[-1] == "step 1/1  loss 2.0000"
