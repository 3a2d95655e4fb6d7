"""The scheduler alone, over a model of the cache: nothing leaks, is shared wrongly, starves or overtakes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.engine.pages import PAGE_SIZE, PagePool
from moestro.engine.scheduler import QueueFullError, Row, Scheduler, pages_for
from moestro.engine.sequence import SamplingParams, Sequence
from moestro.errors import ConfigError


def make_sequence(arrival: int, prompt: list[int], max_tokens: int = 4, **params: int) -> Sequence:
    return Sequence(
        arrival, arrival, 0, SamplingParams(max_tokens=max_tokens, **params), list(prompt), num_prompt=len(prompt)
    )


class Simulation:
    """Steps a scheduler; the model of the cache keeps, per slot, the whole text that its row was computed from.

    Sequences draft as many tokens as `ahead` says, right or wrong as `rng` has it. As with MTP modules, a position is
    ready when the `lookahead` tokens after it are known.
    """

    def __init__(self, scheduler: Scheduler, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.rng = random.Random(seed)
        self.slots: dict[tuple[int, int], tuple[int, ...]] = {}
        self.finished: list[Sequence] = []

    def step(self) -> list[Row]:
        scheduler = self.scheduler
        rows = scheduler.schedule()
        assert bool(rows) == scheduler.has_work
        assert 0 <= sum(row.count for row in rows) <= scheduler.token_budget
        assert len({id(row.sequence) for row in rows}) == len(rows) <= scheduler.max_running
        decoding = [not row.sequence.is_prefilling for row in rows]
        assert decoding == sorted(decoding, reverse=True)
        assert all(s.is_prefilling or any(row.sequence is s for row in rows) for s in scheduler.running)
        for row in rows:
            self.compute(row)
        for row in rows:
            self.advance(row)
        self.check()
        return rows

    def compute(self, row: Row) -> None:
        sequence, first = row.sequence, row.sequence.num_computed
        num_text = len(sequence.tokens) - first
        assert 1 <= row.count < num_text or row.count == num_text + len(sequence.drafts)
        known = sequence.tokens + sequence.drafts
        for p in range(first + row.count):
            slot, text = (sequence.pages[p // PAGE_SIZE], p % PAGE_SIZE), tuple(known[: p + 1])
            if p >= first:
                assert self.scheduler.pool.references[slot[0]] == 1
                self.slots[slot] = text
            assert self.slots[slot] == text

    def advance(self, row: Row) -> None:
        sequence, is_last = row.sequence, row.is_last
        self.scheduler.commit(row)
        drafts, sequence.drafts = (sequence.drafts, []) if is_last else ([], sequence.drafts)
        for draft in [*drafts, -1] if is_last else []:
            sequence.tokens.append(len(sequence.tokens) % 2)
            if draft != sequence.tokens[-1] or len(sequence.generated) >= sequence.params.max_tokens:
                break
            sequence.num_computed += 1
        left = sequence.params.max_tokens - len(sequence.generated)
        self.scheduler.mark_ready(sequence, min(sequence.num_computed, len(sequence.tokens) - LOOKAHEAD))
        if is_last and not left:
            self.scheduler.remove(sequence)
            self.finished.append(sequence)
        elif is_last:
            sequence.drafts = [self.rng.randint(0, 1) for _ in range(min(sequence.ahead, left - 1))]

    def check(self) -> None:
        scheduler, pool = self.scheduler, self.scheduler.pool
        order = [s.arrival for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        held = [page for sequence in scheduler.running for page in sequence.pages]
        assert pool.references == [held.count(page) for page in range(pool.num_pages)]
        assert pool.num_available == pool.num_pages - len(set(held))
        assert all(not sequence.pages for sequence in (*scheduler.waiting, *self.finished))


LOOKAHEAD = 2
# prompts of few different ids, so that prefixes are often equal
REQUESTS = st.tuples(st.integers(1, 300), st.integers(0, 2), st.integers(1, 130), st.integers(0, 12), st.booleans())


@settings(deadline=None, max_examples=40)
@given(
    st.lists(REQUESTS, min_size=1, max_size=12),
    st.integers(7, 20),
    st.integers(1, 6),
    st.integers(0, 200),
    st.sets(st.integers(0, 11)),
    st.integers(0, 3),
)
def test_random_loads_end_well(
    requests: list[tuple[int, int, int, int, bool]],
    num_pages: int,
    max_running: int,
    budget: int,
    aborted: set[int],
    drafts: int,
) -> None:
    scheduler = Scheduler(
        PagePool(num_pages, LOOKAHEAD),
        token_budget=max_running * (1 + drafts) + budget,
        max_running=max_running,
        draft_tokens=drafts,
    )
    simulation, sequences, gone = Simulation(scheduler, len(requests)), [], set[int]()
    started: list[int] = []
    arrivals = iter(enumerate(requests))
    for step in range(5000):
        for arrival, (length, token, max_tokens, pause, scored) in arrivals:
            extra = {"prompt_logprobs": 0} if scored else {}
            sequences.append(make_sequence(arrival, [token] * length, max_tokens, **extra))
            sequences[-1].ahead = drafts if arrival % 3 else 0
            scheduler.add([sequences[-1]])
            if pause:
                break
        for sequence in sequences:
            if sequence.arrival in aborted and step == 9 + 3 * sequence.arrival and sequence not in simulation.finished:
                scheduler.remove(sequence)
                gone.add(sequence.arrival)
        rows = simulation.step()
        started += [row.sequence.arrival for row in rows if row.sequence.arrival not in started]
        if not rows and len(sequences) == len(requests):
            break
    assert len(simulation.finished) + len(gone) == len(requests)
    assert started == sorted(started)
    assert all(len(s.generated) == s.params.max_tokens for s in simulation.finished)
    assert scheduler.pool.num_available == num_pages
    assert not scheduler.has_work


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    simulation = Simulation(Scheduler(PagePool(20), token_budget=50, max_running=4))
    simulation.scheduler.add([make_sequence(0, [1] * 10, 20), make_sequence(1, [2] * 130)])
    taken = [[(row.sequence.arrival, row.count) for row in simulation.step()] for _ in range(5)]
    assert taken == [[(0, 10), (1, 40)], [(0, 1), (1, 49)], [(0, 1), (1, 41)], [(0, 1), (1, 1)], [(0, 1), (1, 1)]]


def test_the_last_to_arrive_is_preempted_and_comes_back_first() -> None:
    scheduler = Scheduler(PagePool(3), token_budget=400, max_running=4)
    simulation = Simulation(scheduler)
    one, two, three = (make_sequence(i, [i] * 64, 70) for i in range(3))
    scheduler.add([one, two, three])
    simulation.step()
    assert [len(s.pages) for s in (one, two, three)] == [1, 1, 1]
    simulation.step()  # each needs a second page: the first takes it from the third, the second finds none but its own
    assert (scheduler.running, list(scheduler.waiting), scheduler.num_preemptions) == ([one], [two, three], 2)
    while scheduler.has_work:
        simulation.step()
    assert simulation.finished == [one, two, three]


def test_a_known_prefix_is_not_computed_again_but_its_last_token_is() -> None:
    scheduler = Scheduler(PagePool(8), token_budget=400, max_running=4)
    simulation = Simulation(scheduler)
    for arrival, expected in enumerate((128, 64)):
        scheduler.add([make_sequence(arrival, [7] * 128, 1)])
        assert [row.count for row in simulation.step()] == [expected]
    scheduler.add([make_sequence(2, [7] * 128, 1, prompt_logprobs=0)])
    assert [row.count for row in simulation.step()] == [128]


@pytest.mark.parametrize(("length", "taken"), [(8, [7, 4]), (9, [8, 4]), (10, [8, 5]), (4, [7])])
def test_drafts_come_with_the_token_before_them_after_preemption_too(length: int, taken: list[int]) -> None:
    scheduler = Scheduler(PagePool(4), token_budget=8, max_running=2, draft_tokens=3)
    sequence = make_sequence(0, [1] * length, 20)
    sequence.ahead, sequence.drafts = 3, [5, 6, 7]
    scheduler.add([sequence])
    for count in taken:
        (row,) = scheduler.schedule()
        assert (row.count, row.is_last) == (count, count == taken[-1])
        scheduler.commit(row)
    assert (sequence.num_computed, sequence.num_pending) == (length, 3)


def test_room_for_drafts_is_taken_ahead_but_never_more_than_the_text_can_need() -> None:
    scheduler = Scheduler(PagePool(8), token_budget=200, max_running=4, draft_tokens=3)
    sequences = [make_sequence(i, [i] * 62, max_tokens) for i, max_tokens in enumerate((20, 2))]
    for sequence in sequences:
        sequence.ahead = 3
    scheduler.add(sequences)
    scheduler.schedule()
    assert [len(sequence.pages) for sequence in sequences] == [2, 1]


def test_the_queue_is_bounded_and_takes_a_request_whole() -> None:
    scheduler = Scheduler(PagePool(8), max_waiting=3)
    scheduler.add([make_sequence(0, [1]), make_sequence(1, [1])])
    with pytest.raises(QueueFullError, match="2 requests wait"):
        scheduler.add([make_sequence(2, [1]), make_sequence(3, [1])])
    assert [s.arrival for s in scheduler.waiting] == [0, 1]


def test_a_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="8 tokens cannot decode 9"):
        Scheduler(PagePool(8), token_budget=8, max_running=9)
    with pytest.raises(ConfigError, match="8 tokens cannot decode 3 sequences with 2 drafts"):
        Scheduler(PagePool(8), token_budget=8, max_running=3, draft_tokens=2)
    assert [pages_for(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]
