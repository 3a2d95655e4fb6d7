"""The page around the chat in a real browser: settings, errors, branches, storage, the panel, widths and themes.

What needs no browser stands last: the files are whole, self-contained and legible.
"""

from __future__ import annotations

import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from web_browser import NEEDS_BROWSER, PHONE, Page
from web_stub import LAYERS, NUM_EXPERTS, TOP_K, WEB, Stub, even_load, make_routing

from moestro.routing import stats

pytest_plugins = ("web_fixtures",)

VENDORED = {  # unchanged files of the npm packages marked 18.2.1 and dompurify 3.4.18
    "marked.esm.js": "5371fea86fd0656b4fc7bea7c94c663109d82789b69433eeee78d42895aa44de",
    "purify.es.mjs": "1a06b721ad8b46d6174b21f22ea70290aaf3e5a81d65af3b7178113953f7c9b1",
}
LARGEST = 500  # lines of a file


@NEEDS_BROWSER
class TestSettings:
    def test_they_are_sent_and_kept(self, page: Page, stub: Stub) -> None:
        page.click("#open-settings")
        for name, value in {"temperature": "0.25", "top_p": "0.9", "max_tokens": "64", "seed": "7"}.items():
            page.set_field(name, value)
        page.set_field("system", "Be brief.")
        page.set_field("key", "secret-key")
        page.save_settings()
        page.open()
        page.say("hello")
        (sent,) = stub.requests
        assert {name: sent[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
            "temperature": 0.25, "top_p": 0.9, "max_tokens": 64, "seed": 7,
        }  # fmt: skip
        assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
        assert stub.keys == ["Bearer secret-key"]
        assert "secret-key" not in page.js("return JSON.stringify({...localStorage})")
        assert page.js("return sessionStorage.length") == 1

    def test_values_out_of_range_are_refused(self, page: Page, stub: Stub) -> None:
        page.click("#open-settings")
        page.set_field("top_p", "1.5")
        page.click("#settings .primary")
        assert page.all("#settings")
        page.click("#cancel-settings")
        page.say("hello")
        assert stub.requests[0]["top_p"] == 0.9


@NEEDS_BROWSER
class TestErrors:
    def remedies(self, page: Page) -> list[str]:
        return [button.text for button in page.all(".error button")]

    def test_an_error_of_the_server_may_be_tried_again(self, page: Page, stub: Stub) -> None:
        stub.failures = [(500, "the engine failed", {})]
        page.say("hello")
        assert page.text(".error span") == "the engine failed (500)"
        page.click(".error button")
        page.wait(lambda: page.text(".answer > .markdown") == "You said: hello")
        page.finish()
        assert not page.all(".error") and len(page.all("article")) == 2 and not page.all(".branches")

    def test_a_busy_server_is_asked_again_when_it_said(self, page: Page, stub: Stub) -> None:
        stub.failures = [(429, "the queue is full", {"Retry-After": "1"})] * 2
        page.say("hello")
        assert page.text(".error span") == "The server is busy: the queue is full."
        page.wait(lambda: page.text(".answer > .markdown") == "You said: hello")
        page.finish()
        assert len(stub.requests) == 3 and not page.all(".error")
        stub.failures = [(429, "the queue is full", {"Retry-After": "500"})]
        page.say("again")
        assert "Asking again in 500 seconds." in page.text("article:last-child .error")
        assert self.remedies(page) == ["Do not wait"]
        page.click(".error button")
        assert self.remedies(page) == ["Try again"]

    def test_what_the_server_refuses_is_not_tried_again(self, page: Page, stub: Stub) -> None:
        stub.failures = [(400, "top_p: too small", {})]
        page.say("hello")
        assert page.text(".error span") == "top_p: too small (400)"
        assert self.remedies(page) == ["Edit the question", "Settings"]
        page.all(".error button")[0].click()
        assert page.one(".editor").get_attribute("value") == "hello"

    def test_a_context_that_is_too_small_leads_to_a_new_conversation(self, page: Page, stub: Stub) -> None:
        stub.failures = [(400, "the context is 8 tokens", {}, "context_length_exceeded")]
        page.say("hello")
        assert self.remedies(page) == ["New conversation", "Edit the question"]
        page.all(".error button")[0].click()
        assert page.all("#empty") and not page.all("article")

    @pytest.mark.parametrize(
        ("word", "line"),
        [("broken", "The answer broke off"), ("midway", "the engine failed over this request")],
    )
    def test_what_came_before_an_error_stays_and_goes_on(self, page: Page, stub: Stub, word: str, line: str) -> None:
        page.say(word)
        assert page.text(".error span").startswith(line)
        assert page.text(".answer > .markdown") == "You said:"
        assert self.remedies(page) == ["Continue"]
        page.click(".error button")
        page.finish()
        assert page.text(".answer > .markdown") == "You said: and so on" and not page.all(".error")
        assert stub.requests[-1]["prompt"] == [900, 901, 0, 1]  # of the question, then of the answer so far

    def test_a_server_that_is_closing_is_asked_again(self, page: Page, stub: Stub) -> None:
        stub.failures = [(503, "the server is shutting down", {"Retry-After": "5"})]
        page.ask("hello")
        page.wait(lambda: page.text(".answer > .markdown") == "You said: hello")
        page.finish()
        assert len(stub.requests) == 2 and not page.all(".error")

    def test_the_page_goes_on_when_the_server_is_back(self, page: Page, stub: Stub) -> None:
        stub.is_gone = True
        page.ask("hello")
        page.wait(lambda: page.text(".error span") == "The server cannot be reached.")
        assert "trying again" in page.text("#model") and self.remedies(page) == ["Do not wait"]
        stub.is_gone = False
        page.wait(lambda: page.text(".answer > .markdown") == "You said: hello")
        page.finish()
        assert page.text("#model") == "stub-moe" and not page.all(".error") and len(page.all("article")) == 2

    def test_the_key_is_asked_for(self, page: Page, stub: Stub) -> None:
        stub.key = "sesame"
        page.driver.get(stub.url)
        page.one("#settings [name=key]")
        assert page.text("#model") == "API key needed"
        assert page.text("#key-note") == "This server asks for an API key."
        page.set_field("key", "wrong")
        page.click("#settings .primary")
        page.wait(lambda: page.text("#key-note") == "The server does not accept this API key.")
        page.set_field("key", "sesame")
        page.save_settings()
        page.wait(lambda: page.text("#model") == "stub-moe")
        page.wait(lambda: page.all("#load"))
        page.say("hello")
        assert page.text(".answer > .markdown") == "You said: hello"
        stub.key = "changed"
        page.say("hello")
        assert page.one("#settings [name=key]") and "API key" in page.text("article:last-child .error span")
        page.click("#cancel-settings")


@NEEDS_BROWSER
class TestConversations:
    def edit(self, page: Page, text: str) -> None:
        page.hover(page.last(".said"))
        page.button("Edit and ask again")
        page.one(".editor").clear()
        page.one(".editor").send_keys(text)
        page.click(".edit .primary")
        page.wait(lambda: page.text("article.user:nth-last-child(2) .said") == text)
        page.finish()

    def test_editing_and_answering_again_leave_a_way_back(self, page: Page, stub: Stub) -> None:
        page.say("first")
        page.say("second")
        self.edit(page, "other")
        assert [message["content"] for message in stub.requests[-1]["messages"]] == [
            "first",
            "You said: first",
            "other",
        ]
        page.button("Answer again")
        page.finish()
        assert stub.requests[-1]["messages"] == stub.requests[-2]["messages"]
        assert [node.text for node in page.all(".branches")] == ["2 / 2", "2 / 2"]
        page.all('[aria-label="Previous version"]')[0].click()
        assert [node.text for node in page.all(".said")] == ["first", "second"]
        page.button("Next version")
        assert [node.text for node in page.all(".said")] == ["first", "other"]
        assert [node.text for node in page.all(".branches")] == ["2 / 2", "2 / 2"]

    def test_they_outlast_the_page(self, page: Page) -> None:
        page.say("first")
        page.click("#list .new-chat")
        assert page.all("#empty") and not page.all("article")
        page.say("second")
        page.open()
        assert [node.text for node in page.all("#conversations .open")] == ["second", "first"]
        page.one("#search").send_keys("said: fi")
        assert [node.text for node in page.all("#conversations .open")] == ["first"]
        page.click("#conversations .open")
        assert page.text(".answer > .markdown") == "You said: first"
        page.hover(page.one("#conversations li"))
        page.click("#conversations .quiet")
        page.driver.switch_to.alert.accept()
        page.open()
        assert [node.text for node in page.all("#conversations .open")] == ["second"]

    def test_export_and_import(self, page: Page, tmp_path: Any) -> None:
        page.say("keep me")
        page.click("#export")
        path = page.driver.downloads / "moestro-conversations.json"
        page.wait(path.exists)
        page.js("localStorage.clear()")
        page.open()
        assert not page.all("#conversations .open")
        page.js("document.getElementById('import-file').hidden = false")
        choose = page.one("#import-file")
        choose.send_keys(str(path))
        page.wait(lambda: page.text("#notice-text") == "1 conversation imported.")
        page.click("#conversations .open")
        page.click(".toggle")
        assert len(page.all(".token")) == 4
        path.unlink()
        tree = {"format": "moestro-conversations", "version": 1, "conversations": [{"id": "../x", "messages": []}]}
        for text, line in {"[": "not JSON", "[]": "no conversations exported", json.dumps(tree): "its id"}.items():
            wrong = tmp_path / "wrong.json"
            wrong.write_text(text)
            choose.send_keys(str(wrong))
            page.wait(lambda line=line: line in page.text("#notice-text"))

    def test_a_full_storage_gives_up_old_tokens_first(self, page: Page) -> None:
        kept = page.module(
            "const { Store, Conversation } = await import('/web/store.js'); const store = new Store();"
            "const make = (updated, size) => { const one = new Conversation({ updated });"
            "const answer = one.add(one.add(null, 'user', 'q'), 'assistant', 'text');"
            "answer.tokens = [{ id: 1, text: 'x'.repeat(size), logprob: null, routes: null }]; return one; };"
            "const all = [make(1, 2e6), make(2, 2e6), make(3, 2e6)]; all.forEach((one) => store.save(one));"
            "const tell = ({ updated, messages: [, { tokens, content }] }) => [updated, Boolean(tokens), content];"
            "const found = new Store().list.map(tell);"
            "let line = ''; const huge = make(4, 1); huge.messages[0].content = 'y'.repeat(6e6);"
            "try { store.save(huge); } catch (error) { line = error.message; } return [found, line];"
        )
        assert kept[0] == [[3, True, "text"], [2, True, "text"], [1, False, "text"]]
        assert "storage is full" in kept[1]


@NEEDS_BROWSER
class TestPanel:
    def figure(self, page: Page, name: str) -> str:
        return page.text(f"#{name} .number")

    @pytest.mark.parametrize("window", ["recent", "total"])
    def test_figures_are_those_of_the_package(self, page: Page, stub: Stub, window: str) -> None:
        page.wait(lambda: page.all("#load"))
        page.click(f"#window label:has([value={window}])")
        load = np.array(stub.routing[window]["load"])  # type: ignore[index]
        assert self.figure(page, "ratio") == f"{stats.max_over_mean(load).max():.2f}×"
        worst = LAYERS[int(stats.max_over_mean(load).argmax())]
        assert f"layer {worst}" in page.text("#ratio") or f"in {worst}" in page.text("#ratio")
        assert self.figure(page, "vio") == f"{stats.max_vio(load).mean():.2f}"
        assert self.figure(page, "dead") == str(stats.dead_experts(load).sum()) == "1"
        assert self.figure(page, "entropy") == f"{stats.load_entropy(load).mean():.3f}"
        assert f"6 MoE layers × 32 experts, 4 a token · {load[0].sum() // TOP_K:,} tokens" == page.text("#panel-about")

    def test_hover_and_keys_tell_the_values_of_a_cell(self, page: Page, stub: Stub) -> None:
        from selenium.webdriver.common.keys import Keys

        canvas = page.one("#load")
        page.hover(canvas)
        words = page.text("#load-words")
        layer, expert = re.search(r"(?:layer )?(\S+), expert (\d+)", words).groups()  # type: ignore[union-attr]
        load = np.array(stub.routing["recent"]["load"])  # type: ignore[index]
        row = load[LAYERS.index(layer)]
        assert f"{row[int(expert)] / row.mean():.2f}× the mean, {row[int(expert)]:,} token" in words
        page.hover(page.one("#model"))
        page.js("arguments[0].focus()", canvas)
        page.press(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
        assert page.text("#load-words").startswith("layer 2, expert 1: ")

    def test_it_follows_the_server_while_an_answer_is_written(self, page: Page, stub: Stub) -> None:
        page.wait(lambda: page.all("#load"))
        page.ask("slow")
        page.wait(lambda: page.all("#stop"))
        before = stub.num_polls
        stub.routing = make_routing(even_load(seed=1, tokens=40))
        expected = stats.load_entropy(stub.routing["recent"]["load"]).mean()
        page.wait(lambda: self.figure(page, "entropy") == f"{expected:.3f}")
        page.wait(lambda: stub.num_polls >= before + 5)  # idle, it would ask twice in the time of waiting
        assert "Only 5.0 choices an expert" in page.text("#few")
        stub.gate.set()
        page.finish()

    def test_layers_without_a_token(self, page: Page, stub: Stub) -> None:
        stub.routing = make_routing(np.zeros((6, NUM_EXPERTS), int).tolist())
        page.open()
        page.wait(lambda: page.all("#load"))
        assert [self.figure(page, name) for name in ("ratio", "vio", "dead", "entropy")] == ["–"] * 4

    def test_a_dense_model_and_a_server_that_does_not_tell(self, page: Page, stub: Stub) -> None:
        stub.routing = make_routing([], [])
        page.open()
        page.wait(lambda: "no MoE layers" in page.text("#panel-note"))
        stub.routing = None
        page.open()
        page.wait(lambda: "does not report its routing" in page.text("#panel-note"))
        assert not page.all("#load")


@NEEDS_BROWSER
class TestLook:
    def test_a_phone_needs_no_sideways_scrolling(self, page: Page, stub: Stub) -> None:
        page.emulate("setDeviceMetricsOverride", **PHONE)
        page.open()
        assert page.js("return innerWidth") == PHONE["width"] and page.overflow <= 0
        assert not page.all("#list") and not page.all("#panel")
        stub.gate.set()
        for word in ("markdown", "wide", "think"):
            page.one("#question").send_keys(word)
            page.click("#send")  # Enter begins a line here
            page.finish()
            page.wait(lambda word=word: page.all(".said")[-1].text == word)
            assert page.overflow <= 0, word
        page.click(".toggle")
        page.js("arguments[0].click()", page.last(".token"))
        assert page.all("#inspector-below #inspector") and page.overflow <= 0
        page.click("#close-inspector")
        page.click("header [data-drawer=panel-open]")
        page.wait(lambda: page.all("#load"))
        assert page.overflow <= 0
        page.click("#close-panel")
        page.click("header [data-drawer=list-open]")
        assert page.one("#list") and page.overflow <= 0
        page.click("#close-list")
        page.click("#open-settings")
        assert page.overflow <= 0
        page.click("#cancel-settings")
        assert not page.all("#panel") and not page.all("#list")

    def test_light_and_dark(self, page: Page) -> None:
        page.use_scheme("light")
        assert page.brightness() > 200
        page.use_scheme("dark")
        assert page.brightness() < 60
        page.click("#theme")
        assert page.brightness() > 200 and page.one("#theme").get_attribute("aria-label") == "Theme: light"
        page.open()
        assert page.brightness() > 200
        page.click("#theme")
        page.use_scheme("light")
        assert page.brightness() < 60
        page.click("#theme")
        assert page.brightness() > 200 and page.one("#theme").get_attribute("aria-label") == "Theme: light"
        page.click("#theme")
        page.use_scheme("dark")
        assert page.brightness() < 60 and page.one("#theme").get_attribute("aria-label") == "Theme: system"

    def test_a_chosen_theme_stands_before_the_page_is_drawn(self, page: Page, stub: Stub) -> None:
        page.use_scheme("light")
        page.click("#theme")
        stub.missing = "app.js"
        page.driver.get(page.url)
        assert page.brightness() < 60 and not page.js("return document.documentElement.classList.contains('ready')")

    @pytest.mark.parametrize(("scheme", "ink"), [("light", "#1d1f23"), ("dark", "#eceae5")])
    def test_tokens_are_legible_in_every_colour(self, page: Page, scheme: str, ink: str) -> None:
        page.use_scheme(scheme)
        page.say("hello")
        page.click(".toggle")
        page.wait(lambda: page.all(".prompt-tokens"))
        grounds = page.js(
            """const [box, token] = [document.querySelector('.token-text'), document.querySelectorAll('.token')[1]];
            const context = document.createElement('canvas').getContext('2d'); const found = [];
            const paint = (css) => { context.fillStyle = css; context.fillRect(0, 0, 1, 1); };
            const read = (name, value) => {
              token.style.setProperty(name, value);
              paint(getComputedStyle(document.documentElement).backgroundColor);
              paint(getComputedStyle(token).backgroundColor);
              const bytes = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
              found.push('#' + bytes.map((byte) => byte.toString(16).padStart(2, '0')).join(''));
            };
            for (const surprise of [0, 0.5, 1]) read('--level', surprise);
            box.dataset.colour = 'expert';
            for (let hue = 0; hue < 360; hue += 15) read('--hue', hue);
            return found;"""
        )
        assert len(set(grounds)) > 20 and min(contrast(ground, ink) for ground in grounds) >= 4.5

    def test_less_motion_where_asked_for(self, page: Page, stub: Stub) -> None:
        page.emulate("setEmulatedMedia", features=[{"name": "prefers-reduced-motion", "value": "reduce"}])
        page.ask("slow")
        page.wait(lambda: page.all("#stop"))
        moving = "return document.getAnimations().length"
        assert page.js(moving) == 0
        stub.gate.set()
        page.finish()

    def test_everything_that_can_be_used_has_a_name(self, page: Page) -> None:
        page.say("markdown")
        page.click(".toggle")
        page.click("#open-settings")
        nameless = page.js(
            "const hasName = (node) => node.ariaLabel || node.textContent.trim() || node.labels?.length;"
            "const all = document.querySelectorAll('button, input, select, textarea, a, canvas, [tabindex=\"0\"]');"
            "return [...all].filter((node) => !hasName(node) && !node.ariaHidden).map((node) => node.outerHTML)"
        )
        assert nameless == []


class Tags(HTMLParser):
    """Start tags with attributes, and what scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.inline = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] in ("script", "style"):
            self.inline += data.strip()


def own_files() -> dict[str, str]:
    names = [path.name for path in WEB.iterdir() if path.name not in VENDORED and not path.name.endswith(".LICENSE")]
    return {name: (WEB / name).read_text("utf-8") for name in names}


class TestFiles:
    def test_vendored_files_are_those_that_were_published(self) -> None:
        found = {name: hashlib.sha256((WEB / name).read_bytes()).hexdigest() for name in VENDORED}
        assert found == VENDORED

    def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(self) -> None:
        page = Tags(own_files()["index.html"])
        assert page.inline == ""
        for tag, attrs in page.found:
            assert not [name for name in attrs if name == "style" or name.startswith("on")], tag
            for target in (attrs.get("src"), attrs.get("href")):
                assert target is None or target.startswith("#") or (WEB / target.removeprefix("web/")).is_file()
        for name, text in own_files().items():
            assert set(re.findall(r"https?://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}, name
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|url\(|@import", text), name

    def test_every_module_that_is_imported_is_there_and_every_file_is_used(self) -> None:
        files = own_files()
        imported = {name for text in files.values() for name in re.findall(r'from "\./([^"]+)"', text)}
        linked = set(re.findall(r'"web/([^"]+)"', files["index.html"]))
        assert imported | linked | {"index.html"} == files.keys() | VENDORED.keys()

    def test_files_are_short(self) -> None:
        assert not {name for name, text in own_files().items() if len(text.splitlines()) > LARGEST}

    @pytest.mark.parametrize("theme", [0, 1])
    def test_text_has_contrast(self, theme: int) -> None:
        """WCAG 2 AA: 4.5 for text, 3 for the edges of fields."""
        style = own_files()["style.css"]
        colors = {name: pair[theme] for name, *pair in re.findall(r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", style)}
        for ground in ("paper", "card", "side", "said"):
            for text in ("ink", "muted", "accent", "bad"):
                assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)
            assert ground == "said" or contrast(colors["edge"], colors[ground]) >= 3  # no field stands on it


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
