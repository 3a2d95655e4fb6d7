"""A survey counts what is read and left out, and names everything that cannot be read at once."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from moestro.data.corpus import Corpus
from moestro.data.survey import SAMPLE_BYTES, survey
from moestro.errors import DataError


def test_what_is_read_and_left_out_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ärger\n<|endoftext|>\nmore\n")
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "b.jsonl").write_text('{"text": "same"}\n{"text": "same"}\n{"text": null}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "c.pdf").write_bytes(b"%PDF")
    (tmp_path / "Makefile").write_text("all:")
    (tmp_path / "law" / "loop").symlink_to(tmp_path)
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "itself.txt").symlink_to(tmp_path / "itself.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    for run in ("old", "new/data"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "tokenizer.json").write_text("{}")
    result = survey(Corpus(str(tmp_path)))
    assert (result.files, result.documents, result.complete) == (2, 4, True)
    assert result.bytes == len("ärger\nmore\n".encode()) + 8
    assert {name: domain.varied for name, domain in result.domains.items()} == {"text": True, "law": False}
    assert result.skipped == {
        "empty": 1,
        "hidden": 1,
        ".pdf": 1,
        "without a suffix": 1,
        "a folder seen before": 1,
        "a broken link": 2,
        "not a regular file": 1,
        "a model or run": 2,
    }
    assert sorted(result.sample) == ["more\n", "same", "same", "ärger\n"]


def test_all_files_that_cannot_be_read_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.jsonl").write_text('{"text": 1}')
    (tmp_path / "c.txt").write_bytes("한글 문장".encode() + b"\xff")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"x" * 9999)[:-9])
    (tmp_path / "e\x1b[2J.json").write_text("{")
    with pytest.raises(DataError, match="4 of 5 files cannot be read") as caught:
        survey(Corpus(str(tmp_path)))
    details = caught.value.details
    assert [
        name for name in ("b.jsonl", "c.txt", "d.txt.gz", "e\\x1b[2J.json") if not any(name in d for d in details)
    ] == []
    assert len(details) == 4 and all("\x1b" not in detail and "\n" not in detail for detail in details)


def test_one_bad_file_is_the_error(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": 1}')
    with pytest.raises(DataError, match=r"b\.jsonl, line 1: expected a 'text'"):
        survey(Corpus(str(tmp_path)))


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number}.json").write_text("{")
    with pytest.raises(DataError, match="60 of 60 files") as caught:
        survey(Corpus(str(tmp_path)))
    assert len(caught.value.details) == 51 and caught.value.details[-1] == "… and 10 more"


def test_folders_and_domains_that_are_no_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path)
    os.mkdir(raw + b"/caf\xe9")
    (tmp_path / os.fsdecode(b"caf\xe9") / "a.txt").write_text("un")
    (tmp_path / "b.jsonl").write_text(
        '{"text": "deux", "domain": "a\\u001b[2Jb\\ud800"}\n{"text": "trois", "domain": "%s"}' % ("x" * 500)
    )
    names = [document.domain for document in Corpus(str(tmp_path)).documents()]
    assert names[:2] == ["a\\x1b[2Jb\\ud800", "x" * 71 + "-" + names[1][-8:]]
    assert names[2] == "caf\\udce9"
    (tmp_path / os.fsdecode(b"caf\xe9") / "b.json").write_text("{")
    with pytest.raises(DataError) as caught:
        survey(Corpus(str(tmp_path)))
    assert caught.value.command_line_text.isprintable()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.zip", b"PK", "1 .zip; unpack it first"),
        ("a.docx", b"PK", "1 .docx; convert it to text first"),
        ("", b"", "empty"),
    ],
)
def test_folders_without_text_say_what_they_hold(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    if name:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        survey(Corpus(str(tmp_path)))


def test_names_that_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "~nobody-of-this-name").mkdir()
    (tmp_path / "~nobody-of-this-name" / "a.txt").write_text("here")
    assert survey(Corpus("~nobody-of-this-name")).bytes == 4
    with pytest.raises(DataError, match="no such file or folder: ~no-such-user"):
        Corpus("~no-such-user")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "b.txt").write_text("at home")
    assert survey(Corpus("~/b.txt")).bytes == 7


def test_the_sample_is_spread_over_the_text_and_bounded(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 10)):
        (tmp_path / name).mkdir()
        text = "".join(f"{name} {number:07} {'x' * 90}\n\n" for number in range(count * 1000))
        (tmp_path / name / "t.txt").write_text(text)
    sample = survey(Corpus(str(tmp_path))).sample
    sizes = {name: sum(len(text) for text in sample if text.startswith(name)) for name in "ab"}
    assert sum(sizes.values()) <= SAMPLE_BYTES * 1.1 and sizes["a"] > 2 * sizes["b"] > 0
    numbers = [int(text.split()[1]) for text in sample if text.startswith("a")]
    assert min(numbers) < 4000 and max(numbers) > 30_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_opened_are_named(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "a.txt").write_text("fine")
    with pytest.raises(DataError, match="shut: cannot read folder"):
        survey(Corpus(str(tmp_path)))
