"""The built-in corpus is what its provenance file says, and goes on where a part is missing."""

import hashlib
import json
import lzma
import math
import re
from importlib import resources
from itertools import islice
from pathlib import Path

import pytest

from moestro.data import builtin_corpus
from moestro.data.builtin_corpus import DOMAINS, iterate_arithmetic, iterate_builtin, iterate_python

FOLDER = resources.files("moestro") / "data" / "builtin"


def test_shipped_files_match_their_provenance() -> None:
    provenance = json.loads((FOLDER / "provenance.json").read_text("utf-8"))
    assert {entry["domain"] for entry in provenance["files"]} == set(builtin_corpus.SHIPPED)
    for entry in provenance["files"]:
        packed = (FOLDER / entry["file"]).read_bytes()
        text = lzma.decompress(packed)
        assert (len(packed), len(text)) == (entry["bytes_xz"], entry["bytes_text"])
        assert hashlib.sha256(packed).hexdigest() == entry["sha256_xz"]
        assert hashlib.sha256(text).hexdigest() == entry["sha256_text"]
        for licence in entry["licence"].replace("public domain", "").split(" AND "):
            assert not licence or (FOLDER / "licences" / f"{licence}.txt").is_file()
    tokenizer = (FOLDER / "tokenizer.json").read_bytes()
    assert hashlib.sha256(tokenizer).hexdigest() == provenance["derived"][0]["sha256"]
    arithmetic = "".join(iterate_arithmetic()).encode()
    assert hashlib.sha256(arithmetic).hexdigest() == provenance["generated"][0]["sha256_text"]


def test_domains_come_in_order() -> None:
    seen = list(dict.fromkeys(document.domain for document in iterate_builtin()))
    assert tuple(seen) == DOMAINS


def test_arithmetic_is_right() -> None:
    text = "\n".join(islice(iterate_arithmetic(), 40))
    problems = re.findall(r"What is (.*?)\?\n(.*?)Answer: (-?\d+)\n", text, re.DOTALL)
    assert len(problems) > 400
    for question, steps, answer in problems:
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        if question.startswith("the greatest"):
            assert math.gcd(*numbers) == int(answer)
        else:
            assert eval(question) == int(answer)
        for step in steps.splitlines():
            left, right = step.split(" = ")
            assert eval(left) == eval(right)


def test_missing_library_sources_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin_corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.warns(UserWarning, match="goes on without its python domain"):
        domains = {document.domain for document in iterate_builtin()}
    assert domains == set(DOMAINS) - {"python"}


def test_library_is_sampled_without_tests(tmp_path: Path) -> None:
    for name in ("a.py", "test/b.py", "pkg/tests/c.py", "pkg/d.py", "site-packages/e.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    assert sorted(iterate_python(tmp_path)) == ["# a.py", "# pkg/d.py"]
    assert len(list(iterate_python(tmp_path, max_bytes=8))) < 2
