"""Text as it is shown equals the whole text cut once at the end, however it comes in pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from moestro.data.tokenizer import Tokenizer
from moestro.engine.stops import Detokenizer, StopMatcher, count_beginning, spell

TOKENIZER = Tokenizer.builtin()
PLAIN = Tokenizer.train(["abc abc <think> été 한국어 🙂"] * 3, 300)


def cut(text: str, places: list[int]) -> list[str]:
    """A text in pieces."""
    ends = sorted({place % (len(text) + 1) for place in places})
    return [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)], strict=True)]


@given(st.text(), st.booleans())
def test_pieces_of_text_are_whole_characters(text: str, is_short: bool) -> None:
    tokenizer = PLAIN if is_short else TOKENIZER
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(id) for id in tokenizer.encode(text)]
    assert "".join([*pieces, stream.finish()]) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_is_held_back_and_replaced_at_the_end() -> None:
    ids = [PLAIN.pieces.index(bytes([byte])) for byte in "🙂".encode()]
    stream = Detokenizer(PLAIN)
    assert [stream.push(id) for id in ids] == ["", "", "", "🙂"]
    assert [stream.push(id) for id in ids[:2]] + [stream.finish()] == ["", "", "\ufffd"]


def test_control_tokens_are_not_spelled_and_thoughts_are() -> None:
    assert spell(PLAIN, PLAIN.eos_id) == b"" == spell(PLAIN, 10_000)
    assert spell(PLAIN, PLAIN.eos_id, frozenset([PLAIN.eos_id])) == "<｜end▁of▁sentence｜>".encode()
    assert PLAIN.think_id is not None and spell(PLAIN, PLAIN.think_id) == b"<think>"


@given(st.text("ab"), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_may_begin_a_marker(text: str, markers: list[str]) -> None:
    fits = [n for n in range(len(text) + 1) for m in markers if n < len(m) and text[len(text) - n :] == m[:n]]
    assert count_beginning(text, markers) == max(fits, default=0)


@given(st.text("abc"), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 99)))
def test_stops_cut_where_the_first_one_begins(text: str, stops: list[str], places: list[int]) -> None:
    pieces = cut(text, places)
    matcher = StopMatcher(stops)
    sent, seen = "", ""
    for piece in pieces:
        sent, seen = sent + matcher.push(piece), seen + piece
        ends = [seen.find(stop) for stop in stops if stop in seen]
        if ends:
            assert sent == seen[: min(ends)]
            assert matcher.found == min((seen.find(stop), stop) for stop in stops if stop in seen)[1]
            assert matcher.push("more") == matcher.finish() == ""
            return
        assert seen.startswith(sent)
    assert sent + matcher.finish() == text and matcher.found is None
