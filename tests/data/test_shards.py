"""Shards hold exactly the documents, split by text alone, and are either whole or absent."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data import shards as shards_module
from moestro.data.documents import Document
from moestro.data.shards import SPLITS, ShardSet, _choose_moves, _find_sides, open_shards, prepare
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

TOKENIZER = Tokenizer.builtin()


def read(shards: ShardSet) -> dict[tuple[str, str], list[str]]:
    """The texts of each domain and split, decoded, after a check of their frame."""
    texts = {}
    for domain in shards.domains:
        for split in SPLITS:
            tokens, offsets = shards.tokens(domain, split), shards.offsets(domain, split)
            documents = [tokens[offsets[i] : offsets[i + 1]].tolist() for i in range(len(offsets) - 1)]
            assert all((ids[0], ids[-1]) == (TOKENIZER.bos_id, TOKENIZER.eos_id) for ids in documents)
            texts[domain, split] = [TOKENIZER.decode(ids) for ids in documents]
            counts = shards.counts[domain, split]
            sizes = sum(len(text.encode()) for text in texts[domain, split])
            assert (counts.tokens, counts.documents, counts.bytes) == (len(tokens), len(documents), sizes)
            assert shards.num_tokens(domain, split) == len(tokens)
    return texts


def make_documents(count: int, domain: str = "d") -> list[Document]:
    return [Document(f"{domain}: document {i} 문서\n", domain) for i in range(count)]


def test_documents_come_back_whole_and_in_order(tmp_path: Path) -> None:
    documents = [
        document for pair in zip(make_documents(300), make_documents(300, "e"), strict=True) for document in pair
    ]
    lines: list[str] = []
    shards = prepare(documents, TOKENIZER, tmp_path / "shards", 0.1, lines.append)
    assert shards.domains == ("d", "e")
    texts = read(shards)
    for domain in shards.domains:
        ours = [document.text for document in documents if document.domain == domain]
        valid = [t for t in ours if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "little") < 0.1 * 2**64]
        assert texts[domain, "valid"] == valid
        assert texts[domain, "train"] == [text for text in ours if text not in valid]
        assert 10 < len(valid) < 60
    assert shards.dtype == np.uint16
    assert shards.tokenizer_fingerprint == TOKENIZER.fingerprint
    assert lines[-1].startswith("600 documents")
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_split_does_not_depend_on_order_or_company(tmp_path: Path) -> None:
    documents = make_documents(200)
    one = read(prepare(documents, TOKENIZER, tmp_path / "a", 0.1))
    other = read(prepare([*make_documents(50, "x"), *documents[::-1]], TOKENIZER, tmp_path / "b", 0.1))
    assert set(one["d", "valid"]) == set(other["d", "valid"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=8), min_size=1, max_size=4))
def test_each_domain_has_both_sides(tmp_path_factory: pytest.TempPathFactory, numbers: list[list[int]]) -> None:
    """Also with equal texts in several domains, which always stay together."""
    documents = [Document(f"text {n}", f"d{d}") for d, column in enumerate(numbers) for n in column]
    shards = prepare(documents, TOKENIZER, tmp_path_factory.mktemp("data") / "shards", 0.2)
    texts = read(shards)
    train = {text for (_, split), found in texts.items() if split == "train" for text in found}
    valid = {text for (_, split), found in texts.items() if split == "valid" for text in found}
    assert not train & valid
    for d, column in enumerate(numbers):
        found = texts[f"d{d}", "train"] + texts[f"d{d}", "valid"]
        assert sorted(found) == sorted(f"text {n}" for n in column)
        if len(numbers) == 1:
            assert texts[f"d{d}", "train"]
            assert texts[f"d{d}", "valid"] or len(set(column)) == 1


def test_documents_change_sides_at_the_border() -> None:
    def choose(*domains: list[int]) -> list[int]:
        sides: dict[str, shards_module._Sides] = {}
        for name, digests in enumerate(domains):
            for digest in digests:
                side = _find_sides(sides, str(name), Path())["valid" if digest < 100 else "train"]
                side.digests.append(digest)
        return [int(digest) for digest in _choose_moves(list(sides.values()), 100)]

    assert choose([50, 150]) == []
    assert choose([150]) == []
    assert choose([150, 170, 190]) == [150]
    assert choose([150, 150]) == []
    assert choose([50]) == [50]
    assert choose([20, 50, 50]) == [50]
    # What moves for one domain moves in all, and they then choose anew.
    assert choose([50], [50, 150, 170]) == [50, 150]
    assert choose([150, 170], [150, 50]) == [50, 150]


def test_large_vocabulary_takes_four_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = Tokenizer.builtin()
    large.vocab_size = 70_000
    shards = prepare(make_documents(5), large, tmp_path / "s", 0.2)
    assert shards.dtype == np.uint32
    assert sum(map(len, read(shards).values())) == 5


def test_a_second_run_replaces_the_first(tmp_path: Path) -> None:
    first = prepare(make_documents(5), TOKENIZER, tmp_path / "s", 0.2)
    second = prepare(make_documents(6), TOKENIZER, tmp_path / "s", 0.2)
    again = prepare(make_documents(6), TOKENIZER, tmp_path / "s", 0.2)
    assert first.source_fingerprint != second.source_fingerprint == again.source_fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_interruption_leaves_the_old_shards(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Document]:
        yield from make_documents(2000)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), TOKENIZER, tmp_path / "s", 0.2)
    assert list(tmp_path.iterdir()) == []
    old = prepare(make_documents(5), TOKENIZER, tmp_path / "s", 0.2)
    with pytest.raises(KeyboardInterrupt):
        prepare(interrupted(), TOKENIZER, tmp_path / "s", 0.2)
    assert open_shards(tmp_path / "s") == old


def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(shards_module, "_sync", fail)
    with pytest.raises(DataError, match=r"cannot write shards to .*: No space left on device"):
        prepare(make_documents(5), TOKENIZER, tmp_path / "s", 0.2)
    assert list(tmp_path.iterdir()) == []


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="holds no shards"):
        prepare(make_documents(5), TOKENIZER, tmp_path, 0.2)
    with pytest.raises(DataError, match="cannot write shards"):
        prepare(make_documents(5), TOKENIZER, tmp_path / "thesis.txt", 0.2)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_no_documents_and_too_many_domains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        prepare([], TOKENIZER, tmp_path / "s", 0.2)
    with pytest.raises(DataError, match="more than 256 domains"):
        prepare([Document("x", str(n)) for n in range(300)], TOKENIZER, tmp_path / "s", 0.2)


def test_damage_is_found_when_opening(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with pytest.raises(DataError, match="no shards in"):
        open_shards(folder)
    shards = prepare(make_documents(9), TOKENIZER, folder, 0.2)
    with pytest.raises(DataError, match="no domain 'x'"):
        shards.offsets("x", "train")
    tokens = folder / "0.train.tokens"
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"0.train.tokens is damaged .* prepare the data again"):
        open_shards(folder)
    tokens.write_bytes(whole)
    offsets = folder / "0.valid.offsets"
    offsets.write_bytes(b"\1" + offsets.read_bytes()[1:])
    with pytest.raises(DataError, match="offsets of 'd' are damaged"):
        open_shards(folder)
    offsets.unlink()
    with pytest.raises(DataError, match="no shards in"):
        open_shards(folder)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"format": 2}))
    with pytest.raises(DataError, match="format 2"):
        open_shards(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json is damaged"):
        open_shards(folder)
