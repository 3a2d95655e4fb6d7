"""Running requests and comparing what came of them."""

from __future__ import annotations

import torch

from moestro.engine.engine import Engine
from moestro.engine.events import Completion
from moestro.engine.sequence import Request


def run_all(engine: Engine, requests: list[Request]) -> list[Completion]:
    """The first completion of every request."""
    return [completions[0] for completions in engine.run(requests)]


def assert_same(one: Completion, other: Completion) -> None:
    """Equal to the last bit: floats are compared as they are."""
    assert (one.ids, one.text) == (other.ids, other.text)
    assert one.logprobs == other.logprobs
    assert one.prompt_logprobs == other.prompt_logprobs
    assert (one.finish_reason, one.stop_string, one.error) == (other.finish_reason, other.stop_string, other.error)
    assert (one.routes is None) == (other.routes is None)
    assert one.routes is None or (other.routes is not None and torch.equal(one.routes, other.routes))
