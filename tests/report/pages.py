"""A report as a test sees it: elements, scripts and styles, words by section, and what every report must keep."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and all other text by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.sections = {"": ""}  # by id; "" is what stands before the first
        self._inside = ""
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "section":
            self.sections[str(dict(attrs)["id"])] = ""
        self.sections[list(self.sections)[-1]] += " "

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.raw.append((self._inside, data))
        else:
            self.sections[list(self.sections)[-1]] += data

    @property
    def text(self) -> str:
        return "".join(self.sections.values())

    @property
    def data(self) -> Any:
        return json.loads(self.raw[1][1])

    def words(self, section: str) -> str:
        """The text of a section with single spaces, also between table cells."""
        return " ".join(self.sections[section].split())


def check_needs_no_network(page: Page) -> None:
    """No reference to anything outside, and a policy that allows the page's own style and script alone."""
    for _, attrs in page.elements:
        assert not {"src", "href", "action", "style", "onclick"} & attrs.keys()
    policy = next(attrs["content"] for _, attrs in page.elements if "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'") and "unsafe" not in policy
    (style_tag, style), _, (script_tag, script) = page.raw
    for tag, text in ((style_tag, style), (script_tag, script)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"url\(|@import", style)


def own_scripts() -> dict[str, str]:
    """The scripts of the reports that are not uPlot, by name."""
    folder = resources.files("moestro.report") / "assets"
    scripts = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name.endswith(".js")}
    return {name: script for name, script in scripts.items() if not name.startswith("uPlot")}


def draw(path: Path, profile: Path) -> str:
    """The page's elements after its script ran in a browser, which must have had nothing to say."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --enable-logging=stderr"
    options = [*flags.split(), f"--user-data-dir={profile}", "--virtual-time-budget=2000"]
    command = [CHROMIUM, *options, "--dump-dom", path.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in result.stderr
    assert re.search(r'<html[^>]*class="drawn"', result.stdout)
    return result.stdout
