"""Text to ids and back: byte-level BPE, lossless on every valid UTF-8 text unless `notices` say otherwise.

`Tokenizer` wraps the `tokenizers` library around one `tokenizer.json`, ours or any other byte-level one
(GPT-2's kind, including DeepSeek's own). It promises three things beyond the library. No text becomes a special
token, however it is spelled, unless that is asked for. `token_bytes` says exactly how many bytes of text each id stands
for, so loss can be given in bits per byte. Decoding joins bytes first, so a stream can hold back half a character.

`encode_prompt` is the one place that decides which ids a text becomes as a prompt, `encode_documents` as text to be
trained on or evaluated; `template.py` decides it for conversations.

New vocabularies are trained with DeepSeek-V3's pre-tokenizer: digits in threes, CJK runs apart, then words,
punctuation and white space. Other kinds of tokenizer (SentencePiece, WordPiece) are refused, because their ids
do not stand for definite bytes.
"""

from __future__ import annotations

import codecs
import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken as LibraryToken
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from moestro.data.added_tokens import AddedToken, AddedTokenFinder
from moestro.data.byte_alphabet import NEVER_IN_UTF8, read_bytes
from moestro.data.byte_alphabet import map_alphabet as _map_alphabet
from moestro.data.specials import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, SPECIALS, THINK, THINK_END, USER
from moestro.data.tiktoken import NAME as TIKTOKEN
from moestro.data.tokenizer_files import find_file, name_templates, read_files, was_saved_without_bos
from moestro.errors import DataError

# DeepSeek-V3's three splits.
_DIGITS = r"\p{N}{1,3}"
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)

# Spellings to try if no configuration names the token.
_FALLBACKS = {
    "bos": (BOS, "<|begin_of_text|>", "<|startoftext|>", "<s>", "[BOS]", "<bos>", "<|endoftext|>"),
    "eos": (EOS, "<|end_of_text|>", "</s>", "[EOS]", "<eos>", "<|endoftext|>"),
    "pad": (PAD, "<|pad|>", "<pad>", "[PAD]"),
    "user": (USER, "<|im_user|>", "<|user|>"),
    "assistant": (ASSISTANT, "<|im_assistant|>", "<|assistant|>"),
}
_OURS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": CHAT_TEMPLATE}
UNHEEDED_FLAG = (
    "tokenizer_config.json has add_bos_token, but tokenizer.json adds no BOS: texts to continue begin without it, "
    "as in transformers 5"
)
# texts that a tokenizer may lose parts of: white space, case, composed and compatible characters, marks, joined emoji
_SAMPLES = (
    "a",
    " a  b\t\r\n\n c ",
    "Éa e\u0301 ﬁ Ａ ½ İ ß",
    "漢字 かな 한국어 各 ᄒ\u1161",
    "👩\u200d👧 \ufeff \u00a0 \u3000",
    "<a>'s 007 …",
)


