"""Requests made up from the server's own description: none ends in a 5xx, none hangs, errors are error objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from live import Live

PATHS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/models",
    "/v1/models/{name}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/version",
    "/metrics",
    "/routing",
)


@pytest.fixture(scope="module")
def description(live: Live) -> dict[str, Any]:
    tree: dict[str, Any] = live.http.get("/openapi.json").json()
    return tree


def test_every_route_is_described(description: dict[str, Any]) -> None:
    assert set(description["paths"]) == set(PATHS)
    assert "422" not in str(description)


@pytest.mark.parametrize("path", PATHS)
def test_no_request_ends_in_a_5xx_or_hangs(live: Live, description: dict[str, Any], path: str) -> None:
    described = schemathesis.openapi.from_dict(description)
    (method,) = description["paths"][path]
    operation = described[path][method.upper()]
    strategies = [operation.as_strategy()]
    if method == "post":  # others have nothing that could be wrong
        strategies.append(operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))

    def check(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body["stream"] = False
            name = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
            wanted = case.body.get(name) or 3
            case.body[name] = min(3, wanted) if isinstance(wanted, int | float) else wanted
        reply = case.call(base_url=live.url, timeout=60)
        assert reply.status_code < 500, reply.text
        if reply.status_code >= 400:
            assert isinstance(reply.json()["error"]["message"], str)

    for chosen in strategies:
        run_examples(check, chosen)
    live.wait(live.is_idle)


def run_examples(check: Callable[[schemathesis.Case], None], strategy: Any) -> None:
    from hypothesis import given

    @given(case=strategy)
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: schemathesis.Case) -> None:
        check(case)

    run()


def test_the_answers_of_status_routes(live: Live) -> None:
    assert live.http.get("/health").json() == {"status": "ok"}
    assert set(live.http.get("/version").json()) == {"version"}
    assert isinstance(httpx.get(live.url + "/openapi.json").json(), dict)
