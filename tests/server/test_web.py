"""The chat in a real browser against a stub of the server: text, thoughts, tokens, hostile text."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from web_browser import NEEDS_BROWSER, SECONDS, Page
from web_stub import HOSTILE, LAYERS, MARKDOWN, MODEL, NUM_EXPERTS, THOUGHT, Stub, routes_of, tokens_of

pytest_plugins = ("web_fixtures",)


@NEEDS_BROWSER
class TestChat:
    def test_text_appears_while_it_is_written(self, page: Page, stub: Stub) -> None:
        assert page.text("#model") == MODEL
        page.ask("slow")
        page.wait(lambda: page.text(".answer > .markdown") == "You said:")
        assert page.text(".said") == "slow" and page.all("#stop") and not page.all("#send")
        stub.gate.set()
        page.finish()
        assert page.text(".answer > .markdown") == "You said: slow"
        assert re.fullmatch(r"3 tokens · [\d.]+ tokens/s · first after [\d.]+ s", page.text(".stats"))
        (sent,) = stub.requests
        assert sent == {
            "model": MODEL, "messages": [{"role": "user", "content": "slow"}], "stream": True,
            "stream_options": {"include_usage": True}, "token_details": True, "return_routes": True,
        }  # fmt: skip

    def test_characters_cut_between_packets_are_whole(self, page: Page) -> None:
        page.say("korean")
        assert page.text(".answer > .markdown") == "편향은 고르고, 점수는 무게를 준다. 🙂"

    def test_stop_hangs_up_and_keeps_what_there_is(self, page: Page, stub: Stub) -> None:
        page.ask("slow")
        page.wait(lambda: page.text(".answer > .markdown") == "You said:")
        page.click("#stop")
        assert stub.disconnected.wait(SECONDS)
        page.finish()
        assert page.text(".answer > .markdown") == "You said:"
        assert page.text(".stats").endswith("stopped by you") and not page.all(".error")

    def test_reasoning_is_folded(self, page: Page, stub: Stub) -> None:
        page.ask("think")
        assert page.wait(lambda: page.text("summary")) == "thinking…"
        stub.gate.set()
        page.finish()
        assert re.fullmatch(r"Thought for [\d.]+ s|Thoughts", page.text("summary"))
        assert not page.all(".reasoning .markdown")
        page.click("summary")
        assert page.one(".reasoning .markdown").text == THOUGHT
        assert THOUGHT not in page.text(".answer > .markdown")

    def test_a_conversation_is_sent_whole_and_without_thoughts(self, page: Page, stub: Stub) -> None:
        stub.gate.set()
        page.say("think")
        page.say("again")
        assert stub.requests[1]["messages"] == [
            {"role": "user", "content": "think"},
            {"role": "assistant", "content": MARKDOWN},
            {"role": "user", "content": "again"},
        ]

    def test_markdown(self, page: Page) -> None:
        page.say("markdown")
        inside = ".answer > .markdown"
        assert [cell.text for cell in page.all(f"{inside} td")][:3] == ["Switch", "softmax", "0.01"]
        assert page.text(f"{inside} strong") == "score" and len(page.all(f"{inside} li")) == 2
        assert page.text(".code-head") == "python"
        code = re.search(r"```python\n(.*?)\n```", MARKDOWN, re.DOTALL)
        assert code and page.js("return document.querySelector('.code-frame pre').textContent").rstrip("\n") == code[1]
        page.js("window.copied = []; navigator.clipboard.writeText = async (text) => { window.copied.push(text); }")
        page.click('[aria-label="Copy code"]')
        page.wait(lambda: page.all('[aria-label="Copied"]'))
        assert page.js("return window.copied") == [code[1]]

    def test_enter_of_an_input_method_does_not_send(self, page: Page, stub: Stub) -> None:
        page.one("#question").send_keys("한")
        enter = "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, %s}))"
        page.js(enter % "isComposing: true")
        page.js(enter % "shiftKey: true")
        assert stub.requests == [] and page.one("#question").get_attribute("value") == "한"
        page.js(enter % "cancelable: true")
        page.finish()
        assert len(stub.requests) == 1

    def test_the_page_follows_the_end_unless_one_reads_above(self, page: Page) -> None:
        page.say("long")
        rest = "const at = document.getElementById('scroller'); return at.scrollHeight - at.scrollTop - at.clientHeight"
        page.wait(lambda: page.js(rest) < 2)
        page.js("document.getElementById('scroller').scrollTop = 0")
        page.click("#to-end")
        page.wait(lambda: page.js(rest) < 2 and not page.all("#to-end"))

    def test_what_is_read_out_is_settled_text_once(self, page: Page) -> None:
        page.say("markdown")
        spoken = page.js("return document.getElementById('spoken').textContent")
        assert spoken.count("The bias chooses") == 1 and spoken.count("A router gives") == 1
        assert page.js("return document.getElementById('status').textContent") == "Answer finished."


@NEEDS_BROWSER
class TestHostileText:
    def test_nothing_in_it_runs_or_loads(self, page: Page) -> None:
        page.say("hostile")
        inside = ".answer > .markdown"
        for link in page.all(f"{inside} a"):
            link.get_attribute("href") and page.js("arguments[0].dispatchEvent(new Event('mouseover'))", link)
        assert page.js("return window.hacked") is None
        bad = ".answer :is(img, script, iframe, object, embed, style, svg:not(.icon))"
        assert page.js("return document.querySelectorAll(arguments[0]).length", bad) == 0
        targets = page.js("return [...document.querySelectorAll('.answer a')].map((node) => node.getAttribute('href'))")
        assert set(filter(None, targets)) == {"https://example.org/a?b=1", "https://example.org/track.png"}
        handlers = "return [...document.querySelectorAll('.answer *')].flatMap((node) => node.getAttributeNames())"
        assert not [name for name in page.js(handlers) if name.startswith("on")]
        assert "window.hacked = 2" in page.text(inside)  # shown, as text

    def test_the_sanitiser_alone_would_hold(self, page: Page) -> None:
        """The renderer shows HTML as text; what gets past it must still meet the second fence."""
        kept = page.module(
            """const { default: purify } = await import("/web/purify.es.mjs");
            const { Markdown } = await import("/web/markdown.js");
            const raw = purify.sanitize; let seen = 0;
            purify.sanitize = (html, rules) => { seen += 1; return raw.call(purify, args[0] + html, rules); };
            const markdown = new Markdown(); markdown.update("plain", true); purify.sanitize = raw;
            return [seen, markdown.node.innerHTML];""".replace("\n", " "),
            HOSTILE,
        )
        assert kept[0] == 1
        tags = set(re.findall(r"<(\w+)", kept[1]))
        assert tags <= {"div", "a", "p", "br", "code", "pre"}
        log = page.driver.get_log("browser")  # it tells of what it blocks, even in a document that is not shown
        assert all("has been blocked" in entry["message"] for entry in log)
        assert "onerror" not in kept[1] and "javascript:window.hacked=5" not in kept[1] and "style=" not in kept[1]

    def test_a_conversation_with_a_hostile_title_and_question(self, page: Page) -> None:
        attack = "<img src=x onerror=window.hacked=1>"
        page.say(attack)
        assert page.text(".said") == attack and page.text("#conversations .open") == attack
        assert page.js("return [window.hacked ?? 0, document.querySelectorAll('img').length]") == [0, 0]


@NEEDS_BROWSER
class TestTokens:
    def show(self, page: Page, word: str) -> list[Any]:
        page.say(word)
        page.click(".toggle")
        return page.wait(lambda: page.all(".token"))

    def experts(self, page: Page) -> list[list[int]]:
        return [[int(number) for number in cell.text.split()] for cell in page.all("#tip .ids")]

    def test_hover_shows_the_experts_of_a_token(self, page: Page) -> None:
        text = "You said: some more words"
        spans = self.show(page, "some more words")
        assert "".join(page.js("return arguments[0].textContent", span) for span in spans) == text
        for index in (3, 1):
            page.hover(spans[index])
            token = tokens_of(text)[index]
            shown = page.one("#tip").text
            assert f"␣{token['text'].strip()}" in shown and f"id {token['id']}" in shown
            assert f"probability {100 * np.exp(token['logprob']):.1f} %" in shown
            assert self.experts(page) == routes_of(token["id"])
            names = [cell.text for cell in page.all("#tip th")]
            assert names == [f"layer {name}" if name.isdigit() else name for name in LAYERS]
        page.hover(page.one("#model"))
        page.wait(lambda: not page.all("#tip"))

    def test_the_grid_lights_the_chosen_cells(self, page: Page) -> None:
        spans = self.show(page, "some words")
        page.hover(spans[2])
        page.one("#tip canvas")
        lit = page.js(
            """const canvas = document.querySelectorAll('#tip canvas')[0];
            const { width, height } = canvas; const step = width / arguments[0];
            const at = (x) => [...canvas.getContext('2d').getImageData(x, height >> 1, 1, 1).data].join();
            const colours = Array.from({ length: arguments[0] }, (_, cell) => at(Math.floor(cell * step + step / 3)));
            const count = (colour) => colours.filter((other) => other === colour).length;
            const usual = colours.toSorted((a, b) => count(b) - count(a))[0];
            return colours.flatMap((colour, cell) => (colour === usual ? [] : [cell]));""",
            NUM_EXPERTS,
        )
        assert lit == sorted(set(routes_of(2)[0]))

    def test_the_keyboard_reaches_every_token(self, page: Page) -> None:
        from selenium.webdriver.common.keys import Keys

        self.show(page, "some words")
        page.one(".token-bar select").send_keys(Keys.TAB)
        for index in (0, 1, 2):
            assert self.experts(page) == routes_of(index)
            page.press(Keys.ARROW_RIGHT)
        page.press(Keys.HOME)
        assert self.experts(page) == routes_of(0)
        page.press(Keys.ESCAPE)
        assert not page.all("#tip")

    def test_a_click_as_a_tap_shows_them_too(self, page: Page) -> None:
        spans = self.show(page, "some words")
        page.js("arguments[0].click()", spans[2])
        assert self.experts(page) == routes_of(2)

    def test_the_final_chunk_fills_what_was_open(self, page: Page) -> None:
        spans = self.show(page, "late")
        page.hover(spans[1])
        page.one("#tip")
        assert self.experts(page) == routes_of(1)
        page.hover(spans[2])
        page.wait(lambda: "not fed back" in page.text("#tip"))
        assert page.text(".stats").endswith("stopped at the length limit")

    def test_colours(self, page: Page) -> None:
        from selenium.webdriver.support.ui import Select

        spans = self.show(page, "one two three four five six seven")
        colour = "return getComputedStyle(arguments[0]).backgroundColor"
        by_likely = [page.js(colour, span) for span in spans]
        assert len(set(by_likely)) == len(spans)
        Select(page.one(".token-bar select")).select_by_visible_text("expert of layer 2")
        by_expert = [page.js(colour, span) for span in spans]
        first = [routes_of(index)[1][0] for index in range(len(spans))]
        pairs = itertools.combinations(range(len(spans)), 2)
        assert all((by_expert[a] == by_expert[b]) == (first[a] == first[b]) for a, b in pairs)
        page.open()
        page.click("#conversations .open")
        page.click(".toggle")
        assert Select(page.one(".token-bar select")).first_selected_option.text == "expert of layer 2"

    def test_without_details_nothing_is_asked_or_offered(self, page: Page, stub: Stub) -> None:
        page.click("#open-settings")
        page.click("[name=details]")
        page.save_settings()
        page.say("plain")
        assert not {"token_details", "return_routes"} & stub.requests[0].keys()
        assert not page.all(".toggle") and page.text(".stats").startswith("3 tokens")
