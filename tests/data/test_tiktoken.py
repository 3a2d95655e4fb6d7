"""A tiktoken.model becomes a tokenizer that encodes as tiktoken does: brute force, and transformers' own converter."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data.byte_alphabet import CHAR_TO_BYTE
from moestro.data.tiktoken import PATTERN, find_merges
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

TEXTS = [
    "The quick brown fox's 12345 dogs don't CamelCase XMLHttpRequest 漢字とかな 한국어 été e\u0301 — «ok»\r\n\n\t z   ",
    "def f(x):\n    return x  # 中文 comment\n\n\n        if x:\n                pass\n"
    + "=" * 40
    + " " * 33
    + "a" * 21,
    "ǅ ß İstanbul Ⅷ ٣٤٥ 👩\u200d👧 \u00a0\u3000\u2028 x\u0085y 々〇 ㍿ I'LL we'Re l'été '' 's",
]


def learn() -> dict[bytes, int]:
    """Ranks learned from the texts, in the way in which BPE vocabularies are."""
    ranks = {bytes([byte]): place for place, byte in enumerate(random.Random(3).sample(range(256), 256))}
    pieces = [
        [bytes([b]) for b in piece.encode()] for text in TEXTS for piece in regex.findall(PATTERN, text, regex.V1)
    ]
    while any(len(piece) > 1 for piece in pieces) and len(ranks) < 500:
        counts: dict[tuple[bytes, bytes], int] = {}
        for piece in pieces:
            for pair in pairwise(piece):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[best[0] + best[1]] = len(ranks)
        pieces = [join(piece, best) for piece in pieces]
    return ranks


def join(piece: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined: list[bytes] = []
    for part in piece:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def encode_slowly(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's algorithm: again and again join the neighbours whose bytes have the lowest rank, leftmost first."""
    ids: list[int] = []
    for piece in regex.findall(PATTERN, text, regex.V1):
        data = piece.encode()
        parts = [data] if data in ranks else [bytes([byte]) for byte in data]
        while True:
            found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
            if not found:
                break
            place = min(found)[1]
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        ids += [ranks[part] for part in parts]
    return ids


RANKS = learn()
BASE = len(RANKS)
NAMES = {0: "[BOS]", 1: "[EOS]", 4: "<|im_end|>", 5: "<|im_user|>", 6: "<|im_assistant|>"}
SPECIALS = {BASE + place: name for place, name in NAMES.items()}


def write(folder: Path, ranks: dict[bytes, int] = RANKS, **changes: Any) -> Path:
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (folder / "tiktoken.model").write_text("".join(lines))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    configuration = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_moonshot.TikTokenTokenizer", None]},
        "added_tokens_decoder": {str(id): {"content": content, **flags} for id, content in SPECIALS.items()},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        **changes,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    (folder / "tokenization_moonshot.py").write_text("raise SystemExit('the code of a directory was run')\n")
    return folder


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_file(write(tmp_path_factory.mktemp("kimi")))


@pytest.mark.parametrize("text", TEXTS)
def test_texts_are_encoded_as_by_brute_force(kimi: Tokenizer, text: str) -> None:
    assert kimi.encode_prompt(text) == encode_slowly(text, RANKS)
    assert kimi.decode(kimi.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" aA=\n\r\t'sé漢字か1٣ǅm\u0301.-\u00a0", max_size=40) | st.text(max_size=20))
def test_any_text_is_encoded_as_by_brute_force(kimi: Tokenizer, text: str) -> None:
    assert kimi.encode_prompt(text) == encode_slowly(text, RANKS)
    assert kimi.decode(kimi.encode(text)) == text


def test_merges_are_those_of_transformers_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    monkeypatch.setattr(TikTokenConverter, "load_tiktoken_bpe", staticmethod(lambda url: RANKS))
    vocab, merges = TikTokenConverter().extract_vocab_merges_from_model("unused")

    def spell(text: str) -> bytes:
        return bytes(CHAR_TO_BYTE[char] for char in text)

    assert {spell(token): rank for token, rank in vocab.items()} == RANKS
    assert [(spell(left), spell(right)) for left, right in merges] == find_merges(RANKS)


def test_special_tokens_have_the_ids_of_the_configuration(kimi: Tokenizer) -> None:
    assert kimi.vocab_size == BASE + 256
    assert {kimi.specials[name] for name in SPECIALS.values()} == set(SPECIALS)
    assert (kimi.bos_id, kimi.eos_id, kimi.user_id, kimi.assistant_id) == (BASE, BASE + 1, BASE + 5, BASE + 6)
    assert kimi.specials[f"<|reserved_token_{BASE + 2}|>"] == BASE + 2
    assert kimi.encode_prompt("a<|im_end|>b", parse_special=True) == [RANKS[b"a"], BASE + 4, RANKS[b"b"]]
    assert BASE + 4 not in kimi.encode_prompt("a<|im_end|>b")


def test_a_directory_may_ask_for_bos_and_is_saved_as_a_tokenizer_json(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = Tokenizer.from_file(write(tmp_path, add_bos_token=True) / "tokenizer.json")
    assert ours.encode_prompt("The") == [BASE, *ours.encode("The")]
    (tmp_path / "out").mkdir()
    ours.save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode_prompt(text) == [BASE, *encode_slowly(text, RANKS)]


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "ranks are not"), ("YQ== 0\nYg== 2\n", "ranks are not"), ("YQ== 0\nYQ== 1\n", "ranks are not"),
     ("YQ==\n", "damaged: a line"), ("!! 0\n", "damaged: a line"), ("YQ== x\n", "damaged: a line"),
     ("YQ== 0\n", "lacks")],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (write(tmp_path) / "tiktoken.model").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.from_file(tmp_path)
    assert "tiktoken.model" in str(caught.value)


def test_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not known here"):
        Tokenizer.from_file(write(tmp_path, tokenizer_class="QWenTokenizer"))
