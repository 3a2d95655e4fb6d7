"""Text to ids and back: byte-level BPE, lossless on every valid UTF-8 text.

`Tokenizer` wraps the `tokenizers` library around one `tokenizer.json`, ours or any other byte-level one
(GPT-2's kind, including DeepSeek's own). It promises three things beyond the library. No text becomes a special
token, however it is spelled. `token_bytes` says exactly how many bytes of text each id stands for, so loss can
be given in bits per byte. Decoding joins bytes first, so a stream can hold back half a character.

New vocabularies are trained with DeepSeek-V3's pre-tokenizer: digits in threes, CJK runs apart, then words,
punctuation and white space. Other kinds of tokenizer (SentencePiece, WordPiece) are refused, because their ids
do not stand for definite bytes.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from moestro.data.specials import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, SPECIALS, THINK, THINK_END, USER
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


class Tokenizer:
    """One byte-level vocabulary; immutable.

    `specification` is the text of its `tokenizer.json`, `fingerprint` the hash of that text. `specials` maps every
    added token to its id. `pieces[id]` are the bytes an id decodes to. `token_bytes`, int32 [vocab_size], says how
    many bytes of text an id stands for, 0 for added tokens.
    """

    def __init__(self, specification: str, configuration: dict[str, Any] | None = None) -> None:
        """Raises `DataError` for anything but a byte-level vocabulary with a beginning and an end token."""
        self.specification = specification
        self.fingerprint = hashlib.sha256(specification.encode()).hexdigest()
        configuration = configuration or {}
        tree = _parse_specification(specification)
        added = [token for token in tree["added_tokens"] if isinstance(token, dict)]
        self.specials: dict[str, int] = {token["content"]: token["id"] for token in added}
        self._encoder = _build_encoder(tree)
        self.pieces = _spell_pieces(self._encoder, self.specials)
        self.vocab_size = len(self.pieces)
        self.bos_id = self._require("bos", configuration)
        self.eos_id = self._require("eos", configuration)
        pad = self._find("pad", configuration)
        self.pad_id = self.eos_id if pad is None else pad
        self.user_id = self._find("user", configuration)
        self.assistant_id = self._find("assistant", configuration)
        self.think_id = self.specials.get(THINK)
        self.think_end_id = self.specials.get(THINK_END)
        self.chat_template: str | None = configuration.get("chat_template")
        self._hidden = {token["id"] for token in added if token["special"]}
        self._hidden |= {self.bos_id, self.eos_id, self.pad_id}
        self._hidden |= {id for id in (self.user_id, self.assistant_id) if id is not None}
        self.token_bytes: npt.NDArray[np.int32] = np.array([len(piece) for piece in self.pieces], dtype=np.int32)
        self.token_bytes[list(self.specials.values())] = 0
        self.token_bytes.flags.writeable = False

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json`, or the one in a directory; files beside it name specials and template."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        configuration_path = path.with_name("tokenizer_config.json")
        template_path = path.with_name("chat_template.jinja")
        try:
            specification = path.read_text("utf-8")
            configuration = json.loads(configuration_path.read_text("utf-8")) if configuration_path.exists() else {}
            if not isinstance(configuration, dict):
                raise DataError(f"{configuration_path} is not a JSON object")
            if template_path.exists():
                configuration["chat_template"] = template_path.read_text("utf-8")
        except OSError as error:
            raise DataError(f"cannot read tokenizer {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"the tokenizer files beside {path} are damaged: {error}") from error
        template = configuration.get("chat_template")
        if isinstance(template, list):  # several named templates: take the usual one
            named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
            configuration["chat_template"] = named.get("default")
        try:
            return cls(specification, configuration)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error

    @classmethod
    def builtin(cls) -> Tokenizer:
        """The shipped vocabulary of 8192, trained on the built-in corpus."""
        path = resources.files("moestro") / "data" / "builtin" / "tokenizer.json"
        return cls(path.read_text("utf-8"), {"chat_template": CHAT_TEMPLATE})

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
            special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIALS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tree = json.loads(tokenizer.to_str())
        for token in tree["added_tokens"]:  # thoughts stay visible, as in DeepSeek's own file
            token["special"] = token["content"] not in (THINK, THINK_END)
        specification = json.dumps(tree, ensure_ascii=False, separators=(",", ":"))
        return cls(specification, {"chat_template": CHAT_TEMPLATE})

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
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers` reads them."""
        names = {id: name for name, id in self.specials.items()}
        configuration = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": names.get(self.bos_id),
            "eos_token": names.get(self.eos_id),
            "pad_token": names.get(self.pad_id),
            "add_bos_token": False,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
        }
        if self.chat_template is not None:
            configuration["chat_template"] = self.chat_template
        folder = Path(directory)
        try:
            (folder / "tokenizer.json").write_text(self.specification, "utf-8")
            text = json.dumps(configuration, ensure_ascii=False, indent=2)
            (folder / "tokenizer_config.json").write_text(text + "\n", "utf-8")
        except OSError as error:
            raise DataError(f"cannot write the tokenizer to {folder}: {error.strerror}") from error

    def _spell(self, id: int, skip_special: bool) -> bytes:
        if id >= self.vocab_size or (skip_special and id in self._hidden):
            return b""
        return self.pieces[id]

    def _find(self, role: str, configuration: dict[str, Any]) -> int | None:
        name = configuration.get(f"{role}_token")
        if isinstance(name, dict):
            name = name.get("content")
        candidates = (name, *_FALLBACKS[role]) if isinstance(name, str) else _FALLBACKS[role]
        return next((self.specials[candidate] for candidate in candidates if candidate in self.specials), None)

    def _require(self, role: str, configuration: dict[str, Any]) -> int:
        id = self._find(role, configuration)
        if id is None:
            raise DataError(
                f"no {role.upper()} token found (tried {' '.join(_FALLBACKS[role])}); "
                f'name it as "{role}_token" in tokenizer_config.json'
            )
        return id


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


def _build_encoder(tree: dict[str, Any]) -> tokenizers.Tokenizer:
    """The library's tokenizer, made to treat every added token as special, and specials as plain text."""
    added = [{**token, "special": True} for token in tree["added_tokens"]]
    try:
        encoder = tokenizers.Tokenizer.from_str(json.dumps({**tree, "added_tokens": added}))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"not a tokenizer.json that the tokenizers library reads: {error}") from error
    encoder.encode_special_tokens = True
    encoder.no_padding()
    encoder.no_truncation()
    return encoder


def _spell_pieces(encoder: tokenizers.Tokenizer, specials: dict[str, int]) -> list[bytes]:
    vocabulary = encoder.get_vocab(with_added_tokens=True)
    char_to_byte = _map_alphabet()
    missing = [char for char in char_to_byte if char not in vocabulary]
    if missing:
        raise DataError(f"the vocabulary lacks {len(missing)} of the 256 single bytes, so it would lose text")
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, id in vocabulary.items():
        if token in specials or not all(char in char_to_byte for char in token):
            pieces[id] = token.encode()
        else:
            pieces[id] = bytes(char_to_byte[char] for char in token)
    return pieces


def _map_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: Latin-1 letters for themselves, other bytes from U+0100 on, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
