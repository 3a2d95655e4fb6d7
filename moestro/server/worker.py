"""The engine's thread, and how the event loop talks to it. No HTTP.

The engine belongs to one thread, which steps while there is work. The event loop sends it functions to call between
two steps (add, abort, read counters) and gets events back through one asyncio queue for each stream.

When a step raises, no output is lost and as few requests as possible fail. All running requests leave the engine and
come back one at a time. A request's tokens depend on that request alone, so one that comes back recomputes what it had,
and its stream goes on where it was. If the engine raises again, the request that came back last fails. New requests
wait until all have come back, so that none is blamed for another's failure.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from moestro.engine.engine import Engine
from moestro.engine.events import Event
from moestro.engine.scheduler import QueueFullError
from moestro.engine.sequence import Request
from moestro.engine.stats import EngineStats
from moestro.errors import MoestroError

T = TypeVar("T")
Item = list[tuple[int, Event]] | Exception
MAX_RETURNS = 8  # how often a request may come back from failures that nobody could be blamed for

log = logging.getLogger("moestro.server")


class EngineError(Exception):
    """The engine raised on a request; the cause is in the log."""


class ClosedError(Exception):
    """The server takes no more requests."""


class Stream:
    """The events of some requests, numbered by choice: first those of the first request, then of the second, …

    Iterating gives the new (choice, event) pairs of a step. It ends with the last continuation, and raises EngineError
    or ClosedError if there is nothing to wait for. `close` drops what is left of the requests.
    """

    def __init__(self, worker: EngineWorker, num_choices: int) -> None:
        self.num_choices = self._left = num_choices
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Item] = asyncio.Queue()
        self.jobs: list[Job] = []

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Event]]]:
        while self._left:
            item = await self._queue.get()
            if isinstance(item, Exception):
                raise item
            self._left -= sum(event.finish_reason is not None for _, event in item)
            yield item

    def put(self, item: Item) -> None:
        """Add an item, from the engine's thread; if the event loop has closed, nobody is waiting."""
        with suppress(RuntimeError):  # what a closed loop raises, and it may close at any moment
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    def close(self) -> None:
        """Give the room back and drop what still runs before the next step. May be called again."""
        self._worker.release(self)


@dataclass(eq=False)
class Job:
    """One request under way: the number of its first choice, and the ids delivered so far for each continuation."""

    request: Request
    first_choice: int
    stream: Stream
    delivered: list[list[int | None]] = field(init=False)
    seen: list[int] = field(init=False)  # events of each continuation since it entered the engine
    num_ended: int = 0
    num_returns: int = 0  # since somebody was last blamed for a failure

    def __post_init__(self) -> None:
        self.delivered = [[] for _ in range(self.request.params.n)]
        self.restart()

    def restart(self) -> None:
        """Forget how far the engine got, but not what was delivered."""
        self.seen = [0] * self.request.params.n
        self.num_ended = 0

    def is_new(self, event: Event) -> bool:
        """Count an event; True if its token is new. EngineError if a different token was delivered in its place."""
        known, place = self.delivered[event.index], self.seen[event.index]
        self.seen[event.index] += 1
        self.num_ended += event.finish_reason is not None
        if place == len(known):
            known.append(event.token)
            return True
        if known[place] != event.token:
            raise EngineError("the engine failed, and the request could not be taken up again")
        return False

    @property
    def has_ended(self) -> bool:
        """Whether all of its continuations have ended."""
        return self.num_ended == self.request.params.n


