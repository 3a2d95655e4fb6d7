"""One growing continuation in OpenAI's shapes: `push` an event to get stream chunks; `result` at the end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from moestro.data.tokenizer import Tokenizer
from moestro.engine.events import Event, TokenLogprob
from moestro.engine.stops import Detokenizer
from moestro.server.stream import Splitter
from moestro.server.tools import Call, CallReader

Tree = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """Settings that all choices of a request share."""

    tokenizer: Tokenizer
    has_logprobs: bool = False
    has_details: bool = False


class Choice(Protocol):
    """What `answers.py` needs from a choice."""

    index: int
    num_tokens: int
    num_reasoning: int
    num_cached: int  # prompt tokens found in the cache

    def start(self) -> list[Tree]:
        """Chunks before the first event."""

    def push(self, event: Event) -> list[Tree]:
        """Add an event; returns the chunks it makes."""

    def result(self) -> Tree:
        """The whole choice."""


@dataclass
class Details:
    """Tokens with their experts, for the extension field of a stream.

    The engine knows a token's experts only when it computes the next token, so each token is reported one event later.
    """

    tokenizer: Tokenizer
    _waiting: Tree | None = None
    _text: Detokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._text = Detokenizer(self.tokenizer)

    def push(self, event: Event) -> list[Tree]:
        """The tokens that are settled."""
        told = []
        if self._waiting is not None:
            routes = event.token_routes
            told.append({**self._waiting, "routes": None if routes is None else routes.tolist()})
            self._waiting = None
        if event.token is not None:
            logprob = event.logprob.logprob if event.logprob else None
            self._waiting = {"id": event.token, "text": self._text.push(event.token), "logprob": logprob}
        if event.finish_reason and self._waiting is not None:
            text = self._waiting["text"] + self._text.finish()
            told.append({**self._waiting, "text": text, "routes": None})
        return told


class TextChoice:
    """A choice of `/v1/completions`. `echo`: the prompt's ids, to repeat before the continuation."""

    def __init__(self, index: int, form: Format, echo: list[int] | None = None) -> None:
        self.index, self.form = index, form
        self.num_tokens = self.num_reasoning = self.num_cached = 0
        self._echo = echo
        self._spelled, self._offset = Detokenizer(form.tokenizer), 0  # only for the offsets of scored tokens
        self._parts: list[str] = []
        self._logprobs = _empty_logprobs()
        self._details = Details(form.tokenizer)
        self._end: Tree = {"finish_reason": None}

    def start(self) -> list[Tree]:
        """Nothing: a completion has no role."""
        return []

    def push(self, event: Event) -> list[Tree]:
        """One chunk for each event that has something to send."""
        text, logprobs = "", _empty_logprobs()
        self.num_cached += event.num_cached
        if self._echo is not None:
            text = self._repeat(self._echo, event, logprobs)
            self._echo = None
        if event.token is not None:
            self.num_tokens += 1
            self._score(logprobs, event.token, event.logprob, len(self._spelled.push(event.token)))
        text += event.text
        if event.finish_reason:
            self._end = _ending(event, event.finish_reason)
        self._parts.append(text)
        for name, values in logprobs.items():
            self._logprobs[name] += values
        details = self._details.push(event) if self.form.has_details else []
        if not (text or event.finish_reason or details or logprobs["tokens"]):
            return []
        chunk = {"index": self.index, "text": text, "logprobs": self._shown(logprobs), **self._end}
        return [chunk | ({"moestro": {"tokens": details}} if self.form.has_details else {})]

    def result(self) -> Tree:
        """The whole choice."""
        return {
            "index": self.index,
            "text": "".join(self._parts),
            "logprobs": self._shown(self._logprobs),
            **self._end,
        }

    def _repeat(self, ids: list[int], event: Event, logprobs: Tree) -> str:
        """The prompt's text, with log-probabilities if requested. The first token has none."""
        text = Detokenizer(self.form.tokenizer)
        known: list[TokenLogprob | None] = [None, *(event.prompt_logprobs or ())]
        scores = known + [None] * (len(ids) - len(known))
        pieces = []
        for id, score in zip(ids, scores, strict=True):
            pieces.append(text.push(id))
            self._score(logprobs, id, score, len(pieces[-1]))
        return "".join(pieces) + text.finish()

    def _score(self, logprobs: Tree, id: int, score: TokenLogprob | None, length: int) -> None:
        if not self.form.has_logprobs:
            return
        name = name_token(self.form.tokenizer, id)
        top: dict[str, float] = {}
        for other, logprob in (*score.top, (id, score.logprob)) if score else ():
            top.setdefault(name_token(self.form.tokenizer, other), logprob)
        logprobs["tokens"].append(name)
        logprobs["token_logprobs"].append(score.logprob if score else None)
        logprobs["top_logprobs"].append(top if score else None)
        logprobs["text_offset"].append(self._offset)
        self._offset += length

    def _shown(self, logprobs: Tree) -> Tree | None:
        return logprobs if self.form.has_logprobs else None


