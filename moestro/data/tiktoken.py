r"""`tiktoken.model` files, which Moonlight and Kimi-K2 bring instead of a tokenizer.json, made into one.

The file has a line for each token: its bytes in base64, and its rank, which is also its id. Of the pairs of neighbours
in a piece of text, tiktoken joins the one whose bytes have the lowest rank. So every way of cutting a token in two that
leaves two tokens becomes a merge, at that token's place, and a piece that is a token as a whole is that token.

The pattern that cuts text into pieces is in the Python file beside the model, which is never run; this is Moonshot's.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moestro.data.byte_alphabet import spell_bytes
from moestro.errors import DataError

NAME = "tiktoken.model"
CLASSES = (None, "TikTokenTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend")
NUM_RESERVED = 256  # ids behind the ranks, for special tokens
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


def read_tiktoken(path: Path, configuration: Mapping[str, Any]) -> str:
    """The text of a tokenizer.json that encodes as the file does. DataError if it is damaged or of another family."""
    if configuration.get("tokenizer_class") not in CLASSES:
        raise DataError(f"{path} belongs to a tokenizer class whose way of cutting text is not known here")
    ranks = read_ranks(path)
    added = _name_specials(len(ranks), configuration.get("added_tokens_decoder"))
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {spell_bytes(token): rank for token, rank in ranks.items()},
            "merges": [[spell_bytes(left), spell_bytes(right)] for left, right in find_merges(ranks)],
        },
    }
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank; the ranks are 0, 1, 2, … DataError for anything else."""
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path} is damaged: a line is not a token in base64 and its rank") from error
    if not ranks or sorted(ranks.values()) != list(range(len(pairs))):
        raise DataError(f"{path} is damaged: its ranks are not 0, 1, 2, … each once")
    return ranks


def find_merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens whose join is a token, in the order in which tiktoken prefers the joins."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:n], token[n:]) for n in range(1, len(token)) if token[:n] in ranks and token[n:] in ranks]
        merges += sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
    return merges


def _name_specials(base: int, listed: object) -> list[dict[str, Any]]:
    """The added tokens: those that the configuration lists, and names for the rest of the reserved ids."""
    entries = listed if isinstance(listed, dict) else {}
    try:
        named = {int(id): entry["content"] for id, entry in entries.items()}
        flags = {int(id): entry for id, entry in entries.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError("added_tokens_decoder does not map ids to tokens with a content") from error
    ids = sorted({*range(base, base + NUM_RESERVED), *named})
    defaults = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [
        {"id": id, "content": named.get(id, f"<|reserved_token_{id}|>")}
        | {flag: bool(flags.get(id, {}).get(flag, default)) for flag, default in defaults.items()}
        for id in ids
    ]
