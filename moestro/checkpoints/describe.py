"""What the weights of a directory take, part by part, as they are stored and as they are served; from headers alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from moestro.checkpoints.files import ModelFiles
from moestro.checkpoints.packed import dtype_name
from moestro.model.parts import Part, served_parts

# what a parameter belongs to: the first of these that is in its name
GROUPS = {
    "mtp.": "MTP", "embed.": "embedding and head", "head.": "embedding and head", ".router.": "routers",
    ".ffn.experts.": "routed experts", ".ffn.shared.": "shared experts", ".ffn.": "dense layers",
    ".attention.": "attention", "norm.": "norms",
}  # fmt: skip
# why codes are served as plain weights, by the form of the part; for the rest, some of its parameters are not codes
REASONS = {"heads": "the absorbed form of MLA", "plain": "look-ups"}
OTHER_REASON = "products shared with plain weights"


def describe_weights(files: ModelFiles) -> dict[str, Any]:
    """{"format", "stored", "parts", "served", "dequantised"}, all but the first in bytes.

    `stored` and `served` are by format, `parts` for every group of `GROUPS` and by format. `served` is for weights that
    are kept as they are stored; `dequantised`, by reason, counts those of it that are codes in the files.
    """
    parts: dict[str, Counter[str]] = {group: Counter() for group in GROUPS.values()}
    for name in files.shapes:
        parts[group_of(name)].update(files.stored_bytes(name))
    served: Counter[str] = Counter()
    opened: Counter[str] = Counter()
    for part in served_parts(files.config):
        format, nbytes = served_as(part, files)
        served[format] += nbytes
        if format not in ("fp8", "int4") and any(files.stored_format(name) for name in part.parameters):
            opened[REASONS.get(part.form, OTHER_REASON)] += nbytes
    stored = files.stored_formats
    return {
        "format": str(files.scheme or " and ".join(sorted(stored))),
        "stored": stored,
        "parts": {group: dict(counts) for group, counts in parts.items() if counts},
        "served": dict(served),
        "dequantised": dict(opened),
    }


def group_of(parameter: str) -> str:
    """What a parameter, or a served part, belongs to."""
    return next(group for mark, group in GROUPS.items() if mark in parameter)


def served_as(part: Part, files: ModelFiles) -> tuple[str, int]:
    """The format of a part that is served as it is stored, and its bytes.

    Codes stay codes in products of rows. The absorbed form of MLA needs columns of `kv_up`, so that it is dequantised.
    """
    formats = {files.kept_format(name) for name in part.parameters}
    format = formats.pop() if len(formats) == 1 else None
    if format is not None and part.rule in ("weights", "head"):
        return format, sum(sum(files.stored_bytes(name).values()) for name in part.parameters)
    dtype = part.dtype(files.dtype)
    shapes = [files.shapes[name] for name in part.parameters]
    sizes = [part.cut.shape(shapes[0][1])] if part.cut is not None else shapes
    return dtype_name(dtype), sum(map(math.prod, sizes)) * dtype.itemsize