@dataclass(frozen=True)
class ChatForm(Format):
    """Adds how tools and thoughts are read. `thinks`: the prompt ends within a thought."""

    has_tools: bool = False
    is_call: bool = False
    many_calls: bool = True
    thinks: bool = False


class ChatChoice:
    """A choice of `/v1/chat/completions`."""

    def __init__(self, index: int, form: ChatForm) -> None:
        self.index, self.form = index, form
        self.num_tokens = self.num_reasoning = self.num_cached = 0
        self._split = Splitter("reasoning" if form.thinks else "content" if form.is_call else None)
        self._calls = CallReader(form.tokenizer, is_call=form.is_call, many=form.many_calls)
        self._details = Details(form.tokenizer)
        self._texts: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._found: list[Call] = []
        self._scored: list[Tree] = []
        self._end: Tree = {"finish_reason": None}

    def start(self) -> list[Tree]:
        """The role."""
        return [self._chunk({"role": "assistant", "content": ""}, [])]

    def push(self, event: Event) -> list[Tree]:
        """A chunk for each change in the text; the last one also has the details of the event."""
        scored = [self._score(event.logprob)] if event.logprob and self.form.has_logprobs else []
        self._scored += scored
        self.num_tokens += event.token is not None
        self.num_cached += event.num_cached
        deltas = self._read(event.text)
        self.num_reasoning += self._split.kind == "reasoning"
        if event.finish_reason:
            deltas += self._read("", is_last=True)
        details = self._details.push(event) if self.form.has_details else []
        if not deltas and (scored or details):
            deltas = [{"content": ""}]
        chunks = [self._chunk(delta, scored if place == 0 else []) for place, delta in enumerate(deltas)]
        if event.finish_reason:
            reason = "tool_calls" if self._found and event.finish_reason == "stop" else event.finish_reason
            self._end = _ending(event, reason)
            chunks.append({**self._chunk({}, []), **self._end})
        if chunks and self.form.has_details:
            chunks[-1]["moestro"] = {"tokens": details}
        return chunks

    def result(self) -> Tree:
        """The whole choice."""
        content, thoughts = ("".join(self._texts[kind]) for kind in ("content", "reasoning"))
        message: Tree = {"role": "assistant", "content": content or (None if self._found else ""), "refusal": None}
        if thoughts:
            message |= {"reasoning_content": thoughts, "reasoning": thoughts}
        if self._found:
            message["tool_calls"] = [call.as_tree() for call in self._found]
        logprobs = {"content": self._scored, "refusal": None} if self.form.has_logprobs else None
        return {"index": self.index, "message": message, "logprobs": logprobs, **self._end}

    def _read(self, text: str, is_last: bool = False) -> list[Tree]:
        """Deltas for a piece of text, and for everything held back if it is the last piece."""
        deltas = []
        for kind, part in self._split.push(text) + (self._split.finish() if is_last else []):
            if kind == "content" and self.form.has_tools:
                deltas += [self._delta(piece) for piece in self._calls.push(part)]
            elif kind == "content":
                deltas.append(self._delta(part))
            else:
                self._texts["reasoning"].append(part)
                deltas.append({"reasoning_content": part, "reasoning": part})
        return deltas + ([self._delta(piece) for piece in self._calls.finish()] if is_last else [])

    def _delta(self, piece: str | Call) -> Tree:
        if isinstance(piece, str):
            self._texts["content"].append(piece)
            return {"content": piece}
        self._found.append(piece)
        return {"tool_calls": [{"index": len(self._found) - 1, **piece.as_tree()}]}

    def _chunk(self, delta: Tree, scored: list[Tree]) -> Tree:
        logprobs = {"content": scored, "refusal": None} if scored else None
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _score(self, score: TokenLogprob) -> Tree:
        top = [self._entry(id, logprob) for id, logprob in score.top]
        return {**self._entry(score.token, score.logprob), "top_logprobs": top}

    def _entry(self, id: int, logprob: float) -> Tree:
        piece = piece_of(self.form.tokenizer, id)
        return {"token": piece.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(piece)}


def piece_of(tokenizer: Tokenizer, id: int) -> bytes:
    """All bytes of an id; empty beyond the vocabulary, where models pad their embedding."""
    return tokenizer.pieces[id] if id < tokenizer.vocab_size else b""


def name_token(tokenizer: Tokenizer, id: int) -> str:
    """The token as text, or as `bytes:\\xe2\\x82` if it is half a character, so that names stay distinct."""
    piece = piece_of(tokenizer, id)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def _empty_logprobs() -> Tree:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def _ending(event: Event, reason: str) -> Tree:
    """The finish reason, the stop string found, and the routes if requested."""
    end: Tree = {"finish_reason": reason, "stop_reason": event.stop_string}
    return end if event.routes is None else {**end, "routes": event.routes.tolist()}
