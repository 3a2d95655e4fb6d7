"""What a product needs of a parameter in another precision: made once, and kept until the parameter changes.

Master weights are fp32; a product in bf16 needs them cast. One cast serves every micro-batch of a step, forward and
backward, recomputed blocks included. A form is kept beside the parameter's version, which every in-place change raises,
and goes when the parameter goes. `forget` drops all of them: for changes that keep the version, as FSDP's gathering of
shards does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_forms: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {dtype: (version, form)}


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of `weight` in `dtype`, without gradient; itself where that is its own type. Not to be written to."""
    if weight.dtype == dtype:
        return weight
    if not isinstance(weight, torch.nn.Parameter) or weight.is_inference():  # nobody asks again, or no version tells
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
