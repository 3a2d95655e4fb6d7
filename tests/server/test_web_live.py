"""The chat page with the real server and a tiny model: what one says the other understands."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from live import Live
from web_browser import NEEDS_BROWSER, Page

pytest_plugins = ("web_fixtures",)

QUESTION = "the cat sat on"
NUM_TOKENS = 12


@pytest.fixture
def page(driver: Any, live: Live) -> Page:
    """A fresh page of the server, with greedy answers of a few tokens."""
    found = Page(driver, live.url)
    found.open(first=True)
    driver.get_log("browser")
    found.click("#open-settings")
    found.set_field("temperature", "0")
    found.set_field("max_tokens", str(NUM_TOKENS))
    found.save_settings()
    return found


@NEEDS_BROWSER
def test_text_tokens_and_experts_are_those_of_the_api(page: Page, live: Live) -> None:
    page.say(QUESTION)
    body = {
        "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": NUM_TOKENS,
        "logprobs": True, "return_routes": True,
    }  # fmt: skip
    reply = live.http.post("/v1/chat/completions", json=body).json()
    (choice,) = reply["choices"]
    assert not page.all(".error")
    shown = page.js("return document.querySelector('.answer > .markdown').textContent").split()
    assert "".join(shown) == "".join(choice["message"]["content"].split())
    count = reply["usage"]["completion_tokens"]
    assert page.text(".stats").startswith(f"{count} token")
    page.click(".toggle")
    spans = page.all(".token")
    assert len(spans) == count
    for index in (0, count // 2, count - 2):
        page.js("arguments[0].click()", spans[index])
        experts = [[int(number) for number in cell.text.split()] for cell in page.all("#tip .ids")]
        assert experts == choice["routes"][reply["usage"]["prompt_tokens"] + index]
        likely = 100 * np.exp(choice["logprobs"]["content"][index]["logprob"])
        assert f"probability {likely:.1f} %" in page.one("#tip").text
    page.js("arguments[0].click()", spans[-1])
    assert "not fed back" in page.one("#tip").text
    assert [entry for entry in page.driver.get_log("browser") if entry["source"] != "network"] == []


@NEEDS_BROWSER
def test_the_panel_shows_what_the_server_counted(page: Page, live: Live) -> None:
    page.say(QUESTION)
    live.wait(live.is_idle)
    routing = live.http.get("/routing").json()
    page.wait(lambda: page.all("#load"))
    page.click("#window label:has([value=total])")
    page.wait(lambda: f"· {routing['total']['tokens']:,} tokens" in page.text("#panel-about"))
    assert page.text("#ratio .number") == f"{max(routing['total']['max_over_mean']):.2f}×"
    assert page.text("#dead .number") == str(sum(routing["total"]["dead"]))
