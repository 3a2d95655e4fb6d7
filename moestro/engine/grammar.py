"""Structured output: which tokens may come next, so that a text follows a JSON schema, a pattern or a grammar.

`from_json_schema`, `from_calls`, `from_choices`, `from_regex` and `from_lark` write the one form, a string, that
`SamplingParams.grammar` takes; llguidance compiles it against the vocabulary and follows the text. What a user may ask
for is bounded: the size of the grammar here, the work of compiling and of each step by llguidance's own counters
(`LIMITS`). Where a grammar allows only one text, it must be spelled as the tokenizer would spell it. JSON is written
without white space between its parts: a model that may write spaces can write nothing else.

Added tokens that are text (<think>, tool calls) may come only where a grammar names them. Control tokens (beginning of
text, user, assistant) never come. End tokens may come where the text is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moestro import machine
from moestro.data.tokenizer import Tokenizer
from moestro.engine.schema_faults import find_fault, say_fault
from moestro.errors import ConfigError, MoestroError

if TYPE_CHECKING:
    import llguidance

MAX_CHARS = 32768
MAX_LINES = 1000  # bounds rules too: a chain of 3000 overflows the compiler's stack and ends the process
LIMITS = {
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 15 ms
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # 40 MB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
COMPACT = {"whitespace_flexible": False}


class GrammarError(MoestroError):
    """The grammar cannot be followed any further from here."""


def from_json_schema(schema: Mapping[str, Any] | bool | str) -> str:
    """The grammar of the JSON texts that a schema admits.

    ConfigError if it is not a schema, is too large, or says what cannot be followed; then with the place in the schema.
    """
    return _checked("start: " + _embed(schema), [schema])


def from_calls(functions: Mapping[str, Mapping[str, Any] | None]) -> str:
    """The grammar of `{"name": …, "arguments": …}` for one of the functions; each comes with its parameters' schema.

    Every schema stays a document of its own, so what it refers to by `#` is found in it and in no other.
    """
    schemas = [{"type": "object"} if schema is None else schema for schema in functions.values()]
    begins = [json.dumps(f'{{"name":{json.dumps(name)},"arguments":') for name in functions]
    calls = " | ".join(f'{begin} a{i} "}}"' for i, begin in enumerate(begins))
    rules = [f"a{i}: {_embed(schema)}" for i, schema in enumerate(schemas)]
    return _checked("\n".join([f"start: {calls}", *rules]), schemas)


def from_choices(texts: Sequence[str]) -> str:
    """The grammar of one of some texts."""
    return _checked("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def from_regex(pattern: str) -> str:
    """The grammar of the texts that a regular expression matches as a whole."""
    return _checked(_load_llguidance().LLMatcher.grammar_from_regex(_bounded(pattern)))


def from_lark(text: str) -> str:
    """A context-free grammar in llguidance's variant of Lark; the rule `start` is the whole text."""
    return _checked(text)


def _embed(schema: Mapping[str, Any] | bool | str) -> str:
    """A schema as a part of a Lark grammar. ConfigError if it is not JSON."""
    try:
        tree = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(tree, (Mapping, bool)):
            raise ConfigError("a JSON schema must be an object or a truth value")
        document = {"not": {}} if tree is False else {} if tree is True else dict(tree)
        return "%json " + json.dumps({**document, "x-guidance": COMPACT})
    except RecursionError:
        raise ConfigError("the JSON schema is nested too deeply") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the JSON schema is not valid JSON: {error}") from error


def _checked(grammar: str, schemas: Iterable[Mapping[str, Any] | bool | str] = ()) -> str:
    """The grammar, if it can be followed. ConfigError that names the fault, and its place if a schema has it."""
    library = _load_llguidance()
    limits = library.LLParserLimits(**LIMITS)

    def check(text: str) -> str:
        fault: str = library.LLMatcher.validate_grammar(text, limits=limits)
        return fault

    error = check(_bounded(grammar))
    if error:
        trees = (json.loads(schema) if isinstance(schema, str) else schema for schema in schemas)
        places = (find_fault(tree, lambda node: check("start: " + _embed(node))) for tree in trees)
        place = next((place for place in places if place), "")
        raise ConfigError(f"the grammar cannot be used: {place or say_fault(error)}")
    return grammar


