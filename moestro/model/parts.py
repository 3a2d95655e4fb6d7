"""The parts of a served model: one list for packing, saving, checking, updating and building the layers.

    plain    a parameter as it is                                        embeddings, norms, router biases
    linear   one product for parameters [M, K] with the same input       attention, FFN, router, head
    heads    a matrix [V, K] for every head, cut out of one parameter    the absorbed form of MLA
    experts  the routed experts of a layer                               gate_up [E, 2F, D] and down [E, D, F]

A part's name is its place in the model, as in docs/weights.md; its parameters have the names of the trained model.
`checkpoints/packing.py` makes the parts, `model/served.py` computes with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from moestro.config import ModelConfig
from moestro.ops.serving.formats import FORMATS, plain_format
from moestro.ops.serving.weights import PackedExperts, PackedHeads, PackedLinear
from moestro.scores import SCORES

PackedPart = Tensor | PackedLinear | PackedHeads | PackedExperts
Form = Literal["plain", "linear", "heads", "experts"]
Rule = Literal["activations", "weights", "head", "router"]
LEAST_HEAD_BITS = 8
Kept = TypeVar("Kept", Tensor, PackedLinear, PackedHeads, PackedExperts)


@dataclass(frozen=True)
class HeadCut:
    """How to cut a matrix for every head out of a parameter [H · rows, K]: rows `start` to `stop`, or transposed."""

    num_heads: int
    start: int
    stop: int
    turned: bool = False

    def take(self, parameter: Tensor) -> Tensor:
        """[H · rows, K] -> [H, stop − start, K], or [H, K, stop − start] if `turned`."""
        rows = parameter.unflatten(0, (self.num_heads, -1))[:, self.start : self.stop]
        return rows.transpose(1, 2) if self.turned else rows

    def shape(self, columns: int) -> tuple[int, int, int]:
        """The shape that `take` gives for K `columns`."""
        rows = self.stop - self.start
        return (self.num_heads, columns, rows) if self.turned else (self.num_heads, rows, columns)


@dataclass(frozen=True)
class Part:
    """One part: its name, its form, the parameters it is made of, and the rule for its format.

    activations  the precision of activations: plain parameters and the matrices of heads
    weights      the format that the user chose
    head         the same, but at least 8 bits; as it is beside fp8, as in DeepSeek's checkpoints
    router       fp32
    """

    name: str
    form: Form
    parameters: tuple[str, ...]
    rule: Rule
    cut: HeadCut | None = None

    def dtype(self, activations: torch.dtype) -> torch.dtype:
        """The type that parameters are rounded to before packing."""
        return torch.float32 if self.rule == "router" else activations

    def format(self, weights: str, activations: torch.dtype) -> str:
        """The format of this part in a model packed as `weights`."""
        if self.rule == "weights":
            return weights
        if self.rule == "head" and weights != "fp8":
            return weights if FORMATS[weights].bits >= LEAST_HEAD_BITS else "int8"
        return plain_format(self.dtype(activations))


def served_parts(config: ModelConfig) -> list[Part]:
    """Every part of a served model, in packing order."""
    head = "embed.weight" if config.tie_embeddings else "head.weight"
    parts = [_plain("embed.weight"), Part("head", "linear", (head,), "head"), _plain("norm.weight")]
    for index in range(config.num_layers):
        parts += _block_parts(config, index, f"layers.{index}")
    for depth in range(config.mtp_depth):
        at = f"mtp.{depth}"
        parts += [_plain(f"{at}.embed_norm.weight"), _plain(f"{at}.hidden_norm.weight"), _linear(at, "project")]
        parts += [*_block_parts(config, config.num_layers + depth, f"{at}.block"), _plain(f"{at}.norm.weight")]
    return parts


def _plain(parameter: str) -> Part:
    return Part(parameter, "plain", (parameter,), "activations")


def _linear(at: str, name: str, *parameters: str) -> Part:
    """The product `name` below `at`, made of the layers `parameters` there, by default of the layer `name`."""
    return Part(f"{at}.{name}", "linear", tuple(f"{at}.{layer}.weight" for layer in parameters or (name,)), "weights")


def _block_parts(config: ModelConfig, index: int, at: str) -> Iterator[Part]:
    yield from (_plain(f"{at}.attention_norm.weight"), _plain(f"{at}.ffn_norm.weight"))
    yield from (_latent_parts if config.attention == "mla" else _head_parts)(config, f"{at}.attention")
    if config.is_moe(index):
        yield from _moe_parts(config, f"{at}.ffn")
    else:
        yield from _mlp_parts(f"{at}.ffn")


def _latent_parts(config: ModelConfig, at: str) -> Iterator[Part]:
    yield _linear(at, "down", "q_down" if config.q_lora_rank else "q", "kv_down")  # queries or their latents first
    if config.q_lora_rank:
        yield from (_plain(f"{at}.q_norm.weight"), _linear(at, "q_up"))
    yield _plain(f"{at}.kv_norm.weight")
    num_heads, split, whole = config.num_heads, config.nope_dim, config.nope_dim + config.v_dim
    up = (f"{at}.kv_up.weight",)
    yield Part(f"{at}.absorb", "heads", up, "activations", HeadCut(num_heads, 0, split, turned=True))
    yield Part(f"{at}.expand", "heads", up, "activations", HeadCut(num_heads, split, whole))
    yield _linear(at, "out")


def _head_parts(config: ModelConfig, at: str) -> Iterator[Part]:
    yield from (_linear(at, "down", "q", "kv"), _linear(at, "out"))


def _mlp_parts(at: str) -> Iterator[Part]:
    yield from (_linear(at, "gate_up"), _linear(at, "down"))


def _moe_parts(config: ModelConfig, at: str) -> Iterator[Part]:
    yield Part(f"{at}.router.bias", "plain", (f"{at}.router.bias",), "router")
    if SCORES[config.router.score].is_learned:
        yield Part(f"{at}.gate", "linear", (f"{at}.router.weight",), "router")
    yield Part(f"{at}.experts", "experts", (f"{at}.experts.gate_up", f"{at}.experts.down"), "weights")
    if config.num_shared_experts:
        yield from _mlp_parts(f"{at}.shared")


class Parts:
    """Packed parts by name, for one layer: names are relative to its place in the model."""

    def __init__(self, parts: Mapping[str, PackedPart], place: str = "") -> None:
        self._parts, self._place = parts, place

    def at(self, name: str) -> Parts:
        """The parts below `name`."""
        return Parts(self._parts, f"{self._place}{name}.")

    def plain(self, name: str) -> Tensor:
        """A parameter as it is."""
        return self._take(name, Tensor)

    def linear(self, name: str) -> PackedLinear:
        """One product."""
        return self._take(name, PackedLinear)

    def heads(self, name: str) -> PackedHeads:
        """A matrix for every head."""
        return self._take(name, PackedHeads)

    def experts(self, name: str) -> PackedExperts:
        """The routed experts of a layer."""
        return self._take(name, PackedExperts)

    def _take(self, name: str, form: type[Kept]) -> Kept:
        part = self._parts[self._place + name]
        if not isinstance(part, form):
            raise TypeError(f"{self._place}{name} is a {type(part).__name__}, not a {form.__name__}")
        return part


def saved_tensors(name: str, part: PackedPart) -> dict[str, Tensor]:
    """The tensors of a part, by the names they are saved under."""
    if isinstance(part, Tensor):
        return {name: part}
    return {f"{name}.{key}": tensor for key, tensor in part.tensors().items()}


def count_bytes(parts: Mapping[str, PackedPart], forms: Sequence[type[PackedPart]]) -> int:
    """Bytes of all parts of the given forms."""
    return sum(part.nbytes for part in parts.values() if isinstance(part, tuple(forms)))
