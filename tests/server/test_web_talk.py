"""Conversations and texts that outgrow the context, go on, are compared; the panel's scopes; the page's languages."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from web_browser import NEEDS_BROWSER, PHONE, Page
from web_stub import LAYERS, NUM_EXPERTS, TOP_K, WEB, Stub, routes_of

from moestro.routing import stats

pytest_plugins = ("web_fixtures",)


@NEEDS_BROWSER
class TestContext:
    def test_the_meter_counts_conversation_and_draft(self, page: Page, stub: Stub) -> None:
        page.wait(lambda: page.text("#meter-words") == "context 0 / 4,096 tokens")
        page.say("one two")  # three tokens, and an answer of 1 + 4
        page.wait(lambda: page.text("#meter-words") == "context 8 / 4,096 tokens")
        page.one("#question").send_keys("three")
        page.wait(lambda: page.text("#meter-words") == "context 10 / 4,096 tokens")
        assert page.one("#meter-bar").get_attribute("aria-valuenow") == "10"

    def test_the_oldest_exchanges_are_left_out_with_a_notice(self, page: Page, stub: Stub) -> None:
        stub.limit = 24
        page.open()
        for word in ("a", "b"):  # 2 + 4 tokens each, and 6 are kept for the answer
            page.say(f"{word} {word}")
        assert not page.all("#notice")
        page.say("c c")
        sent = [message["content"] for message in stub.requests[-1]["messages"]]
        assert sent == ["b b", "You said: b b", "c c"]
        assert stub.requests[-1]["max_tokens"] == 24 - (3 + 5 + 3)
        assert "The oldest exchange was left out" in page.text("#notice-text")
        assert "the oldest exchange was left out" in page.text("article:last-child .stats")
        page.click(".toggle")
        page.wait(lambda: page.all(".prompt-tokens"))
        assert len(stub.traced[-1]) == (3 + 5 + 3) + 4  # the trace is of what was sent

    def test_a_question_alone_too_long_says_so_and_can_be_shortened(self, page: Page, stub: Stub) -> None:
        stub.limit = 8
        page.open()
        page.say("one two three four five six seven eight")
        assert page.text(".error span").startswith("This has 9 tokens, and the model’s context is 8.")
        assert stub.requests == []
        assert [button.text for button in page.all(".error button")] == ["New conversation", "Edit the question"]


@NEEDS_BROWSER
class TestContinue:
    def test_a_long_answer_goes_on_in_place(self, page: Page, stub: Stub) -> None:
        page.say("cut")
        assert page.text(".stats").endswith("stopped at the length limit")
        page.click(".more")
        page.finish()
        assert page.text(".answer > .markdown") == "You said: cut and so on"
        assert stub.requests[-1]["prompt"] == [900, 901, 0, 1, 2]  # the question, then the answer's own tokens
        assert page.text(".stats").startswith("6 tokens") and not page.all(".more")
        page.click(".toggle")
        page.wait(lambda: page.all(".prompt-tokens"))
        assert stub.traced[-1] == [900, 901, 0, 1, 2, 0, 1, 2]
        page.say("next")
        assert stub.requests[-1]["messages"][1]["content"] == "You said: cut and so on"

    def test_a_whole_answer_is_not_continued(self, page: Page) -> None:
        page.say("hello")
        assert not page.all(".more")


@NEEDS_BROWSER
class TestText:
    @pytest.fixture(autouse=True)
    def base(self, page: Page, stub: Stub) -> None:
        stub.is_base = True
        page.open()
        page.one("#text")

    def text(self, page: Page) -> str:
        return str(page.one("#text").get_attribute("value"))

    def test_a_base_model_continues_a_text_in_place(self, page: Page, stub: Stub) -> None:
        assert page.text("#hello") == "Begin a text" and not page.all("#composer")
        page.one("#text").send_keys("It was")
        page.click("#write")
        page.wait(lambda: page.all(".stats"))
        page.finish()
        assert self.text(page) == "It was and so on"
        sent = stub.requests[-1]
        assert (sent["prompt"], sent["max_tokens"], sent["temperature"]) == ("It was", 128, 0.7)
        page.one("#text").send_keys(" then")
        page.click("#write")
        page.finish()
        page.wait(lambda: self.text(page) == "It was and so on then and so on")
        assert stub.requests[-1]["prompt"] == "It was and so on then"
        for step in ("It was and so on then", "It was and so on", "It was"):
            page.click("#undo")
            assert self.text(page) == step
        page.open()
        page.click("#conversations .open")
        assert self.text(page) == "It was"

    def test_its_tokens_stand_where_the_text_was(self, page: Page, stub: Stub) -> None:
        page.one("#text").send_keys("It was")
        page.click("#write")
        page.finish()
        page.click(".toggle")
        page.wait(lambda: page.all(".prompt-tokens .token"))
        assert not page.all("#text") and len(page.all(".token")) == 3 + 3
        assert stub.traced == [[900, 901, 902, 0, 1, 2]]
        page.click(".toggle")
        assert self.text(page) == "It was and so on"

    def test_a_text_that_is_too_long_keeps_its_end(self, page: Page, stub: Stub) -> None:
        stub.limit = 16
        page.open()
        page.one("#text").send_keys(" ".join("abcdefghijklmnopqrs"))  # 19 tokens and one in front; 4 stay free
        page.click("#write")
        page.finish()
        assert stub.requests[-1]["prompt"] == [900, *range(909, 920)] and stub.requests[-1]["max_tokens"] == 4
        assert "Its first 8 tokens were not read" in page.text("#notice-text")

    def test_it_can_be_asked_to_chat_all_the_same(self, page: Page, stub: Stub) -> None:
        page.click("#mode label:has([value=chat])")
        assert "trained on plain text" in page.text("#about-mode")
        page.open()
        page.say("hello")
        assert stub.requests[-1]["messages"] == [{"role": "user", "content": "hello"}]

    @pytest.mark.parametrize("is_base", [True, False])
    def test_examples_are_one_click_away(self, page: Page, stub: Stub, is_base: bool) -> None:
        stub.is_base = is_base
        page.open()
        example = page.all("#example-list button")[0]
        words = example.text
        example.click()
        page.wait(lambda: stub.requests)
        page.finish()
        (sent,) = stub.requests
        assert (sent["prompt"].strip() if is_base else sent["messages"][0]["content"]) == words
        assert not page.all("#empty")


@NEEDS_BROWSER
class TestScopes:
    def loads(self, tokens: range) -> np.ndarray[Any, Any]:
        load = np.zeros((len(LAYERS), NUM_EXPERTS), int)
        for token in tokens:
            for layer, row in enumerate(routes_of(token)):
                np.add.at(load[layer], row, 1)
        return load

    def test_the_load_of_an_answer_and_of_the_conversation(self, page: Page) -> None:
        page.say("one two three")  # five tokens
        page.say("four")
        page.wait(lambda: page.all("#load"))
        first, second = self.loads(range(5)), self.loads(range(3))
        for scope, load in (("answer", second), ("conversation", first + second)):
            page.click(f"#window label:has([value={scope}])")
            assert page.text("#entropy .number") == f"{stats.load_entropy(load).mean():.3f}"
            assert page.text("#vio .number") == f"{stats.max_vio(load).mean():.2f}"
            assert page.text("#panel-about").endswith(f"· {load[0].sum() // TOP_K} tokens")
        page.all(".toggle")[0].click()  # an answer that is opened is the one that is shown
        page.click("#window label:has([value=answer])")
        assert page.text("#dead .number") == str(stats.dead_experts(first).sum())
        assert "(max − mean) ÷ mean" in page.text("#vio-what")

    def test_a_click_on_a_cell_lights_up_its_tokens(self, page: Page) -> None:
        page.say("one two three four five six")
        page.wait(lambda: page.all("#load"))
        page.click("#load")
        layer, expert = re.search(r"(\S+), expert (\d+)", page.text("#load-words")).groups()  # type: ignore[union-attr]
        spans = page.wait(lambda: page.all(".token"))
        expected = [int(expert) in routes_of(index)[LAYERS.index(layer)] for index in range(len(spans))]
        assert ["lit" in span.get_attribute("class") for span in spans] == expected

    def test_two_answers_side_by_side(self, page: Page) -> None:
        page.say("one two three")
        page.say("four")
        first, second = page.all(".toggle-compare")
        first.click()
        assert second.text == "Compare with this" and first.get_attribute("aria-pressed") == "true"
        second.click()
        page.one("#compare")
        same = [cell.text for cell in page.all(".comparison tbody td:nth-child(2)")]
        assert same == ["100 %"] * len(LAYERS)  # the stub's experts follow the place
        a, b = ((load / load.sum(1, keepdims=True)) for load in (self.loads(range(5)), self.loads(range(3))))
        overlap = [f"{100 * share:.0f} %" for share in np.minimum(a, b).sum(1)]
        assert [cell.text for cell in page.all(".comparison tbody td:nth-child(3)")] == overlap
        assert "At 3 places that both answers have (3 with the same token), 100 %" in page.text("#compare-body")
        assert "would give 13 %" in page.text("#compare-body")
        page.click("#close-compare")
        assert page.all(".toggle-compare")[0].get_attribute("aria-pressed") == "false"


@NEEDS_BROWSER
class TestLanguage:
    def choose(self, page: Page, language: str) -> None:
        page.click("#open-settings")
        page.js("document.querySelector('[name=language]').value = arguments[0]", language)
        page.save_settings()

    def test_it_can_be_switched_at_any_time(self, page: Page) -> None:
        page.say("hello")
        self.choose(page, "ko")
        assert page.js("return document.documentElement.lang") == "ko"
        assert "전문가 부하" in page.text("#panel")
        assert page.text(".stats").startswith("토큰 3개 · ")
        page.click(".toggle")
        page.hover(page.all(".token")[1])
        page.wait(lambda: "선택된 전문가" in page.text("#inspector"))
        page.open()
        assert page.one("#question").get_attribute("placeholder") == "메시지를 입력하세요"
        self.choose(page, "en")
        assert page.one("#question").get_attribute("placeholder") == "Write a message"

    def test_it_follows_the_browser(self, page: Page) -> None:
        page.emulate("setUserAgentOverride", userAgent="test", acceptLanguage="fr,ko-KR,en")
        page.open()
        assert page.js("return document.documentElement.lang") == "ko" and page.text("#hello") == "무엇이 궁금하세요?"
        page.emulate("setUserAgentOverride", userAgent="", acceptLanguage="fr")
        page.open()
        assert page.js("return document.documentElement.lang") == "en"

    @pytest.mark.parametrize("language", ["en", "ko"])
    def test_a_phone_holds_all_of_it(self, page: Page, stub: Stub, language: str) -> None:
        page.emulate("setDeviceMetricsOverride", **PHONE)
        self.choose(page, language)
        page.open()
        assert page.overflow <= 0
        stub.is_base = True
        page.open()
        assert page.overflow <= 0
        page.click("#example-list button")
        page.finish()
        page.click(".toggle")
        page.wait(lambda: page.all(".prompt-tokens .token"))
        page.js("arguments[0].click()", page.all(".token")[1])
        page.one("#inspector-below #inspector")
        assert page.overflow <= 0


def strings(language: str) -> dict[str, str]:
    text = (WEB / f"strings-{language}.js").read_text("utf-8")
    rows = re.findall(r'^  "([\w.]+)": "(.*)",$', text, re.MULTILINE)
    assert len(rows) == len(dict(rows)) == text.count("\n  ")  # every line of the table, and none twice
    return dict(rows)


class TestStrings:
    def test_both_languages_say_the_same_things(self) -> None:
        english, korean = strings("en"), strings("ko")
        assert list(english) == list(korean) == sorted(english)
        for key, text in english.items():
            values = [set(re.findall(r"\{(\w+)\}", form)) for form in text.split("|")]
            assert values[-1] == set(re.findall(r"\{(\w+)\}", korean[key])) and values[0] <= values[-1], key
            assert text.count("|") <= ("{count}" in text) and "|" not in korean[key], key
            assert korean[key].lower() == text.lower() or key == "percent" or re.search("[가-힣]", korean[key]), key

    def test_every_string_is_there_and_used(self) -> None:
        own = [path for path in WEB.iterdir() if path.name.endswith((".js", ".html"))]
        text = "".join(path.read_text("utf-8") for path in own if not path.name.startswith("strings-"))
        asked = set(re.findall(r'\bt\("([^"]+)"', text)) | set(re.findall(r'data-t(?:-\w+)?="([^"]+)"', text))
        known = strings("en").keys()
        assert asked <= known
        assert {key for key in known if f'"{key}"' not in text} == set()

    def test_the_page_holds_no_words_of_its_own(self) -> None:
        html = (WEB / "index.html").read_text("utf-8")
        body = re.sub(r"<noscript>.*?</noscript>|<option[^>]*lang=.*?</option>", "", html[html.index("<body") :])
        words = set(re.findall(r">([^<>\n]*[A-Za-z가-힣][^<>\n]*)<", body))
        assert words == {"Moestro", "MaxVio"}