class Matcher:
    """Follows one text through a grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, forbidden: Tensor, vocab_size: int) -> None:
        self._matcher = matcher
        self._forbidden = forbidden
        self._vocab_size = vocab_size

    @property
    def is_finished(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._matcher.is_stopped()

    def copy(self) -> Matcher:
        """A matcher at the same place in the same grammar; the two continue independently."""
        return Matcher(self._matcher.deep_copy(), self._forbidden, self._vocab_size)

    def allowed(self) -> Tensor:
        """bool [V]: the tokens that may come next. GrammarError if none may, or if finding them takes too long."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        mask = torch.from_numpy(np.unpackbits(bits, count=self._vocab_size, bitorder="little")).bool()
        mask[self._forbidden] = False
        if not mask.any():
            raise GrammarError("the vocabulary has no token that the grammar allows here")
        return mask

    def advance(self, token: int) -> None:
        """Advance by a token. GrammarError if it is not allowed."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar failed: {_first_line(self._matcher.get_error())}")


class GrammarCompiler:
    """Compiles grammars for one vocabulary of `vocab_size` ids; `stop_ids` end a text besides the tokenizer's own."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Iterable[int] = ()) -> None:
        ends = {tokenizer.eos_id, *(id for id in stop_ids if id < vocab_size)}
        control = {id for id in tokenizer.specials.values() if not tokenizer.decode([id])}
        self._forbidden = torch.tensor(sorted(id for id in control - ends if id < vocab_size), dtype=torch.long)
        self._vocab_size = vocab_size
        self._library = _load_llguidance()
        self._limits = self._library.LLParserLimits(**LIMITS)
        wrapper = self._library.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size))
        self._tokenizer = self._library.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=sorted(ends))

    def compile(self, grammar: str) -> Matcher:
        """A matcher for the grammar. One-line ConfigError if the grammar is wrong or too large."""
        matcher = self._library.LLMatcher(self._tokenizer, _bounded(grammar), log_level=0, limits=self._limits)
        if matcher.is_error():
            raise ConfigError(f"the grammar cannot be used: {say_fault(matcher.get_error())}")
        found = Matcher(matcher, self._forbidden, self._vocab_size)
        try:
            found.allowed()  # the first step can exceed limits that compiling alone does not
        except GrammarError as error:
            raise ConfigError(f"the grammar cannot be used: {error}") from error
        return found


class _Vocabulary:
    """A tokenizer in the form llguidance expects; ids beyond it stand for no text."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.eos_token_id = tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        self.tokens = [*tokenizer.pieces, *[b""] * (vocab_size - tokenizer.vocab_size)][:vocab_size]
        self.special_token_ids = sorted(id for id in tokenizer.specials.values() if id < vocab_size)
        self._encode = tokenizer.encode

    def __call__(self, text: bytes | str) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _load_llguidance() -> ModuleType:
    """The library, which only grammars need. ConfigError if it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise ConfigError(f"a grammar needs llguidance: {machine.how_to_install('server')}") from error
    return llguidance


def _bounded(grammar: str) -> str:
    if len(grammar) > MAX_CHARS:
        raise ConfigError(f"the grammar has {len(grammar)} characters; at most {MAX_CHARS} are allowed")
    num_lines = grammar.count("\n") + grammar.count(r"\n")  # the second: inside JSON
    if num_lines > MAX_LINES:
        raise ConfigError(f"the grammar has {num_lines} lines; at most {MAX_LINES} are allowed")
    return grammar


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["unknown reason"])[0][:200]
