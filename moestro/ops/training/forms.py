"""Parameters cast to another precision: each cast is made once and kept until the parameter changes.

Master weights are fp32; a product in bf16 needs them cast. One cast serves every micro-batch of a step, forward and
backward, including recomputed blocks. A form is kept with the parameter's version, which every in-place change raises,
and is dropped together with the parameter. `forget` drops all forms, for changes that keep the version, such as FSDP
gathering its shards.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {dtype: (version, form)}


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `weight` in `dtype`, without gradient; `weight` itself if that is its type. Do not write to it."""
    if weight.dtype == dtype:
        return weight
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():  # not asked for again, or has no version
        return weight.to(dtype)
    kept = _forms.setdefault(weight, {})
    version, form = kept.get(dtype, (None, None))
    if version != weight._version:
        form = weight.detach().to(dtype)
        kept[dtype] = (weight._version, form)
    assert form is not None
    return form


def forget() -> None:
    """Drop every form."""
    _forms.clear()