class Command:
    """A function for the engine's thread to call, and a future for what it returns or raises."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def carry_out(self) -> None:
        """Call the function, unless nobody is waiting for it any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self._function())
        except Exception as error:
            self.future.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """Raise an error in whoever waits for the result."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class EngineWorker:
    """Owns an engine and its thread. `make_engine` is called once, and again if an engine cannot be emptied.

    The methods are for one event loop; those with an underscore run in the engine's thread.
    """

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        self._make_engine = make_engine
        self.engine = make_engine()
        self.capacity = self.engine.capacity
        self.num_choices = 0  # of all open streams
        self.is_closed = False
        self._streams: set[Stream] = set()
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._has_ended = False  # the thread no longer reads the inbox
        self._jobs: dict[int, Job] = {}  # jobs in the engine, by their ids there
        self._returning: deque[Job] = deque()  # jobs taken out after a failure
        self._trial: Job | None = None  # the one that has come back and not yet got past its old place
        self._new: deque[Job] = deque()  # jobs that came meanwhile
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def check_room(self, num_choices: int) -> None:
        """Raise ClosedError or QueueFullError if a stream of so many continuations would be refused."""
        if self.is_closed or not self.is_alive:
            raise ClosedError("the server is shutting down")
        if self.num_choices + num_choices > self.capacity:
            raise QueueFullError(f"{self.num_choices} continuations run or wait already, of at most {self.capacity}")

    async def open(self, requests: Sequence[Request]) -> Stream:
        """Queue requests together. ConfigError if one can never run, QueueFullError, ClosedError."""
        num_choices = sum(request.params.n for request in requests)
        self.check_room(num_choices)
        stream = Stream(self, num_choices)
        first = 0
        for request in requests:
            stream.jobs.append(Job(request, first, stream))
            first += request.params.n
        self.num_choices += num_choices
        self._streams.add(stream)
        try:
            await self.call(lambda: self._admit(stream.jobs))
        except BaseException:
            self.release(stream)
            raise
        return stream

    def release(self, stream: Stream) -> None:
        """Close a stream, once."""
        if stream in self._streams:
            self._streams.remove(stream)
            self.num_choices -= stream.num_choices
            command = Command(lambda: self._drop_all(stream.jobs))
            command.future.add_done_callback(_log_failure)
            self._send(command)

    async def call(self, function: Callable[[], T]) -> T:
        """Have the engine's thread call a function between two steps; returns or raises what it does.

        ClosedError if the thread ends before it gets to the call.
        """
        command = Command(function)
        self._send(command)
        return cast(T, await asyncio.wrap_future(command.future))

    async def read_stats(self) -> EngineStats:
        """The engine's counters between two steps."""
        return await self.call(lambda: self.engine.stats())

    def abandon(self) -> None:
        """Take no more requests and end the thread after the current step; running requests get a ClosedError."""
        self.is_closed = True
        self._inbox.put(None)

    def stop(self) -> None:
        """`abandon`, and wait for the thread."""
        self.abandon()
        self._thread.join()

    def _send(self, command: Command) -> None:
        """Queue a command. If the thread has ended, refuse it here: the thread no longer looks."""
        self._inbox.put(command)
        if self._has_ended:
            self._refuse_all()

    def _refuse_all(self) -> None:
        """Refuse all commands in the inbox with ClosedError."""
        with suppress(queue.Empty):
            while True:
                command = self._inbox.get_nowait()
                if command is not None:
                    command.refuse(ClosedError("the server is shutting down"))

    def _run(self) -> None:
        try:
            while self._obey():
                self._bring_back()
                if self.engine.has_work:
                    self._step()
        except Exception:
            log.exception("the engine's thread ends: nothing can be computed any more")
        finally:
            for job in [*self._jobs.values(), *self._returning, *self._new]:
                job.stream.put(ClosedError("the server is shutting down"))
            self._has_ended = True
            self._refuse_all()

    def _obey(self) -> bool:
        """Carry out commands, waiting for one if there is nothing else to do; False to end."""
        is_idle = not (self.engine.has_work or self._returning or self._new)
        while is_idle or not self._inbox.empty():
            command = self._inbox.get()
            if command is None:
                return False
            command.carry_out()
            is_idle = False
        return True

    def _admit(self, jobs: list[Job]) -> None:
        """Add new requests, or let them wait while others are coming back."""
        if not self._returning and self._trial is None:
            self._add_all(jobs)
            return
        for job in jobs:
            self.engine.check(job.request)
        self._new.extend(jobs)

    def _add_all(self, jobs: list[Job]) -> None:
        """Add all of them or none."""
        try:
            for job in jobs:
                self._jobs[self.engine.add(job.request)] = job
        except Exception:
            self._drop_all(jobs)
            raise

    def _drop_all(self, jobs: Sequence[Job]) -> None:
        for request_id in [request_id for request_id, job in self._jobs.items() if job in jobs]:
            self.engine.abort(request_id)
            del self._jobs[request_id]
        self._returning = deque(job for job in self._returning if job not in jobs)
        self._new = deque(job for job in self._new if job not in jobs)
        if self._trial in jobs:
            self._trial = None

    def _step(self) -> None:
        try:
            events = self.engine.step()
        except Exception:  # whatever it is, it concerns one request or one step
            log.exception("the engine raised")
            self._recover()
            return
        found: dict[Stream, list[tuple[int, Event]]] = {}
        for event in events:
            job = self._jobs[event.request_id]
            if self._take(job, event):
                found.setdefault(job.stream, []).append((job.first_choice + event.index, event))
        for stream, item in found.items():
            stream.put(item)

    def _take(self, job: Job, event: Event) -> bool:
        """Count an event of a job; True if it is new."""
        try:
            is_new = job.is_new(event)
        except EngineError as error:
            self._drop_all([job])
            job.stream.put(error)
            return False
        if job is self._trial and (is_new or job.has_ended):
            self._trial = None
        if job.has_ended:
            del self._jobs[event.request_id]
        return is_new

    def _recover(self) -> None:
        """After a step that raised: empty the engine, fail the job to blame, keep the others to bring back."""
        running = self.engine.running_ids
        suspects = [job for request_id, job in self._jobs.items() if request_id in running]
        jobs = suspects + [job for job in self._jobs.values() if job not in suspects]
        blamed = self._trial or (suspects[0] if len(suspects) == 1 else None)
        self._trial = None
        failed: list[Job] = []
        for job in jobs:
            job.restart()
            job.num_returns += 1
            (failed if job is blamed or job.num_returns > MAX_RETURNS else self._returning).append(job)
        if blamed is not None:  # that explains the failures so far
            for job in self._returning:
                job.num_returns = 0
        try:
            self._empty()
        finally:  # if it raises, the thread ends, and those who were to return are told there
            for job in failed:
                job.stream.put(EngineError("the engine failed over this request"))

    def _empty(self) -> None:
        """Take everything out of the engine; replace it if it is then not empty."""
        try:
            for request_id in self._jobs:
                self.engine.abort(request_id)
            is_sound = self.engine.is_empty
        except Exception:
            log.exception("the engine cannot be emptied")
            is_sound = False
        self._jobs.clear()
        if not is_sound:
            self.engine = self._make_engine()

    def _bring_back(self) -> None:
        """Let the next job return once the one before is past where it was; after the last, let new ones in."""
        if self._trial is not None:
            return
        if self._returning:
            job = self._returning.popleft()
            if self._take_up(job):
                self._trial = job
            return
        while self._new:
            self._take_up(self._new.popleft())

    def _take_up(self, job: Job) -> bool:
        """Put a job into the engine; if that fails, its stream ends with the reason."""
        try:
            self._add_all([job])
        except MoestroError as error:
            job.stream.put(error)
            return False
        return True


def _log_failure(future: Future[Any]) -> None:
    error = future.exception()
    if error is not None and not isinstance(error, ClosedError):
        log.error("a request could not be dropped", exc_info=error)
