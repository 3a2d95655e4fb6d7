"""The tokenizer is lossless, counts bytes exactly, never lets text become special, and is what HF loads."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.data.specials import SPECIALS
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

SAMPLE = (
    'The 1234567 cats\r\n\tsay "안녕하세요" 子曰學而 ひらがな カタカナ '
    "<think>x</think><｜User｜> e\u0301 🦜 |- ( ph -> ps )\n\n"
)
AWKWARD = st.text() | st.lists(st.sampled_from([*SPECIALS, " ", "\n", "<", "7", "曰", "é", "ꙮ"])).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.builtin()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return Tokenizer.train([SAMPLE, "low lower lowest " * 20], 300)


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 8192
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.user_id, tokenizer.assistant_id)
    assert (*ids, tokenizer.think_id, tokenizer.think_end_id) == tuple(range(7))
    assert list(tokenizer.specials) == list(SPECIALS)
    assert not tokenizer.token_bytes[:7].any()
    assert (tokenizer.token_bytes[7:] > 0).all()


@settings(max_examples=200, deadline=None)
@given(text=AWKWARD)
def test_lossless_and_exactly_counted(tokenizer: Tokenizer, trained: Tokenizer, text: str) -> None:
    for one in (tokenizer, trained):
        ids = one.encode(text)
        assert one.decode(ids) == one.decode(ids, skip_special=False) == text
        assert int(one.token_bytes[ids].sum()) == len(text.encode())
        assert not set(ids) & set(range(len(SPECIALS)))


def test_every_id_has_its_bytes(tokenizer: Tokenizer) -> None:
    assert [len(tokenizer.pieces[id]) for id in range(7, 8192)] == tokenizer.token_bytes[7:].tolist()
    assert len({*tokenizer.pieces}) == tokenizer.vocab_size
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.pieces)
    assert tokenizer.token_bytes.dtype == np.int32


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [SAMPLE, "", "다음 " * 500, SAMPLE[::-1]]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_pre_tokenizer_splits_as_deepseek_does(trained: Tokenizer) -> None:
    splitter = trained._encoder.pre_tokenizer
    assert splitter is not None
    spans = [text for _, text in splitter.pre_tokenize_str(SAMPLE)]
    parts = [SAMPLE[start:end] for start, end in spans]
    assert parts[:7] == ["The", " ", "123", "456", "7", " cats", "\r\n"]
    assert "子曰學而" in parts
    assert "ひらがな" in parts
    assert " e\u0301" in parts


def test_stream_holds_back_half_characters(tokenizer: Tokenizer) -> None:
    text = "🦜 ꙮ 안녕"
    ids = [tokenizer.pieces.index(bytes([byte])) for byte in text.encode()]
    strings = list(tokenizer.decode_stream(ids))
    assert "".join(strings) == text
    assert strings[:4] == ["", "", "", "🦜"]
    assert "\ufffd" not in "".join(strings)
    assert list(tokenizer.decode_stream(ids[:2]))[-1] == tokenizer.decode(ids[:2]) == "\ufffd"


def test_decode_hides_or_shows_specials(tokenizer: Tokenizer) -> None:
    ids = [0, 3, *tokenizer.encode("hi"), 5, 6, 1, 9000]
    assert tokenizer.decode(ids) == "hi<think></think>"
    expected = "<｜begin▁of▁sentence｜><｜User｜>hi<think></think><｜end▁of▁sentence｜>"
    assert tokenizer.decode(ids, skip_special=False) == expected


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_training_is_deterministic_and_bounded(trained: Tokenizer) -> None:
    again = Tokenizer.train([SAMPLE, "low lower lowest " * 20], 300)
    assert again.fingerprint == trained.fingerprint
    assert 263 < again.vocab_size <= 300
    with pytest.raises(DataError, match="vocab_size=100 is too small"):
        Tokenizer.train(["x"], 100)


def test_saved_files_load_in_transformers_with_equal_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    ours = Tokenizer.from_file(tmp_path)
    assert (ours.fingerprint, ours.chat_template) == (tokenizer.fingerprint, tokenizer.chat_template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 2)
    assert len(theirs) == tokenizer.vocab_size
    plain = SAMPLE.replace("<think>x</think><｜User｜>", "")
    ids = tokenizer.encode(plain)
    assert theirs(plain, add_special_tokens=False)["input_ids"] == ids
    assert theirs(plain)["input_ids"] == ours.encode_prompt(plain) == [0, *ids]
    assert theirs.decode(ids) == plain


def write_foreign(folder: Path, bos: str, **changes: object) -> Path:
    """A tokenizer in the style of DeepSeek's file: role tokens not marked special, and at the end."""
    tree = json.loads(Tokenizer.train(["aaa bbb"], 263).specification)
    names = {"<｜begin▁of▁sentence｜>": bos, "<｜end▁of▁sentence｜>": "<end>"}
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
        token["special"] = token["id"] < 2
    tree["model"]["vocab"] = {names.get(name, name): id for name, id in tree["model"]["vocab"].items()}
    tree |= changes
    (folder / "tokenizer.json").write_text(json.dumps(tree), "utf-8")
    return folder / "tokenizer.json"


def test_foreign_file_with_configuration(tmp_path: Path) -> None:
    path = write_foreign(tmp_path, "<start>", truncation=None)
    with pytest.raises(DataError, match="no BOS token found"):
        Tokenizer.from_file(path)
    names = {"bos_token": {"__type": "AddedToken", "content": "<start>"}, "eos_token": "<end>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    foreign = Tokenizer.from_file(path)
    assert (foreign.bos_id, foreign.eos_id, foreign.pad_id) == (0, 1, 2)
    assert foreign.chat_template == "{{ messages }}"
    text = "<start><｜User｜><think>"
    assert not set(foreign.encode(text)) & set(range(7))
    assert foreign.decode(foreign.encode(text)) == text
    assert foreign.decode([foreign.user_id or 0, 5]) == "<think>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a tokenizer.json"),
        ('{"added_tokens": [], "pre_tokenizer": {"type": "Metaspace"}}', "not a byte-level tokenizer"),
        ('{"added_tokens": [], "pre_tokenizer": {"type": "ByteLevel"}}', "that the tokenizers library reads"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.from_file(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_file_and_missing_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read tokenizer"):
        Tokenizer.from_file(tmp_path / "none.json")
    tree = json.loads(Tokenizer.train(["aaa bbb"], 263).specification)
    del tree["model"]["vocab"]["q"]
    with pytest.raises(DataError, match="lacks 1 of the 256"):
        Tokenizer(json.dumps(tree))
