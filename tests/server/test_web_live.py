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
    found.click("#mode label:has([value=chat])")  # a tiny random model would rather continue texts
    return found


@NEEDS_BROWSER
def test_text_tokens_and_experts_are_those_of_the_api(page: Page, live: Live) -> None:
    page.say(QUESTION)
    body = {
        "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": NUM_TOKENS,
        "logprobs": True, "top_logprobs": 5, "return_routes": True,
    }  # fmt: skip
    reply = live.http.post("/v1/chat/completions", json=body).json()
    (choice,) = reply["choices"]
    assert not page.all(".error")
    shown = page.js("return document.querySelector('.answer > .markdown').textContent").split()
    assert "".join(shown) == "".join(choice["message"]["content"].split())
    count = reply["usage"]["completion_tokens"]
    assert page.text(".stats").startswith(f"{count} token")
    page.click(".toggle")
    page.wait(lambda: page.all(".prompt-tokens"))
    spans = page.all(".token-view > .token-text .token")
    assert len(spans) == count
    for index in (0, count // 2, count - 2):
        page.js("arguments[0].click()", spans[index])
        assert page.experts == choice["routes"][reply["usage"]["prompt_tokens"] + index]
        scored = choice["logprobs"]["content"][index]
        shown = page.text("#inspector")
        assert f"probability {100 * np.exp(scored['logprob']):.1f} %" in shown
        best = page.js("return [...document.querySelectorAll('.alternatives code')].map((node) => node.textContent)")
        assert best == [visible(bytes(one["bytes"])) for one in scored["top_logprobs"]]
    assert page.text(".prompt-tokens summary") == f"Prompt: {reply['usage']['prompt_tokens']} tokens"
    assert [entry for entry in page.driver.get_log("browser") if entry["source"] != "network"] == []


def visible(piece: bytes) -> str:
    """A token as the page spells it; half a character as its bytes."""
    try:
        signs = {code: 0x2400 + code for code in range(32)} | {9: "⇥", 10: "⏎", 32: "␣", 127: "␡"}
        return piece.decode().translate(signs)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


@NEEDS_BROWSER
def test_a_text_is_continued_as_the_api_continues_it(page: Page, live: Live) -> None:
    page.click("#mode label:has([value=text])")
    page.one("#text").send_keys(QUESTION)
    page.click("#write")
    page.wait(lambda: page.all(".stats"))
    page.finish()
    body = {"prompt": QUESTION, "temperature": 0, "max_tokens": NUM_TOKENS}
    reply = live.http.post("/v1/completions", json=body).json()
    assert page.one("#text").get_attribute("value") == QUESTION + reply["choices"][0]["text"]


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
