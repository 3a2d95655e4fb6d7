"""The chat in a real browser against a stub of the server: text, thoughts, tokens, hostile text."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
from web_browser import NEEDS_BROWSER, SECONDS, Page
from web_stub import HOSTILE, LAYERS, MARKDOWN, MODEL, THOUGHT, Stub, logprob_of, routes_of

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
            "stream_options": {"include_usage": True}, "token_details": True, "return_routes": True, "max_tokens": 512,
            "temperature": 0.7, "top_p": 0.9,
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

    def token(self, page: Page) -> str:
        return str(page.text("#inspector-id"))

    def test_hover_shows_a_token_beside_the_text(self, page: Page, stub: Stub) -> None:
        text = "You said: some more words"
        spans = self.show(page, "some more words")
        assert "".join(page.js("return arguments[0].textContent", span) for span in spans) == text
        page.wait(lambda: page.all(".prompt-tokens"))
        assert stub.traced == [[*range(900, 900 + 4), *range(len(spans))]]  # a message of three words
        for index in (3, 1):
            page.hover(spans[index])
            page.wait(lambda index=index: self.token(page) == f"id {index}")
            shown = page.text("#inspector")
            logprob = logprob_of(index)
            assert f"␣{text.split()[index]}" in shown
            assert f"probability {100 * np.exp(logprob):.1f} %" in shown
            assert f"{-logprob / np.log(2):.1f} bits of surprise" in shown
            assert f"rank {1 + index} of 1,000" in shown and f"{index % 7 / 2 / np.log(2):.1f} bits of unc" in shown
            assert page.experts == routes_of(index)
            weights = [node.text for node in page.all("#inspector .routes tr:first-of-type .weight")]
            assert weights == ["0.20", "1.10", "0.40", "0.30"]
            best = [row.text.split() for row in page.all(".alternatives li")]
            assert best == [[f"n{index + step}", share, "%"] for step, share in enumerate(("61", "22", "8.2"))]
            names = [cell.text for cell in page.all("#inspector .routes th")]
            assert names == [f"layer {name}" if name.isdigit() else name for name in LAYERS]
        overlap = page.js(
            "const box = (css) => document.querySelector(css).getBoundingClientRect();"
            "const [a, b] = [box('#inspector'), box('#thread')];"
            "return Math.min(a.right, b.right) > Math.max(a.left, b.left)"
        )
        assert not overlap

    def test_the_path_joins_the_strongest_expert_of_every_layer(self, page: Page) -> None:
        spans = self.show(page, "some words")
        page.wait(lambda: page.all(".prompt-tokens"))
        page.js("arguments[0].click()", spans[2])
        points = page.one("#inspector polyline").get_attribute("points").split()
        across = [float(point.split(",")[0]) for point in points]
        strongest = [row[1] for row in routes_of(2)]  # as the stub weighs them
        assert np.corrcoef(across, strongest)[0, 1] > 0.9999 and len(page.all("#inspector circle")) == 4 * len(LAYERS)
        assert page.one("#inspector .path").get_attribute("aria-label").endswith(" → ".join(map(str, strongest)))

    def test_the_prompts_tokens_open_too(self, page: Page) -> None:
        self.show(page, "some words")
        page.wait(lambda: page.all(".prompt-tokens"))
        assert page.text(".prompt-tokens summary") == "Prompt: 3 tokens"
        page.click(".prompt-tokens summary")
        first, second = page.all(".prompt-tokens .token")[:2]
        page.hover(second)
        page.wait(lambda: self.token(page) == "id 901")
        assert page.experts == routes_of(901) and "rank 2 of" in page.text("#inspector")
        page.hover(first)
        page.wait(lambda: "not known" in page.text("#inspector-chance"))

    def test_a_trace_that_fails_leaves_what_the_stream_told(self, page: Page) -> None:
        page.js(
            "const real = window.fetch; window.fetch = (path, options) =>"
            " path === 'trace' ? Promise.resolve(new Response('{}', { status: 500 })) : real(path, options);"
        )
        spans = self.show(page, "some words")
        page.wait(lambda: "are missing: The server answered with status 500." in page.text(".token-view"))
        page.hover(spans[1])
        page.wait(lambda: self.token(page) == "id 1")
        assert page.experts == routes_of(1) and not page.all(".alternatives, #inspector .weight")

    def test_the_keyboard_reaches_every_token(self, page: Page) -> None:
        from selenium.webdriver.common.keys import Keys

        self.show(page, "some words")
        page.wait(lambda: page.all(".prompt-tokens"))
        page.one(".prompt-tokens summary").send_keys(Keys.TAB)
        for index in (0, 1, 2):
            assert self.token(page) == f"id {index}"
            page.press(Keys.ARROW_RIGHT)
        page.press(Keys.HOME)
        assert self.token(page) == "id 0"
        page.click("#close-inspector")
        assert not page.all("#inspector")

    def test_a_click_as_a_tap_shows_them_too(self, page: Page) -> None:
        spans = self.show(page, "some words")
        page.js("arguments[0].click()", spans[2])
        assert page.experts == routes_of(2)

    def test_the_final_chunk_fills_what_was_open(self, page: Page) -> None:
        page.js(
            "const real = window.fetch;"
            "window.fetch = (path, options) => path === 'trace' ? new Promise(() => {}) : real(path, options);"
        )
        spans = self.show(page, "late")
        page.hover(spans[1])
        page.wait(lambda: self.token(page) == "id 1")
        assert page.experts == routes_of(1)
        page.hover(spans[2])
        page.wait(lambda: "not fed back" in page.text("#inspector"))
        assert page.text(".stats").endswith("stopped at the length limit")

    def colours(self, page: Page, spans: list[Any]) -> list[str]:
        return [page.js("return getComputedStyle(arguments[0]).backgroundColor", span) for span in spans]

    def choose(self, page: Page, way: str) -> None:
        from selenium.webdriver.support.ui import Select

        Select(page.one(".token-bar select")).select_by_visible_text(way)

    def test_colours_are_relative_to_the_text_and_the_legend_counts(self, page: Page) -> None:
        words = " ".join(f"w{number}" for number in range(28))
        spans = self.show(page, words)
        page.wait(lambda: page.all(".prompt-tokens"))
        values = np.array([-logprob_of(id) for id in range(len(spans))])
        legend = [entry.text for entry in page.all(".token-legend li")]
        assert len(legend) == 5 and sum(int(entry.split("×")[1]) for entry in legend) == len(spans)
        ends = np.sort(values)[[int(np.ceil(len(values) * share / 5)) - 1 for share in (1, 2, 3, 4)]]
        levels = (values[:, None] > ends).sum(1)
        by_surprise = self.colours(page, spans)
        pairs = list(itertools.combinations(range(len(spans)), 2))
        assert all((by_surprise[a] == by_surprise[b]) == (levels[a] == levels[b]) for a, b in pairs)
        assert len(set(by_surprise)) == 5
        self.choose(page, "rank")
        ranks = [1 + id % 30 for id in range(len(spans))]
        counts = [sum(low < rank <= high for rank in ranks) for low, high in itertools.pairwise((0, 1, 2, 5, 20, 99))]
        names = ["1", "2", "3 – 5", "6 – 20", "> 20"]
        legend = [entry.text.split() for entry in page.all(".token-legend li")]
        assert [int(entry[-1].lstrip("×")) for entry in legend] == counts
        assert [" ".join(entry[:-1]) for entry in legend] == names
        self.choose(page, "uncertainty")
        assert len(set(self.colours(page, spans))) > 3

    def test_colours_by_expert_are_kept(self, page: Page) -> None:
        from selenium.webdriver.support.ui import Select

        spans = self.show(page, "one two three four five six seven")
        page.wait(lambda: page.all(".prompt-tokens"))
        self.choose(page, "expert of layer 2")
        by_expert = self.colours(page, spans)
        strongest = [routes_of(index)[1][1] for index in range(len(spans))]
        pairs = itertools.combinations(range(len(spans)), 2)
        assert all((by_expert[a] == by_expert[b]) == (strongest[a] == strongest[b]) for a, b in pairs)
        page.open()
        page.click("#conversations .open")
        page.click(".toggle")
        assert Select(page.one(".token-bar select")).first_selected_option.text == "expert of layer 2"

    def test_an_expert_lights_up_its_tokens(self, page: Page) -> None:
        spans = self.show(page, "one two three four five six seven")
        page.wait(lambda: page.all(".prompt-tokens"))
        page.js("arguments[0].click()", spans[2])
        layer, place = 1, 2
        expert = routes_of(2)[layer][place]
        page.all("#inspector .routes tr")[layer].find_elements("css selector", ".expert")[place].click()
        expected = [expert in routes_of(index)[layer] for index in range(len(spans))]
        assert ["lit" in span.get_attribute("class") for span in spans] == expected
        assert page.text(".chip").startswith(f"layer 2, expert {expert}: {sum(expected)} of {len(spans)} tokens")
        page.click(".chip")
        assert not page.all(".lit") and not page.all(".chip")

    def test_without_details_nothing_is_asked_or_offered(self, page: Page, stub: Stub) -> None:
        page.click("#open-settings")
        page.click("[name=details]")
        page.save_settings()
        page.say("plain")
        assert not {"token_details", "return_routes"} & stub.requests[0].keys()
        assert not page.all(".toggle") and page.text(".stats").startswith("3 tokens")
