"""Weights, counted, and watched: which have moved, which are no numbers."""

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from finetune.errors import ExportError


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once, and 4-bit ones, two to a byte, as what they stand for."""
    packed = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    sizes = [(p.requires_grad, p.numel() if state is None else state.shape.numel()) for p, state in packed]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def flops_per_token(num_trainable: int, num_parameters: int) -> float:
    """Of training: 2 for each weight forward, 2 backward for its input, 2 for itself where it trains.

    All weights count, also embeddings and experts that a token does not meet; attention and recomputation do not.
    """
    return 2.0 * num_trainable + 4.0 * num_parameters


def fingerprints(model: nn.Module, own_part: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | str]:
    """Name -> what tells whether a weight has moved: the float64 sum of its values, or a hash of quantised ones with their scales.

    `own_part`: what this process holds of a weight.
    """
    scales = {id(m.weight): _scales(m) for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}
    return {
        name: float(own_part(p).sum(dtype=torch.float64)) if id(p) not in scales else _hash(own_part(p), *scales[id(p)])
        for name, p in model.named_parameters()
    }


def _scales(layer: Any) -> list[torch.Tensor | None]:
    """What the bytes of a layer of bitsandbytes are multiplied with. 4-bit layers keep it also where their weight is a part only."""
    state = getattr(layer, "quant_state", None) or getattr(layer.weight, "quant_state", None)
    if state is None:  # 8 bits: one scale for each row
        return [getattr(layer.weight, "SCB", None)]
    return [state.absmax, state.state2.absmax if state.nested else None]


def _hash(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).as_subclass(torch.Tensor).numpy().tobytes()
            )
    return digest.hexdigest()


def still(model: nn.Module, moved: set[str]) -> tuple[list[str], int]:
    """(names of weights that train and are what they were, number of weights that train).

    Raises ExportError if a frozen weight is among those that `moved`.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if frozen := moved.difference(trained):
        raise ExportError(f"{len(frozen)} frozen weights have moved, such as {min(frozen)}")
    return [name for name in trained if name not in moved], len(trained)


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights that hold NaN or infinity."""
    return [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not math.isfinite(float(p.detach().sum(dtype=torch.float64)))
    ]
