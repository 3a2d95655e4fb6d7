"""A prompt's ids are those of `transformers` on the same directory, whatever form its tokenizer has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moestro.data.specials import BOS, EOS, PAD, USER
from moestro.data.tokenizer import Tokenizer
from moestro.errors import DataError

TEXT = "The cat  sat\n on 1234 été 안녕 <think>x</think>"
TREE = json.loads(Tokenizer.train([TEXT * 3, "low lower lowest " * 20], 300).specification)
NAMES = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def around(*parts: str) -> dict[str, Any]:
    """A TemplateProcessing post-processor; "A" is the text, other parts are tokens."""
    ids = {BOS: 0, EOS: 1, USER: 3}

    def piece(part: str) -> dict[str, Any]:
        kind = "Sequence" if part == "A" else "SpecialToken"
        return {kind: {"id": part, "type_id": 0}}

    named = {part: {"id": part, "ids": [ids[part]], "tokens": [part]} for part in parts if part != "A"}
    pair = [piece("A"), {"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": list(map(piece, parts)),
        "pair": pair,
        "special_tokens": named,
    }


def write(folder: Path, configuration: dict[str, Any] | None = None, **changes: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps({**TREE, **changes}), "utf-8")
    if configuration is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration), "utf-8")
    return folder


POST_PROCESSORS = {
    "none": None,
    "byte level": BYTE_LEVEL,
    "bos": around(BOS, "A"),
    "two tokens": around(BOS, USER, "A"),
    "both ends": around(BOS, "A", EOS),
    "end": around("A", EOS),
    "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL, around(BOS, "A")]},
    "bert": {"type": "BertProcessing", "sep": [EOS, 1], "cls": [BOS, 0]},
    "roberta": {"type": "RobertaProcessing", "sep": [EOS, 1], "cls": [BOS, 0], "trim_offsets": True,
                "add_prefix_space": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", POST_PROCESSORS)
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "LlamaTokenizerFast"])
def test_what_stands_around_a_prompt(tmp_path: Path, kind: str, flags: dict[str, bool], tokenizer_class: str) -> None:
    configuration = {**NAMES, **flags, "tokenizer_class": tokenizer_class}
    ours = Tokenizer.from_file(write(tmp_path, configuration, post_processor=POST_PROCESSORS[kind]))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello", "", TEXT.replace("<think>x</think>", "")):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"]
        assert ours.encode_prompt(text, add_special_tokens=False) == theirs(text, add_special_tokens=False)["input_ids"]


def added(content: str, id: int, **flags: bool) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": id, "content": content, **plain, **flags}


FURTHER = [
    added("<|a|>", 300, special=True),
    added("<|a|>b", 301),
    added("<l>", 302, lstrip=True),
    added("<r>", 303, rstrip=True, special=True),
    added("<w>", 304, single_word=True),
    added("word", 305, single_word=True, normalized=True),
    added("<both>", 306, lstrip=True, rstrip=True, normalized=True),
    added("  ", 307, normalized=True),
    added("cat", 308),
]
PARTS = [*(entry["content"] for entry in FURTHER), BOS, USER, " ", "\n", "b", "x", "é", "_", "1", "words", "<", "|>"]


@pytest.fixture(scope="module")
def with_added(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    folder = write(tmp_path_factory.mktemp("added"), NAMES, added_tokens=TREE["added_tokens"] + FURTHER)
    return Tokenizer.from_file(folder), AutoTokenizer.from_pretrained(folder)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_special_tokens_in_a_text_are_those_of_transformers_if_asked_for(
    with_added: tuple[Tokenizer, Any], text: str
) -> None:
    ours, theirs = with_added
    assert ours.encode_prompt(text, parse_special=True) == theirs(text)["input_ids"]
    plain = {ours.specials["cat"]}  # also an ordinary piece of the vocabulary
    assert set(ours.encode_prompt(text)) & set(ours.specials.values()) <= plain
    assert ours.decode(ours.encode_prompt(text)) == text


def test_tokens_that_only_the_configuration_adds(tmp_path: Path) -> None:
    decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in TREE["added_tokens"]}
    decoder |= {"900": {k: v for k, v in added("<new>", 900, special=True).items() if k != "id"}}
    ours = Tokenizer.from_file(write(tmp_path, {**NAMES, "added_tokens_decoder": decoder}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.specials["<new>"] == theirs.convert_tokens_to_ids("<new>") == len(theirs) - 1
    assert ours.encode_prompt("a<new>b", parse_special=True) == theirs("a<new>b")["input_ids"]


@pytest.mark.parametrize("has_decoder", [False, True])
def test_special_tokens_map_counts_where_the_configuration_has_no_decoder(tmp_path: Path, has_decoder: bool) -> None:
    decoder = {"added_tokens_decoder": {"0": added(BOS, 0)}} if has_decoder else {}
    for tree in decoder.values():
        del tree["0"]["id"]
    write(tmp_path, {**NAMES, **decoder})
    named = {
        "bos_token": {"content": USER, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    }
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(named))
    ours, theirs = Tokenizer.from_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert (ours.bos_id, ours.named["bos_token"]) == (theirs.bos_token_id, theirs.bos_token)
    assert ours.bos_id == (0 if has_decoder else 3)


def test_a_tokenizer_without_bos_loads(tmp_path: Path) -> None:
    tree = {"bos_token": None, "eos_token": USER}
    renamed = json.loads(
        json.dumps(TREE).replace(json.dumps(BOS)[1:-1], "<|x|>").replace(json.dumps(EOS)[1:-1], "<|y|>")
    )
    ours = Tokenizer.from_file(write(tmp_path, tree, **renamed))
    assert (ours.bos_id, ours.eos_id, ours.prefix_ids) == (3, 3, [])
    assert AutoTokenizer.from_pretrained(tmp_path)("low")["input_ids"] == ours.encode_prompt("low")


def test_sections_for_padding_and_truncation_change_no_prompt(tmp_path: Path) -> None:
    padding = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2,
               "pad_type_id": 0, "pad_token": PAD}  # fmt: skip
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    configuration = {**NAMES, "clean_up_tokenization_spaces": True}
    ours = Tokenizer.from_file(write(tmp_path, configuration, padding=padding, truncation=truncation))
    text = "low , lower . lowest ' s " * 4
    assert ours.encode_prompt(text) == Tokenizer(json.dumps(TREE)).encode(text)
    assert ours.decode(ours.encode_prompt(text)) == text


def test_what_we_write_every_reader_reads_alike(tmp_path: Path) -> None:
    written = Tokenizer.train([TEXT * 3], 290)
    written.save(tmp_path)
    again, theirs = Tokenizer.from_file(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("", "low " + USER, TEXT):
        ids = written.encode_prompt(text, parse_special=True)
        assert ids == again.encode_prompt(text, parse_special=True) == theirs(text)["input_ids"]
        assert ids[0] == 0
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_bos_token"] is True
    assert written.encode_documents(["low"]) == [[0, *written.encode("low"), 1]]


def test_what_an_earlier_version_wrote_still_begins_with_bos(tmp_path: Path) -> None:
    old = {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False,
           "clean_up_tokenization_spaces": False, "chat_template": "{{ messages }}"}  # fmt: skip
    assert Tokenizer.from_file(write(tmp_path, old)).prefix_ids == [0]
    assert Tokenizer.from_file(write(tmp_path, {**old, "model_max_length": 4096})).prefix_ids == []


def test_a_foreign_tokenizer_that_we_trained_with_begins_with_bos_for_everyone(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    foreign = Tokenizer.from_file(write(tmp_path / "a", NAMES, post_processor=around("A", EOS)))
    foreign.save(tmp_path / "b")
    assert AutoTokenizer.from_pretrained(tmp_path / "b")("low")["input_ids"] == foreign.encode_prompt("low")
    foreign.beginning_with_bos().save(tmp_path / "b")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "b")
    assert (
        theirs("low")["input_ids"]
        == Tokenizer.from_file(tmp_path / "b").encode_prompt("low")
        == [0, *foreign.encode("low")]
    )
    assert Tokenizer.from_file(tmp_path / "b").fingerprint == foreign.fingerprint


def test_a_text_that_is_lost_is_said(tmp_path: Path) -> None:
    assert Tokenizer.from_file(write(tmp_path, NAMES)).notices == []
    for normalizer in ("NFC", "NFKC", "Lowercase", "StripAccents"):
        (notice,) = Tokenizer.from_file(write(tmp_path, NAMES, normalizer={"type": normalizer})).notices
        assert notice.isascii()
        assert "\n" not in notice
    strip = {"type": "Strip", "strip_left": True, "strip_right": False}
    assert "' a  b" in str(Tokenizer.from_file(write(tmp_path, NAMES, normalizer=strip)).notices)


def test_a_flag_that_transformers_does_not_heed_is_said(tmp_path: Path) -> None:
    (notice,) = Tokenizer.from_file(write(tmp_path, {**NAMES, "add_bos_token": True})).notices
    assert "begin without it" in notice
    told = write(tmp_path, {**NAMES, "add_bos_token": True}, post_processor=around(BOS, "A"))
    assert Tokenizer.from_file(told).notices == []


def test_a_post_processor_that_repeats_the_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="post-processor"):
        Tokenizer.from_file(write(tmp_path, NAMES, post_processor=around("A", EOS, "A")))


def test_the_bytes_that_utf8_never_contains_may_be_missing(tmp_path: Path) -> None:
    from moestro.data.byte_alphabet import BYTE_TO_CHAR

    gone = {BYTE_TO_CHAR[byte] for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}
    model = TREE["model"]
    vocab = {token: id for token, id in model["vocab"].items() if not set(token) & gone}
    ours = Tokenizer.from_file(write(tmp_path, NAMES, model={**model, "vocab": vocab}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(model["vocab"]) - len(vocab) == 13
    for text in (TEXT, "".join(map(chr, range(1, 0x500))), "\U0010ffff \ue000 🦜"):
        assert ours.encode_prompt(text, parse_special=True) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == text
