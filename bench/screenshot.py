"""The picture of the page in the README: a text that a model continued, its tokens, and one token's experts.

    moestro train --preset demo --out runs/demo && python bench/screenshot.py runs/demo

Writes docs/figures/page.png. Needs Chromium with its driver, and selenium, which the tests need, too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "docs" / "figures" / "page.png"
WIDTH, HEIGHT = 1280, 800
SECONDS = 120
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run "
    "--force-color-profile=srgb --hide-scrollbars --lang=en"
)
SETTINGS = '{"temperature":0.6,"seed":%d,"max_tokens":%d,"mode":"text","theme":"light"}'


@contextmanager
def serve(model: Path) -> Iterator[str]:
    """A server of the model on a free port of this machine; its address."""
    command = [sys.executable, "-m", "moestro", "serve", str(model), "--port", "0", "--served-name", "demo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            found = next(filter(None, (re.search(r"http://127\S+:\d+", line) for line in server.stdout)), None)
            if found is None:
                sys.exit(f"the server of {model} did not start")
            yield found[0]
        finally:
            server.terminate()


@contextmanager
def browse(url: str) -> Iterator[Any]:
    """A browser of the picture's size, at the page."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in FLAGS.split():
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
    size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(url)
    yield browser
    browser.quit()


def take(browser: Any, beginning: str, index: int, settings: str) -> bytes:
    """Have the beginning continued, open its tokens, point at one, and take the picture."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(seen: Callable[[], object]) -> None:
        WebDriverWait(browser, SECONDS, 0.1).until(lambda _: seen())

    def js(code: str, *args: object) -> Any:
        return browser.execute_script(code, *args)

    js("localStorage.setItem('moestro.settings', arguments[0])", settings)
    browser.refresh()
    wait(lambda: js("return document.querySelector('#model').textContent !== '…' && document.body.matches('.writing')"))
    browser.find_element("id", "text").send_keys(beginning)
    browser.find_element("id", "write").click()
    wait(lambda: js("return document.querySelector('.stats')?.textContent && !document.body.matches('.running')"))
    browser.find_element("css selector", ".toggle").click()
    wait(lambda: js("return document.querySelectorAll('.prompt-tokens .token').length"))
    ActionChains(browser).move_to_element(browser.find_element("id", "model")).perform()  # points at no token
    js("document.querySelector('[name=window][value=answer]').click()")
    js("document.querySelectorAll('.token-view > .token-text .token')[arguments[0]].click()", index)
    js("document.getElementById('scroller').scrollTop = 0")
    return bytes(browser.get_screenshot_as_png())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a run, or any directory that `moestro serve` takes")
    parser.add_argument("--text", default="Alice was beginning to get very tired of", help="what the model continues")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=110, help="how many it writes")
    parser.add_argument("--index", type=int, default=9, help="which of them is opened")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    with serve(given.model) as url, browse(url) as browser:
        given.out.write_bytes(take(browser, given.text, given.index, SETTINGS % (given.seed, given.tokens)))
    print(f"{given.out}: {given.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
