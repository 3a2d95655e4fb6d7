"""Encodings: what is UTF-8 stays UTF-8, what is not is guessed or taken as named, what is damaged is not guessed at."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from moestro.config import build_config
from moestro.data.corpus import Corpus, iterate_documents
from moestro.data.encodings import find_encoding
from moestro.errors import ConfigError, DataError

TEXTS = {
    "cp1252": "Grüße aus München, schöne Straße, à bientôt, señor. ",
    "cp949": "한국어 문장입니다. 오늘은 날씨가 좋다. ",
    "gb18030": "中文句子。今天天气很好,我们去公园。 ",
    "cp932": "日本語の文章です。カタカナもあります。 ",
    "cp1251": "Привет, как дела? Сегодня хорошая погода. ",
}


def find(data: bytes, named: str = "") -> str:
    return find_encoding(lambda: io.BytesIO(data), named)


@pytest.mark.parametrize("encoding", TEXTS)
def test_encodings_in_wide_use_are_guessed(encoding: str, tmp_path: Path) -> None:
    text = TEXTS[encoding] * 30
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    corpus = Corpus(str(tmp_path))
    assert "".join(document.text for document in corpus.documents()) == text
    (notice,) = corpus.notices()
    assert f"read as {encoding}" in notice and "a.txt" in notice


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_byte_order_marks_are_obeyed(encoding: str, tmp_path: Path) -> None:
    text = "first line\nzweite Zeile ß\n" * 5000  # in several blocks
    mark = "\ufeff" if encoding == "utf-16-le" else ""
    (tmp_path / "a.txt").write_bytes((mark + text).encode(encoding))
    corpus = Corpus(str(tmp_path))
    assert "".join(document.text for document in corpus.documents()) == text
    assert corpus.notices() == []


def test_one_letter_is_guessed_to_be_western() -> None:
    assert find(b"a plain text with one caf\xe9 in it\n") == "cp1252"
    assert find(b"\x93smart quotes\x94 and it\x92s") == "cp1252"


def test_utf8_with_damage_stays_utf8() -> None:
    assert find("한글 문장 ".encode() * 50 + b"\xff" + " 더".encode()) == "utf-8"
    assert find(b"cut short \xec\x95") == "utf-8"
    assert find(b"plain ascii") == find("é".encode() * 10**6) == "utf-8"


def test_damage_far_into_a_file_is_found() -> None:
    assert find(b"a line of text\n" * 100_000 + b"caf\xe9\n") == "cp1252"


def test_binary_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "b.txt").write_text("text")
    corpus = Corpus(str(tmp_path))
    assert [document.text for document in corpus.documents()] == ["text"]
    assert corpus.notices() == [f"binary files left out: 1, such as {tmp_path}/a.txt"]


def test_a_named_encoding_is_that_of_files_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Ünïcode é".encode())
    (tmp_path / "b.txt").write_bytes("Zażółć".encode("cp1250"))
    (tmp_path / "c.txt").write_bytes("ohne Marke".encode("utf-16-le"))
    texts = [document.text for document in iterate_documents(str(tmp_path / "a.txt"), encoding="cp1250")]
    texts += [document.text for document in iterate_documents(str(tmp_path / "b.txt"), encoding="cp1250")]
    texts += [document.text for document in iterate_documents(str(tmp_path / "c.txt"), encoding="utf-16-le")]
    assert texts == ["Ünïcode é", "Zażółć", "ohne Marke"]
    with pytest.raises(DataError, match=r"b\.txt: not valid ascii"):
        list(iterate_documents(str(tmp_path / "b.txt"), encoding="ascii"))


@pytest.mark.parametrize("name", ["nonsense", "base64", "rot13", "undefined", "a\0b"])
def test_names_that_are_no_encoding_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.encoding.*no encoding of text"):
        build_config({"data": {"encoding": name}})
