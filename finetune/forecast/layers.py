"""Trace a few of a model's equal layers, and let them stand for the others.

What equal layers hold differs from one to the next only in the first ones, which find other things
in memory, and the last. So a few layers of a row are traced, and the others hand on their input.
Two in the middle must agree to the byte in forward, and two in backward; each layer that was left
out then counts as one of them, at its place.
"""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.models import recompute

# Layers to trace of a row of equal ones; more where a layer moves the input of the one before.
TRACED, WITH_OFFLOAD = 4, 5
# Attributes of modules that only count layers.
NUMBERS = ("layer_idx", "layer_index", "layer_id", "block_idx")


@dataclass(frozen=True)
class Segment:
    """What becomes of the bytes of a pass between two marks."""

    passing: int = 0
    """More at its end than at its start."""
    gradients: int = 0
    moved: int = 0
    most_passing: int = 0
    """At most, more than at its start."""
    most: int = 0
    """The same with gradients of weights."""
    products: int = 0
    """Matrix products."""


@dataclass(frozen=True)
class Mark:
    """Where a segment begins: a layer's forward pass, or what follows on a gradient."""

    name: str
    layer: int = -1


@dataclass(frozen=True)
class Row:
    """Equal layers in a row, by their numbers."""

    traced: tuple[int, ...]
    left_out: range
    """Before the last one of `traced`."""


class NotAlike(Exception):
    """Layers that should be equal are not, or do not follow one another."""


def rows(model: Any, num_recomputed: int, num_traced: int) -> list[Row]:
    """Return where more than `num_traced` layers in a row are equal."""
    if not recompute.count_layers(model):
        return []
    alike = [
        (number < num_recomputed, _signature(layer), _in_config(model.config, number))
        for number, layer in enumerate(recompute.layers(model))
    ]
    found, begin = [], 0
    for _, group in itertools.groupby(alike):
        end = begin + len(list(group))
        if end - begin > num_traced:
            middle = begin + num_traced - 1
            found.append(Row((*range(begin, middle), end - 1), range(middle, end - 1)))
        begin = end
    return found


def _signature(layer: nn.Module) -> list[Any]:
    """Return what makes layers equal: modules, plain attributes and tensors."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = {
            key: value
            for key, value in vars(module).items()
            if key not in NUMBERS and isinstance(value, int | float | str | None)
        }
        parts.append((name, type(module), plain))
    tensors = itertools.chain(layer.named_parameters(), layer.named_buffers())
    parts += [(name, each.shape, each.dtype, each.requires_grad) for name, each in tensors]
    return parts


def _in_config(config: Any, number: int) -> list[Any]:
    """Return what lists of a model's config hold for a layer, such as layer_types."""
    values = config.get_text_config().to_dict().items()
    listed = [(key, each) for key, each in values if isinstance(each, list | tuple)]
    return [(key, each[number]) for key, each in listed if number < len(each)]


@contextlib.contextmanager
def shortened(model: Any, chosen: Sequence[Row], ledger: Any) -> Iterator[None]:
    """Inside, let layers that are left out hand on their input, and mark where the others begin."""
    layers = recompute.layers(model) if chosen else []
    with contextlib.ExitStack() as undo:
        for row in chosen:
            for number in row.left_out:
                own = vars(layers[number]).get("forward")
                undo.callback(_restore, layers[number], own)
                layers[number].forward = _handed_on
            for number in row.traced:
                entering, leaving = _hooks(number, ledger)
                undo.callback(layers[number].register_forward_pre_hook(entering).remove)
                undo.callback(layers[number].register_forward_hook(leaving).remove)
        yield


def _restore(layer: nn.Module, forward: Any) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _handed_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return hidden_states


def _hooks(number: int, ledger: Any) -> tuple[Any, Any]:
    def entering(*_: Any) -> None:
        ledger.mark(Mark("forward", number))

    def leaving(layer: nn.Module, given: Any, out: Any) -> None:
        if not isinstance(out, torch.Tensor):
            raise NotAlike("a layer returns more than its output")
        if out.requires_grad:
            out.register_hook(lambda gradient: ledger.mark(Mark("backward", number)))

    return entering, leaving


def whole(
    pass_: Sequence[tuple[Mark, Segment]], chosen: Sequence[Row]
) -> list[tuple[Mark, Segment]]:
    """Return the segments of a pass through all layers. Raises NotAlike if layers differ."""
    marks = [mark for mark, _ in pass_]
    if len(set(marks)) != len(marks):
        raise NotAlike("a layer runs twice")
    copies = {}
    names = {mark.name for mark in marks} & {"forward", "backward"}
    for row, name in itertools.product(chosen, names):
        numbers = row.traced[-3:] if name == "forward" else row.traced[2::-1]
        order = [Mark(name, number) for number in numbers]
        begin = marks.index(order[0]) if order[0] in marks else len(marks)
        if marks[begin : begin + 3] != order:
            raise NotAlike("layers do not follow one another")
        if pass_[begin][1] != pass_[begin + 1][1]:
            raise NotAlike("layers differ")
        copies[begin] = len(row.left_out)
    return [pair for place, pair in enumerate(pass_) for _ in range(1 + copies.get(place, 0))]