class Tokenizer:
    """One byte-level vocabulary; immutable.

    `specification` is the text of its `tokenizer.json`; `fingerprint` the hash of all of it that decides how text is
    encoded. `specials` maps every added token to its id, `named` the roles that the configuration names, such as
    `bos_token`, to the tokens. `prefix_ids` and `suffix_ids` stand around every prompt. `pieces[id]` are the bytes an
    id decodes to. `token_bytes`, int32 [vocab_size], says how many bytes of text an id stands for, 0 for added tokens.
    `chat_templates` has the templates by name, `chat_template` the usual one. `notices` say what one may not expect.
    """

    def __init__(self, specification: str, configuration: dict[str, Any] | None = None) -> None:
        """Raises `DataError` for anything but a byte-level vocabulary with a beginning and an end token."""
        self.specification = specification
        configuration = configuration or {}
        tree = _parse_specification(specification)
        added = _read_added(tree, configuration)
        self._encoder = _build_encoder(tree, added)
        # the library gives further tokens the next free ids, or the vocabulary's, whatever the file says
        self.added = [replace(token, id=self._encoder.token_to_id(token.content) or 0) for token in added]
        self.specials: dict[str, int] = {token.content: token.id for token in self.added}
        self._finder = AddedTokenFinder(self.added)
        self.pieces = _spell_pieces(self._encoder, self.specials)
        self.vocab_size = len(self.pieces)
        self.named = _read_names(configuration)
        bos, eos = self._find("bos"), self._find("eos")
        self.bos_id = self._require("bos", eos if bos is None else bos)  # what ends documents can begin them, too
        self.eos_id = self._require("eos", eos)
        pad = self._find("pad")
        self.pad_id = self.eos_id if pad is None else pad
        self.user_id = self._find("user")
        self.assistant_id = self._find("assistant")
        self.think_id = self.specials.get(THINK)
        self.think_end_id = self.specials.get(THINK_END)
        self.prefix_ids, self.suffix_ids = self._own_ends = _find_ends(self._encoder)
        self.chat_templates = name_templates(configuration.get("chat_template"))
        self.chat_template: str | None = self.chat_templates.get("default")
        self._hidden = {token.id for token in self.added if token.special}
        self._hidden |= {self.bos_id, self.eos_id, self.pad_id}
        self._hidden |= {id for id in (self.user_id, self.assistant_id) if id is not None}
        self.token_bytes: npt.NDArray[np.int32] = np.array([len(piece) for piece in self.pieces], dtype=np.int32)
        self.token_bytes[list(self.specials.values())] = 0
        self.token_bytes.flags.writeable = False
        self.notices = self._find_losses()

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json` or `tiktoken.model`, or the one in a directory; see `tokenizer_files.py`."""
        path = find_file(Path(path))
        specification, configuration = read_files(path)
        try:
            tokenizer = cls(specification, configuration)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if not tokenizer.prefix_ids and was_saved_without_bos(configuration):
            return tokenizer.beginning_with_bos()
        if configuration.get("add_bos_token") is not True or tokenizer.bos_id in tokenizer.prefix_ids:
            return tokenizer
        if path.name == TIKTOKEN:
            return tokenizer.beginning_with_bos()
        tokenizer.notices = [*tokenizer.notices, UNHEEDED_FLAG]
        return tokenizer

    @classmethod
    def builtin(cls) -> Tokenizer:
        """The shipped vocabulary of 8192, trained on the built-in corpus."""
        path = resources.files("moestro") / "data" / "builtin" / "tokenizer.json"
        return cls(path.read_text("utf-8"), _OURS).beginning_with_bos()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train on `texts`; text too short for `vocab_size` gives a smaller vocabulary."""
        if vocab_size < 256 + len(SPECIALS):
            raise DataError(f"vocab_size={vocab_size} is too small: {len(SPECIALS)} specials and 256 bytes come first")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        splits = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (_DIGITS, _CJK, _WORDS))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[LibraryToken(name, special=True, normalized=False) for name in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tree = json.loads(tokenizer.to_str())
        for token in tree["added_tokens"]:  # thoughts stay visible, as in DeepSeek's own file
            token["special"] = token["content"] not in (THINK, THINK_END)
        specification = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
        return cls(specification, _OURS).beginning_with_bos()

    def beginning_with_bos(self) -> Tokenizer:
        """The same with BOS, and nothing else, around every prompt, as models expect that are trained here."""
        other = copy.copy(self)
        other.prefix_ids, other.suffix_ids = [self.bos_id], []
        return other

    @cached_property
    def fingerprint(self) -> str:
        """The hash of everything that decides how text is encoded; what stands around prompts does not."""
        tree = {**json.loads(self.specification), "post_processor": None}
        return hashlib.sha256(_compact(tree).encode()).hexdigest()

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of a text to be continued, as the model's directory asks for it.

        `add_special_tokens`: with the tokens that stand around every prompt, such as BOS. `parse_special`: added tokens
        spelled in the text become their ids, as in transformers; else they stay text.
        """
        ids = self.encode_marked(text) if parse_special else self.encode(text)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts: what begins a prompt, the text, EOS."""
        return [[*self.prefix_ids, *ids, self.eos_id] for ids in self.encode_batch(texts)]

    def encode_marked(self, text: str, mark: str = "") -> list[int]:
        """Ids of a text whose added tokens are meant; a `mark` inside one makes it text, and is left out."""
        ids: list[int] = []
        for part in self._finder.split(text):
            ids += [part.id] if isinstance(part, AddedToken) else self.encode(part.replace(mark, "") if mark else part)
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no beginning or end token, and special spellings as plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        try:
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:  # how the library says that a string is not valid Unicode
            raise DataError("the text is not valid Unicode: it has half of a surrogate pair") from error
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are not valid UTF-8 become U+FFFD.

        Ids beyond the vocabulary give no text: models may pad their embedding.
        """
        return b"".join(self._spell(id, skip_special) for id in ids).decode("utf-8", "replace")

    def decode_stream(self, ids: Iterable[int], skip_special: bool = True) -> Iterator[str]:
        """The text of `decode` as one string (perhaps empty) per id and one more at the end, never half a character."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for id in ids:
            yield decoder.decode(self._spell(id, skip_special))
        yield decoder.decode(b"", final=True)

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, so that every reader of them makes the same prompts."""
        folder = Path(directory)
        tree = json.loads(self.specification)
        tree["added_tokens"] = [token.as_tree() for token in self.added]
        if (self.prefix_ids, self.suffix_ids) != self._own_ends:
            tree["post_processor"] = self._describe_ends()
        try:
            (folder / "tokenizer.json").write_text(_compact(tree), "utf-8")
            text = json.dumps(self._describe(), ensure_ascii=False, indent=2)
            (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
        except OSError as error:
            raise DataError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error

    def _describe(self) -> dict[str, Any]:
        """The tree of tokenizer_config.json. The two flags are for readers that do not follow the post-processor."""
        names = {id: name for name, id in self.specials.items()}
        flags = {token.id: token.as_tree() for token in self.added}
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        templates = [{"name": name, "template": text} for name, text in self.chat_templates.items()]
        tree: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **self.named,
            **{role: names.get(id) for role, id in roles.items()},
            "add_bos_token": self.prefix_ids == [self.bos_id],
            "add_eos_token": self.suffix_ids == [self.eos_id],
            "added_tokens_decoder": {
                str(id): {key: value for key, value in flag.items() if key != "id"}
                for id, flag in sorted(flags.items())
            },
            "clean_up_tokenization_spaces": False,
        }
        if templates:
            tree["chat_template"] = self.chat_template if list(self.chat_templates) == ["default"] else templates
        return tree

    def _describe_ends(self) -> dict[str, Any]:
        """A post-processor that puts `prefix_ids` and `suffix_ids` around a text."""
        names = {id: name for name, id in self.specials.items()}

        def spell(ids: list[int], type_id: int) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": names[id], "type_id": type_id}} for id in ids]

        def template(*parts: str) -> list[dict[str, Any]]:
            return [
                piece
                for type_id, part in enumerate(parts)
                for piece in (
                    *spell(self.prefix_ids, type_id),
                    {"Sequence": {"id": part, "type_id": type_id}},
                    *spell(self.suffix_ids, type_id),
                )
            ]

        ends = {names[id]: id for id in (*self.prefix_ids, *self.suffix_ids)}
        return {
            "type": "TemplateProcessing",
            "single": template("A"),
            "pair": template("A", "B"),
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in ends.items()},
        }

    def _spell(self, id: int, skip_special: bool) -> bytes:
        if id >= self.vocab_size or (skip_special and id in self._hidden):
            return b""
        return self.pieces[id]

    def _find(self, role: str) -> int | None:
        candidates = (self.named.get(f"{role}_token", ""), *_FALLBACKS[role])
        return next((self.specials[candidate] for candidate in candidates if candidate in self.specials), None)

    def _require(self, role: str, id: int | None) -> int:
        if id is None:
            raise DataError(
                f"no {role.upper()} token found (tried {' '.join(_FALLBACKS[role])}); "
                f'name it as "{role}_token" in tokenizer_config.json'
            )
        return id

    def _find_losses(self) -> list[str]:
        """One notice if samples of text are not kept."""
        read = ((text, self.decode(self.encode(text))) for text in _SAMPLES)
        lost = next(((text, back) for text, back in read if text != back), None)
        return [f"this tokenizer does not keep text as it is: {lost[0]!a} is read as {lost[1]!a:.120}"] if lost else []


def _compact(tree: dict[str, Any]) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def _parse_specification(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"tokenizer is not valid JSON: {error}") from error
    if not isinstance(tree, dict) or not isinstance(tree.get("added_tokens"), list):
        raise DataError("not a tokenizer.json: it has no list of added_tokens")
    if '"ByteLevel"' not in json.dumps(tree.get("pre_tokenizer")):
        raise DataError("not a byte-level tokenizer; only those give exact bits per byte (train one, or use builtin)")
    return tree


def _read_added(tree: dict[str, Any], configuration: dict[str, Any]) -> list[AddedToken]:
    """The added tokens of a tokenizer.json, and behind them those that only `added_tokens_decoder` has."""
    listed = configuration.get("added_tokens_decoder")
    try:
        added = [AddedToken.from_tree(entry) for entry in tree["added_tokens"]]
        entries = {int(id): entry for id, entry in listed.items()} if isinstance(listed, dict) else {}
        further = [AddedToken.from_tree({**entry, "id": id}) for id, entry in sorted(entries.items())]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError("an added token has no id or no content") from error
    known = {token.content for token in added}
    return [token for token in (*added, *(new for new in further if new.content not in known)) if token.content]


def _read_names(configuration: dict[str, Any]) -> dict[str, str]:
    """What the configuration names: `bos_token` and so on to the token, given as a string or as an object."""
    contents = {
        role: value.get("content") if isinstance(value, dict) else value
        for role, value in configuration.items()
        if role.endswith("_token")
    }
    return {role: content for role, content in contents.items() if isinstance(content, str)}


def _build_encoder(tree: dict[str, Any], added: list[AddedToken]) -> tokenizers.Tokenizer:
    """The library's tokenizer, made to treat every added token as special, and specials as plain text."""
    entries = [{**token.as_tree(), "special": True} for token in added]
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps({**tree, "added_tokens": entries}))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"not a tokenizer.json that the tokenizers library reads: {error}") from error
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _find_ends(encoder: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and behind a text."""
    text = encoder.encode("a", add_special_tokens=False).ids
    whole = encoder.encode("a", add_special_tokens=True)
    first = whole.special_tokens_mask.index(0) if 0 in whole.special_tokens_mask else len(whole.ids)
    if whole.ids[first : first + len(text)] != text:
        raise DataError("the post-processor of this tokenizer does more than put tokens around a text")
    return whole.ids[:first], whole.ids[first + len(text) :]


def _spell_pieces(encoder: tokenizers.Tokenizer, specials: dict[str, int]) -> list[bytes]:
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    missing = [c for c, byte in _map_alphabet().items() if c not in vocabulary and byte not in NEVER_IN_UTF8]
    if missing:
        raise DataError(f"the vocabulary lacks {len(missing)} of the 256 single bytes, so it would lose text")
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        data = None if token in specials else read_bytes(token)
        pieces[id] = token.encode() if data is None else data
    return pieces
