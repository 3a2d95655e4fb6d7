"""Signals that stop work: Ctrl-C, SIGTERM, and SIGHUP when the terminal closes.

Work that can be saved is asked to stop and finishes its step; work that cannot ends at once, and so does everything at
a second signal. A SIGHUP that the caller ignores, as under `nohup`, stays ignored.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """A signal that ends the work at once; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class StopRequest:
    """`signal` is the one that asked to stop, None before. Unless `can_wait`, the first one raises `Interrupted`."""

    def __init__(self, *, can_wait: bool) -> None:
        self.signal: int | None = None
        self.can_wait = can_wait

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        ends = self.signal is not None or not self.can_wait
        self.signal = number
        if ends:
            raise Interrupted(number)


@contextmanager
def stop_on_signal(*, can_wait: bool = True) -> Iterator[StopRequest]:
    """Turn the first of `SIGNALS` into a request inside `with`; the handlers before are restored afterwards."""
    stop = StopRequest(can_wait=can_wait)
    heard = [number for number in SIGNALS if not _is_ignored_hangup(number)]
    try:
        previous = {number: signal.signal(number, stop.receive) for number in heard}
    except ValueError:  # not in the main thread: signals are the caller's business
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _is_ignored_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN
