"""The page of routes: all of them, with all fields, without scripts and without the network."""

from __future__ import annotations

import re
from html import unescape
from html.parser import HTMLParser

import httpx
from live import Live

from moestro.server.docs_page import render_docs


class Loads(HTMLParser):
    """What a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.fetched += [value or "" for name, value in attrs if name == "src" or (name == "href" and tag == "link")]


def test_the_page_names_every_route_and_field_and_loads_nothing_from_elsewhere(live: Live) -> None:
    reply, description = live.http.get("/docs"), live.http.get("/openapi.json").json()
    assert reply.status_code == 200 and "default-src 'none'" in reply.headers["Content-Security-Policy"]
    text = unescape(reply.text)
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}<" in text and operation["description"] in text
    for name in ("CompletionRequest", "ChatRequest", "ResponsesRequest", "TokenizeRequest"):
        for field in description["components"]["schemas"][name]["properties"]:
            assert f"<code>{field}</code>" in text
    assert "<code>user</code>" in text and "<code>functions</code>" in text
    loads = Loads()
    loads.feed(reply.text)
    assert loads.fetched == ["/docs.css"] and "script" not in loads.tags
    assert httpx.get(live.url + "/docs.css").status_code == 200
    assert not re.search(r"\son\w+=|style=", reply.text)


def test_what_a_description_says_is_text() -> None:
    evil = "<script>x</script>"
    operation = {"description": evil}
    page = render_docs({"info": {"version": evil}, "paths": {f"/{evil}": {"get": operation}}})
    assert "<script" not in page
