"""Every kind of source gives its documents, in order and by domain; what is damaged is named."""

import gzip
import json
import sys
import types
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data.corpus import iterate_documents
from moestro.data.documents import CUT_BYTES, Document, cut_long_document
from moestro.errors import DataError


def read(source: Path | str) -> list[tuple[str, str]]:
    return [(document.domain, document.text) for document in iterate_documents(str(source))]


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_folder_gives_every_kind_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "z.txt", "one\n<|endoftext|>\ntwo\n")
    write(tmp_path / "a.md", "# top\n<|endoftext|>\n")
    write(tmp_path / "code" / "deep" / "x.py", "x = 1\n")
    write(tmp_path / "code" / "y.json", json.dumps([{"text": "r1", "domain": "ignored"}, "r2"]))
    write(tmp_path / "m.jsonl", '{"content": "c", "domain": "law"}\n\n{"text": "plain"}')
    write(tmp_path / "n.jsonl.gz", gzip.compress(b'{"text": "zipped"}\n'))
    write(tmp_path / "o.txt.zst", zstandard.compress(b"squeezed ") + zstandard.compress(b"twice\n"))
    write(tmp_path / ".hidden.txt", "no")
    write(tmp_path / "picture.png", "no")
    (tmp_path / "code" / "loop").symlink_to(tmp_path)
    table = pyarrow.table({"text": ["p1", "p2"], "domain": ["law", None]})
    pyarrow.parquet.write_table(table, tmp_path / "q.parquet")
    write(tmp_path / "r.parquet.gz", gzip.compress((tmp_path / "q.parquet").read_bytes()))
    assert read(tmp_path) == [
        ("text", "# top\n<|endoftext|>\n"),
        ("code", "x = 1\n"),
        ("code", "r1"),
        ("code", "r2"),
        ("law", "c"),
        ("text", "plain"),
        ("text", "zipped"),
        ("text", "squeezed twice\n"),
        *[("law", "p1"), ("text", "p2")] * 2,
        ("text", "one\n"),
        ("text", "two\n"),
    ]


def test_single_file_names_its_domain(tmp_path: Path) -> None:
    assert read(write(tmp_path / "novel.txt.gz", gzip.compress(b"a b c"))) == [("novel", "a b c")]
    assert read(write(tmp_path / "one.json", '{"text": "t", "domain": "d"}')) == [("d", "t")]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', "line 2: expected a 'text'"),
        ("a.jsonl", '{"text": "한글"}\n{"text": "'.encode() + b'\xff"}\n', "line 2: not valid UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: the text has a lone surrogate"),
        ("a.json", b"[" * 100_000, "not valid JSON"),
        ("a.txt", "très été\nbad ".encode() + b"\xe9\n", "line 2: not valid UTF-8"),
        ("a.txt", b"fine\ncut short \xec\x95", "line 2: not valid UTF-8"),
        ("a.txt.gz", gzip.compress(b"line\n" * 50_000)[:-20], "a.txt.gz, line .*damaged archive"),
        ("a.txt.gz", b"not gzip", "a.txt.gz, line 1: damaged archive"),
        (
            "a.txt.zst",
            zstandard.compress(bytes(range(32, 127)) * 5000)[:-3],
            "a.txt.zst, line .*cannot read on",
        ),
        ("a.txt.zst", b"not zstd", "a.txt.zst, line 1: cannot read on"),
        ("a.parquet", b"PAR1 no", "not readable as Parquet"),
        ("a.txt", b" \n\n", "no text in"),
        ("a.txt", b"", "no text in"),
        ("a.pdf", b"%PDF", "cannot read .*a.pdf: convert it to text first"),
        ("a.zip", b"PK", "cannot read .*a.zip: unpack it first"),
        ("a.png", b"\x89PNG", "cannot read .*a.png: known are .txt"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(write(tmp_path / name, data))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["", "./nowhere", "nowhere", "a/b/c", "owner/file.txt", "/no/where"])
def test_missing_paths_are_not_taken_for_datasets(source: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder|source is empty"):
        read(source)


def test_folder_without_text_files(tmp_path: Path) -> None:
    write(tmp_path / "x.bin", "x")
    with pytest.raises(DataError, match=r"no \.txt"):
        read(tmp_path)


def test_separator_needs_a_line_of_its_own(tmp_path: Path) -> None:
    text = "x" * (16 * 1024) + "<|endoftext|>\nsay <|endoftext|>\n"
    assert read(write(tmp_path / "a.txt", text)) == [("a", text)]


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbfone\r\n<|endoftext|>\r\ntwo\r\n"
    assert read(write(tmp_path / "a.txt", data)) == [("a", "one\r\n"), ("a", "two\r\n")]


def test_long_files_are_cut_at_paragraphs(tmp_path: Path) -> None:
    text = "".join(f"{'word ' * 30}\n{'안녕 ' * 20}\n\n" for _ in range(900))
    parts = [text for _, text in read(write(tmp_path / "book.txt", text))]
    assert "".join(parts) == text
    assert len(parts) > 5
    assert all(len(part.encode()) <= CUT_BYTES and part.endswith("\n\n") for part in parts)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "\n", "\n\n", "é\n", "한 글\r\n"]), st.integers(1, 30_000)),
        max_size=5,
    )
)
def test_cutting_loses_nothing(runs: list[tuple[str, int]]) -> None:
    text = "".join(piece * count for piece, count in runs)
    parts = cut_long_document(text)
    assert "".join(parts) == text
    assert all(0 < len(part.encode()) <= CUT_BYTES for part in parts)


def test_dataset_streams_records(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("datasets")
    calls = []

    def load_dataset(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "a"}, {"text": "b", "domain": "d"}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(iterate_documents("owner/name:config")) == [Document("a", "name"), Document("b", "d")]
    assert calls == [(("owner/name", "config"), {"split": "train", "streaming": True})]


def test_dataset_offline_or_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="-m pip install"):
        read("owner/name")
    fake = types.ModuleType("datasets")

    def load_dataset(*args: object, **options: object) -> None:
        raise ConnectionError("no route\nto the hub")

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(DataError, match=r"offline.*no route$"):
        read("owner/name")
