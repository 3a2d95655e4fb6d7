"""One browser and one stub of the server for all tests of the chat page; a fresh page for each. A pytest plugin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from web_browser import CHROMIUM, DRIVER, Page
from web_stub import Stub

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run "
    "--disable-component-update --force-color-profile=srgb --window-size=1400,900"
)
EXPECTED = ("network", "rendering")  # failed requests are part of the tests, and some tests read pixels


@pytest.fixture(scope="session")
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
    browser.downloads = downloads
    yield browser
    browser.quit()


@pytest.fixture
def page(driver: Any, stub: Stub) -> Iterator[Page]:
    """A fresh page, which must have had nothing to say on the console but that requests failed."""
    stub.reset()
    found = Page(driver, stub.url)
    found.open(first=True)
    driver.get_log("browser")
    yield found
    stub.gate.set()
    messages = [entry["message"] for entry in driver.get_log("browser") if entry["source"] not in EXPECTED]
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert messages == []
