"""Records to text: strings, text fields, and the forms in which conversations are shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from moestro.data.corpus import Corpus, iterate_documents
from moestro.data.records import read_text
from moestro.errors import DataError

CONVERSATION = "User: Hi\n\nAssistant: Hello\n"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, CONVERSATION),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CONVERSATION),
        (
            {"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            CONVERSATION,
        ),
        (
            {"messages": [{"role": "system", "content": [{"type": "text", "text": "Be"}, {"type": "image"}]}]},
            "System: Be\n",
        ),
        ({"messages": [{"role": "tool", "content": None}]}, "Tool: \n"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, CONVERSATION),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, "User: Add\n1, 2\n\nAssistant: 3\n"),
        ({"prompt": "Once", "completion": " upon"}, "Once upon"),
    ],
)
def test_conversations_become_turns(record: dict[str, Any], expected: str) -> None:
    assert read_text(record, "here") == (expected, True)


def test_text_comes_first_and_null_is_no_text() -> None:
    assert read_text({"text": "t", "content": "c", "messages": []}, "here") == ("t", False)
    assert read_text({"text": None, "content": "c"}, "here") == ("", False)
    assert read_text({"text": "t", "body": "b"}, "here", "body") == ("b", False)


@pytest.mark.parametrize(
    ("record", "text_field", "message"),
    [
        (7, "", "here: expected a 'text'"),
        ({"body": "b", "\x1b[2J": 1}, "", r"its fields are body, \\x1b\[2J \(data.text_field"),
        ({}, "", "its fields are none"),
        ({"text": ["a"]}, "", "expected a 'text'"),
        ({"text": "t"}, "body", "expected a 'body'"),
        ({"messages": ["hi"]}, "", "here, messages: expected turns with 'role' and 'content'"),
        ({"conversations": [{"from": 1, "value": "x"}]}, "", "expected turns with 'from' and 'value'"),
    ],
)
def test_records_without_text_are_named(record: Any, text_field: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_text(record, "here", text_field)


def read(path: Path, **options: str) -> list[str]:
    return [document.text for document in iterate_documents(str(path), **options)]


def test_json_with_a_record_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read(path) == ["one", "two"]
    path.write_text('{"text": "one"}\n{"text": \n')
    with pytest.raises(DataError, match="line 2: not valid JSON"):
        read(path)
    path.write_text(json.dumps([{"text": "one"}, "two"], indent=1))
    assert read(path) == ["one", "two"]
    path.write_text('{"text":\n "one"}')
    assert read(path) == ["one"]


def test_tables_of_values(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"two\nlines, one ""cell"""\n2,last\n')
    (tmp_path / "b.tsv").write_bytes(b"\xef\xbb\xbftext\tdomain\r\nhello\tgreetings\r\n")
    assert [(d.domain, d.text) for d in iterate_documents(str(tmp_path))] == [
        ("text", 'two\nlines, one "cell"'),
        ("text", "last"),
        ("greetings", "hello"),
    ]
    (tmp_path / "c.csv").write_text("review,label\ngood,1\n")
    assert read(tmp_path / "c.csv", text_field="review") == ["good"]
    with pytest.raises(DataError, match=r"c.csv, line 2: .*its fields are review, label"):
        read(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text('text\n"open\n')
    with pytest.raises(DataError, match=r"d.csv, line 1: not valid CSV"):
        read(tmp_path / "d.csv")


def test_a_saved_data_set_gives_its_train_split(tmp_path: Path) -> None:
    """The layout of `datasets.DatasetDict.save_to_disk`: Arrow streams beside JSON that is no text."""
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "dataset_info.json").write_text("{}")
        (tmp_path / split / "state.json").write_text("{}")
        table = pyarrow.table({"text": [split, None], "label": [1, 2]})
        with pyarrow.ipc.new_stream(tmp_path / split / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
    corpus = Corpus(str(tmp_path))
    assert [document.text for document in corpus.documents()] == ["train"]
    assert corpus.found is not None
    assert corpus.found.skipped == {"bookkeeping of a data set": 5, "another split of a data set": 1}
    assert corpus.notices()[0].startswith("records without text left out: 1")


def test_arrow_files_and_parquet_of_the_hub(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["one"]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "a.arrow") == ["one"]
    (tmp_path / "a.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match="not readable as Arrow"):
        read(tmp_path / "a.arrow")
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    for split in ("train", "validation"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [split]}), hub / f"{split}-00000-of-00001.parquet")
    assert read(tmp_path / "hub") == ["train"]


@pytest.mark.parametrize("column", ["text", "domain"])
def test_bad_utf8_in_a_table_is_named_by_its_row(tmp_path: Path, column: str) -> None:
    good = pyarrow.array([f"row {number}" for number in range(300)] + ["last"])
    bad = pyarrow.array([b"fine"] * 299 + [b"bad \xff", b"fine"]).view(pyarrow.string())
    other = "domain" if column == "text" else "text"
    pyarrow.parquet.write_table(pyarrow.table({column: bad, other: good}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 300: not valid UTF-8"):
        read(tmp_path / "a.parquet")


def test_columns_are_named_where_none_is_known(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["b"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="its fields are body, id"):
        read(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", text_field="body") == ["b"]
