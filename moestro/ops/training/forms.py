"""Parameters in another precision: each form is made once and kept until the parameter changes.

Master weights are fp32; a product in bf16 needs them cast, one in FP8 quantised. One form serves every micro-batch of a
step, forward and backward, including recomputed blocks. A form is kept with the parameter's version, which every
in-place change raises, and is dropped together with the parameter. `forget` drops all forms, for changes that keep the
version, such as FSDP gathering its shards. The latest activations have shared forms, too: several layers read one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

LATEST = 2  # activations with shared forms: while one is read, another may come and go
_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {kind: (version, form)}
_shared: list[tuple[weakref.ref[Tensor], Hashable, Any]] = []  # (activation, (kind, version), form)


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `weight` in `dtype`, without gradient; `weight` itself if that is its type. Do not write to it."""
    if weight.dtype == dtype:
        return weight
    form: Tensor = keep(weight, dtype, lambda values: values.to(dtype))
    return form


def keep(weight: Tensor, kind: Hashable, make: Callable[[Tensor], Any]) -> Any:
    """`make` of the values of `weight`, made again only when they change; `kind` names what it makes."""
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():  # not asked for again, or has no version
        return make(weight.detach())
    kept = _forms.setdefault(weight, {})
    version, form = kept.get(kind, (None, None))
    if version != weight._version:
        form = make(weight.detach())
        kept[kind] = (weight._version, form)
    return form


def share(x: Tensor, kind: Hashable, make: Callable[[Tensor], Any]) -> Any:
    """`make` of the values of an activation, made once for all that ask while x is among the latest."""
    if torch.compiler.is_compiling() or x.is_inference():
        return make(x.detach())
    wanted = (kind, x._version)
    for of, key, form in _shared:
        if of() is x and key == wanted:
            return form
    form = make(x.detach())
    _shared[:] = [*_shared[1 - LATEST :], (weakref.ref(x), wanted, form)]
    return form


def forget() -> None:
    """Drop every form."""
    _forms.clear()
    _shared.clear()
