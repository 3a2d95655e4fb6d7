"""The engine's thread: the engine's own tokens, hanging up, full queues, and engines that raise."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
from live import MakeEngine

from moestro.engine.engine import Engine
from moestro.engine.events import Completion, Event
from moestro.engine.scheduler import QueueFullError
from moestro.engine.sequence import Request, SamplingParams
from moestro.errors import ConfigError
from moestro.server.answers import EventStream
from moestro.server.worker import MAX_RETURNS, ClosedError, EngineError, EngineWorker, Stream

REQUESTS = [
    Request(
        list(range(7, 7 + length)), SamplingParams(max_tokens=12 + i, temperature=0.8 * (i % 2), seed=i, n=1 + i % 2)
    )
    for i, length in enumerate((5, 80, 33, 64))
]
BAD = 299  # the token that makes a patched engine raise


@pytest.fixture
def worker(make_engine: MakeEngine) -> Iterator[EngineWorker]:
    worker = EngineWorker(lambda: make_engine(max_running=8, max_waiting=8))
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def expected(make_engine: MakeEngine) -> list[list[Completion]]:
    return [make_engine().run([request])[0] for request in REQUESTS]


async def collect(stream: Stream) -> list[list[int | None]]:
    found: list[list[int | None]] = [[] for _ in range(stream.num_choices)]
    try:
        async for events in stream:
            for choice, event in events:
                found[choice] += [] if event.token is None else [event.token]
    finally:
        stream.close()
    return found


async def ask(worker: EngineWorker, *requests: Request) -> list[list[int | None]]:
    return await collect(await worker.open(requests))


def run(*work: Awaitable[Any]) -> list[Any]:
    async def main() -> list[Any]:
        return await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), 60)

    return asyncio.run(main())


def is_empty(engine: Engine) -> bool:
    pool = engine.scheduler.pool
    return not engine.has_work and pool.num_available == pool.num_pages


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]


def raise_over(engine: Engine, token: int = BAD) -> Engine:
    """Let its steps raise while a sequence that runs has read so many tokens and holds `token`."""
    step = engine.step

    def raising() -> list[Event]:
        events = step()
        if any(token in s.tokens and len(s.generated) > 3 for s in engine.scheduler.running):
            raise RuntimeError("a kernel failed")
        return events

    engine.step = raising  # type: ignore[method-assign]
    return engine


def test_streams_bring_what_the_engine_gives_alone(worker: EngineWorker, expected: list[list[Completion]]) -> None:
    found = run(*(ask(worker, request) for request in REQUESTS))
    assert found == [ids_of(completions) for completions in expected]
    (together,) = run(ask(worker, *REQUESTS))
    assert together == [ids for completions in expected for ids in ids_of(completions)]
    assert is_empty(worker.engine) and worker.num_choices == 0


def test_an_answer_that_is_never_sent_gives_its_room_back(worker: EngineWorker) -> None:
    async def drop() -> int:
        stream = await worker.open([Request([5, 6, 7], SamplingParams(max_tokens=400, n=2))])
        answer = EventStream(None, None, stream)  # type: ignore[arg-type]
        held = worker.num_choices
        del answer
        return held

    assert run(drop()) == [2] and worker.num_choices == 0


def test_a_closed_stream_is_dropped_before_the_next_step(worker: EngineWorker) -> None:
    steps: list[int] = []
    step = worker.engine.step

    def slow() -> list[Event]:
        steps.append(len(worker.engine.scheduler.running))
        time.sleep(0.02)
        return step()

    worker.engine.step = slow  # type: ignore[method-assign]

    async def hang_up() -> int:
        stream = await worker.open([Request([5, 6, 7], SamplingParams(max_tokens=400, n=2))])
        async for _ in stream:
            if len(steps) > 5:
                break
        stream.close()
        stream.close()
        before = len(steps)
        await worker.call(lambda: None)
        return before

    (before,) = run(hang_up())
    assert len(steps) <= before + 1
    assert is_empty(worker.engine) and worker.num_choices == 0


def test_bad_and_too_many_requests_are_refused_and_leave_nothing(worker: EngineWorker) -> None:
    good = Request([5, 6], SamplingParams(max_tokens=300))

    async def main() -> None:
        with pytest.raises(ConfigError, match="vocabulary"):
            await worker.open([good, Request([400])])
        assert is_empty(worker.engine) and worker.num_choices == 0
        with pytest.raises(QueueFullError, match="16"):
            await worker.open([good] * 17)
        streams = [await worker.open([good] * 4) for _ in range(2)]
        with pytest.raises(QueueFullError):
            await worker.open([good] * 9)
        for stream in streams:
            stream.close()
        await worker.call(lambda: None)
        assert is_empty(worker.engine) and worker.num_choices == 0

    run_one(main())


def run_one(work: Awaitable[Any]) -> Any:
    (result,) = run(work)
    if isinstance(result, BaseException):
        raise result
    return result


def test_the_request_that_makes_the_engine_raise_fails_alone(
    make_engine: MakeEngine, expected: list[list[Completion]]
) -> None:
    worker = EngineWorker(lambda: raise_over(make_engine(max_running=8, max_waiting=8)))
    bad = Request([5, BAD, 6], SamplingParams(max_tokens=30, n=2))
    try:
        found = run(*(ask(worker, request) for request in [*REQUESTS[:2], bad, *REQUESTS[2:]]))
        assert isinstance(found.pop(2), EngineError)
        assert found == [ids_of(completions) for completions in expected]
        assert is_empty(worker.engine) and worker.num_choices == 0
        (alone,) = run(ask(worker, bad))
        assert isinstance(alone, EngineError)
        assert run(ask(worker, REQUESTS[0])) == [ids_of(expected[0])]
    finally:
        worker.stop()


def test_an_engine_that_always_raises_fails_every_request_and_the_thread_lives(make_engine: MakeEngine) -> None:
    worker = EngineWorker(lambda: make_engine(max_running=8, max_waiting=8))

    def broken() -> list[Event]:
        raise MemoryError

    step, worker.engine.step = worker.engine.step, broken  # type: ignore[method-assign]
    try:
        found = run(*(ask(worker, request) for request in REQUESTS))
        assert all(isinstance(error, EngineError) for error in found)
        assert is_empty(worker.engine) and worker.is_alive
        worker.engine.step = step  # type: ignore[method-assign]
        assert run(ask(worker, REQUESTS[2])) == [ids_of(make_engine().run([REQUESTS[2]])[0])]
    finally:
        worker.stop()


def test_those_who_come_back_are_computed_together_again(make_engine: MakeEngine) -> None:
    worker = EngineWorker(lambda: make_engine(max_running=8, max_waiting=8))
    step, sizes = worker.engine.step, []

    def fails_once() -> list[Event]:
        sizes.append(len(worker.engine.scheduler.running))
        if len(sizes) == 6:
            raise RuntimeError("once")
        return step()

    worker.engine.step = fails_once  # type: ignore[method-assign]
    requests = [Request([20 + i, 6, 7], SamplingParams(max_tokens=25)) for i in range(3)]
    try:
        found = run(*(ask(worker, request) for request in requests))
        assert found == [ids_of(make_engine().run([request])[0]) for request in requests]
        assert max(sizes[6:]) == 3
    finally:
        worker.stop()


def test_an_engine_that_cannot_be_emptied_is_replaced(
    make_engine: MakeEngine, expected: list[list[Completion]]
) -> None:
    engines: list[Engine] = []

    def make() -> Engine:
        engines.append(raise_over(make_engine(max_running=8, max_waiting=8)))
        return engines[-1]

    def refuse(request_id: int) -> bool:
        raise KeyError(request_id)

    worker = EngineWorker(make)
    engines[0].abort = refuse  # type: ignore[method-assign]
    bad = Request([5, BAD, 6], SamplingParams(max_tokens=30))
    try:
        found = run(*(ask(worker, request) for request in (bad, *REQUESTS)))
        assert isinstance(found[0], EngineError)
        assert found[1:] == [ids_of(completions) for completions in expected]
        assert len(engines) == 2 and worker.engine is engines[1]
    finally:
        worker.stop()


def test_if_no_engine_can_be_made_again_nobody_waits_for_ever(
    make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engines: list[Engine] = []

    def make() -> Engine:
        if engines:
            raise MemoryError("no room for another engine")
        engines.append(raise_over(make_engine(max_running=8, max_waiting=8)))
        return engines[-1]

    def refuse(request_id: int) -> bool:
        raise KeyError(request_id)

    worker = EngineWorker(make)
    engines[0].abort = refuse  # type: ignore[method-assign]
    long = [Request([20 + i, 6], SamplingParams(max_tokens=300)) for i in range(3)]
    bad = Request([5, BAD, 6], SamplingParams(max_tokens=30))
    found = run(*(ask(worker, request) for request in [*long, bad]), worker.call(lambda: time.sleep(0.01)))
    assert all(isinstance(error, ClosedError | EngineError) for error in found[:4])
    worker.stop()
    assert not worker.is_alive and isinstance(run(worker.read_stats())[0], ClosedError)
    assert "no room for another engine" in caplog.text and "Traceback" in caplog.text


def test_one_innocent_outlives_any_number_of_others(make_engine: MakeEngine) -> None:
    worker = EngineWorker(lambda: raise_over(make_engine(max_running=8, max_waiting=8)))
    good = Request([9, 8, 7], SamplingParams(max_tokens=300))
    bad = Request([5, BAD, 6], SamplingParams(max_tokens=30))

    async def main() -> None:
        stream = await worker.open([good])
        innocent = asyncio.ensure_future(collect(stream))
        for _ in range(MAX_RETURNS + 3):
            assert not innocent.done()
            with pytest.raises(EngineError):
                await ask(worker, bad)
        assert await innocent == ids_of(make_engine().run([good])[0])

    try:
        run_one(main())
    finally:
        worker.stop()


def test_a_request_that_cannot_be_taken_up_again_fails(make_engine: MakeEngine) -> None:
    worker = EngineWorker(lambda: make_engine(max_running=8, max_waiting=8))
    engine, step, count = worker.engine, worker.engine.step, 0

    def fails_once_and_forgets() -> list[Event]:
        nonlocal count
        count += 1
        if count == 6:
            raise RuntimeError("once")
        if count == 7:
            for sequence in engine.scheduler.waiting:
                sequence.tokens[-1] += 1  # another prompt, so other tokens
        return step()

    engine.step = fails_once_and_forgets  # type: ignore[method-assign]
    requests = [Request([i, 6, 7, 8, 9, 10], SamplingParams(max_tokens=20)) for i in (20, 30)]
    try:
        first, second = run(*(ask(worker, request) for request in requests))
        assert isinstance(first, EngineError) and "taken up" in str(first)
        assert [second] == [ids_of(make_engine().run([requests[1]])[0])]
        assert is_empty(engine)
    finally:
        worker.stop()


def test_stopping_ends_what_runs_and_refuses_more(make_engine: MakeEngine) -> None:
    worker = EngineWorker(lambda: make_engine(max_running=8, max_waiting=8))

    async def main() -> None:
        stream = await worker.open([Request([5, 6], SamplingParams(max_tokens=400))])
        await asyncio.to_thread(worker.stop)
        with pytest.raises(ClosedError):
            await collect(stream)
        with pytest.raises(ClosedError):
            await worker.open([REQUESTS[0]])
        assert not worker.is_alive

    run_one(main())


def test_what_is_asked_of_a_thread_that_ends_is_refused(worker: EngineWorker) -> None:
    go_on = threading.Event()

    async def main() -> None:
        busy = asyncio.ensure_future(worker.call(go_on.wait))
        await asyncio.sleep(0)
        worker.abandon()
        late = [asyncio.ensure_future(worker.read_stats()) for _ in range(3)]
        await asyncio.sleep(0)
        go_on.set()
        assert await busy
        for answer in late:
            with pytest.raises(ClosedError):
                await answer
        await asyncio.to_thread(worker.stop)
        with pytest.raises(ClosedError):
            await worker.read_stats()

    run_one(main())


def test_a_loop_that_closes_does_not_end_the_thread(worker: EngineWorker) -> None:
    async def leave() -> Stream:
        stream = await worker.open([Request([5, 6], SamplingParams(max_tokens=60))])
        loop = asyncio.get_running_loop()
        loop.is_closed = lambda: False  # type: ignore[method-assign]  # it is asked a moment before the loop closes
        return stream

    loop = asyncio.new_event_loop()
    stream = loop.run_until_complete(leave())
    loop.close()
    while asyncio.run(worker.read_stats()).generated_tokens < 60:
        pass
    stream.close()
    del loop.is_closed
    assert worker.is_alive and asyncio.run(ask(worker, REQUESTS[0]))


def test_requests_that_come_during_a_recovery_are_not_confused_with_those_that_come_back(
    worker: EngineWorker, expected: list[list[Completion]]
) -> None:
    step, later = worker.engine.step, list[asyncio.Future[Any]]()

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()

        def raising() -> list[Event]:
            if worker._trial is not None and not later:  # one is on trial: another bad request comes
                later.append(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(ask(worker, bad), loop), loop=loop))
                while worker._inbox.empty():
                    time.sleep(0.001)
            if any(BAD in sequence.tokens[:3] for sequence in worker.engine.scheduler.running):
                raise RuntimeError("a kernel failed")
            return step()

        worker.engine.step = raising  # type: ignore[method-assign]
        stream = await worker.open([REQUESTS[1]])
        good = asyncio.ensure_future(collect(stream))
        found = await asyncio.gather(good, ask(worker, bad), return_exceptions=True)
        return [*found, *await asyncio.gather(*later, return_exceptions=True)]

    bad = Request([5, BAD, 6], SamplingParams(max_tokens=5))
    first, *others = run_one(main())
    assert first == ids_of(expected[1])
    assert len(others) == 2 and all(isinstance(error, EngineError) for error in others)
    assert is_empty(worker.engine) and worker.num_choices == 0
