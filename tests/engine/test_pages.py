"""The pool of pages: counts, prefixes, eviction, and that equal digests alone never share a page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.engine import pages as pages_module
from moestro.engine.pages import PAGE_SIZE, PagePool

A, B, C = ([letter] * PAGE_SIZE for letter in (1, 2, 3))


def test_pages_are_counted() -> None:
    pool = PagePool(3)
    one, two = pool.allocate(2), pool.allocate(1)
    assert sorted(one + two) == [0, 1, 2]
    assert pool.num_available == 0
    with pytest.raises(ValueError, match="1 pages wanted, 0 available"):
        pool.allocate(1)
    pool.hold(one)
    pool.release(one)
    assert pool.num_available == 0
    pool.release(one)
    assert pool.num_available == 2
    with pytest.raises(ValueError, match="not held"):
        pool.release(one)


def test_a_prefix_is_found_as_far_as_it_is_equal() -> None:
    pool = PagePool(5)
    pages = pool.allocate(3)
    pool.register(pages, A + B, 0)
    pool.register(pages, A + B + C, 2)
    assert pool.find_prefix(A + B + C, 3 * PAGE_SIZE) == pages
    assert pool.find_prefix(A + B + C, 3 * PAGE_SIZE - 1) == pages[:2]
    assert pool.find_prefix(A + C + C, 3 * PAGE_SIZE) == pages[:1]
    assert pool.find_prefix(B + C, 2 * PAGE_SIZE) == []
    assert pool.find_prefix(A[:-1], PAGE_SIZE - 1) == []


def test_a_page_is_known_by_the_tokens_behind_it_too() -> None:
    pool = PagePool(6, lookahead=2)
    one, two = pool.allocate(2), pool.allocate(2)
    pool.register(one, A + B + [7, 8], 0)
    assert pool.find_prefix(A + B + [7, 8, 9], 2 * PAGE_SIZE) == one
    assert pool.find_prefix(A + B + [7], 2 * PAGE_SIZE) == one[:1]
    assert pool.find_prefix(A + B + [7, 9], 2 * PAGE_SIZE) == one[:1]
    assert pool.find_prefix(A + C + [7, 8], 2 * PAGE_SIZE) == []
    pool.register(two, A + B[:2], 0)
    pool.register(two, A + B + [7, 9], 1)
    assert pool.find_prefix(A + B + [7, 9], 2 * PAGE_SIZE) == [one[0], two[1]]


def test_a_second_page_of_the_same_prefix_stays_private_but_continues_it() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(1), pool.allocate(2)
    pool.register(first, A, 0)
    pool.register(second, A, 0)
    pool.register(second, A + B, 1)
    assert pool.find_prefix(A + B, 2 * PAGE_SIZE) == [first[0], second[1]]
    pool.release(second)
    assert pool.find_prefix(A + B, 2 * PAGE_SIZE) == [first[0], second[1]]
    assert (pool.num_available, pool.num_idle([first[0], second[1]])) == (3, 1)


def test_the_longest_unused_goes_first_and_ends_before_beginnings() -> None:
    pool = PagePool(4)
    old, new = pool.allocate(2), pool.allocate(2)
    pool.register(old, A + B, 0)
    pool.register(new, B + C, 0)
    pool.release(old)
    pool.release(new)
    pool.hold(old)
    pool.release(old)  # used again: now `new` is older
    assert pool.allocate(1) == [new[1]]
    assert pool.find_prefix(B + C, 2 * PAGE_SIZE) == [new[0]]
    assert pool.allocate(2) == [new[0], old[1]]
    assert pool.find_prefix(A + B, 2 * PAGE_SIZE) == [old[0]]


def test_colliding_digests_share_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_module, "hash_page", lambda tokens, before: bytes(tokens[:1]))  # blind to the prefix
    pool = PagePool(4)
    one = pool.allocate(2)
    pool.register(one, A + C, 0)
    assert pool.find_prefix(A + C, 2 * PAGE_SIZE) == one
    two = pool.allocate(2)
    pool.register(two, B + C, 0)
    assert pool.find_prefix(B + C, 2 * PAGE_SIZE) == two[:1]  # the C after A is not the C after B
    other = [1] + [9] * (PAGE_SIZE - 1)
    assert pool.find_prefix(other, PAGE_SIZE) == []


@settings(deadline=None, max_examples=80)
@given(st.data(), st.booleans())
def test_random_use_keeps_every_promise(data: st.DataObject, collide: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if collide:
            patch.setattr(pages_module, "hash_page", lambda tokens, before: bytes(tokens[:1]))
        use_at_random(data)


def use_at_random(data: st.DataObject) -> None:
    pool, held, content = PagePool(6), [], dict[int, list[int]]()
    for _ in range(data.draw(st.integers(5, 40))):
        if held and data.draw(st.booleans()):
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        tokens = [t for letter in data.draw(st.lists(st.integers(1, 3), max_size=4)) for t in [letter] * PAGE_SIZE]
        known = pool.find_prefix(tokens, len(tokens))
        for index, page in enumerate(known):
            assert content[page] == tokens[: (index + 1) * PAGE_SIZE]
        wanted = len(tokens) // PAGE_SIZE - len(known)
        if wanted <= pool.num_available - pool.num_idle(known):
            pool.hold(known)
            held.append(known + pool.allocate(wanted))
            for index, page in enumerate(held[-1]):
                content[page] = tokens[: (index + 1) * PAGE_SIZE]
            pool.register(held[-1], tokens, len(known))
        counts = [sum(page in pages for pages in held) for page in range(6)]
        assert pool.references == counts
        assert pool.num_available == counts.count(0)
