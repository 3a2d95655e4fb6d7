"""The chat page in a real browser, as a person meets it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")
SECONDS = 60  # a page that has not come to it by then never does
PHONE = {"width": 390, "height": 740, "deviceScaleFactor": 2, "mobile": True}


class Page:
    """The page as a person meets it; every wait is for something seen."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, first: bool = False) -> None:
        self.driver.get(self.url)
        if first:
            self.js("localStorage.clear(); sessionStorage.clear()")
            self.driver.get(self.url)
        self.wait(lambda: self.js("return document.documentElement.classList.contains('ready')"))
        self.wait(lambda: self.text("#model") != "…")

    def js(self, code: str, *args: object) -> Any:
        return self.driver.execute_script(code, *args)

    def module(self, code: str, *args: object) -> Any:
        """What async code returns that may import the page's modules."""
        wrapped = f"const done = arguments[arguments.length - 1]; const args = arguments; (async () => {{ {code} }})()"
        return self.driver.execute_async_script(f"{wrapped}.then(done, (error) => done(String(error)));", *args)

    def wait(self, seen: Callable[[], Any]) -> Any:
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, SECONDS, 0.03).until(lambda _: seen())

    def all(self, css: str) -> list[Any]:
        return [node for node in self.driver.find_elements("css selector", css) if node.is_displayed()]

    def one(self, css: str) -> Any:
        return self.wait(lambda: self.all(css))[0]

    def last(self, css: str) -> Any:
        return self.wait(lambda: self.all(css))[-1]

    def text(self, css: str) -> str:
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", css))

    def click(self, css: str) -> None:
        self.last(css).click()

    def button(self, label: str) -> None:
        self.click(f'main [aria-label="{label}"]')

    def ask(self, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.one("#question").send_keys(text, Keys.ENTER)

    def finish(self) -> None:
        self.wait(lambda: self.js("return !document.body.classList.contains('running')"))

    def say(self, text: str) -> None:
        """Ask, and wait for the end of the answer."""
        self.ask(text)
        self.wait(lambda: self.all("article.user"))
        self.finish()

    def press(self, *keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def hover(self, node: Any) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).move_to_element(node).perform()

    def set_field(self, name: str, value: str) -> None:
        field = self.one(f"#settings [name={name}]")
        field.clear()
        field.send_keys(value)

    def save_settings(self) -> None:
        self.click("#settings .primary")
        self.wait(lambda: not self.all("#settings"))

    def emulate(self, command: str, **options: object) -> None:
        self.driver.execute_cdp_cmd(f"Emulation.{command}", options)

    def use_scheme(self, scheme: str) -> None:
        self.emulate("setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def brightness(self) -> float:
        """Of the background, 0 to 255."""
        color = self.js("return getComputedStyle(document.documentElement).backgroundColor")
        return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3

    @property
    def experts(self) -> Any:
        """The experts of the token in the inspector, by layer."""
        return self.js(
            "return [...document.querySelectorAll('#inspector .routes tr')]"
            ".map((row) => [...row.querySelectorAll('.expert b')].map((node) => Number(node.textContent)))"
        )

    @property
    def overflow(self) -> int:
        """Pixels by which anything that is seen, at rest, reaches over the right edge or can be moved sideways."""
        self.wait(lambda: self.js("return document.getAnimations().length === 0"))
        return int(
            self.js(
                "const wide = [...document.querySelectorAll('#scroller, #list, #panel, dialog, body, html')]"
                ".filter((node) => node.checkVisibility())"
                ".map((node) => node.scrollWidth - node.clientWidth);"
                "const parts = 'header *, #composer, #meter, article, #inspector, #panel *, dialog';"
                "const over = [...document.querySelectorAll(parts)]"
                ".map((node) => node.getBoundingClientRect().right - innerWidth);"
                "return Math.ceil(Math.max(...wide, ...over))"
            )
        )
