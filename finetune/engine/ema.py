"""An exponential moving average of the weights that train."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Float32 averages next to the weights, 4 bytes for each; evaluated, sampled and exported in
    their place.

    After step t: average = d x average + (1 - d) x weight, with d = min(decay, (1 + t) / (10 + t)),
    so that the first steps forget where they started (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model`: bare, as it is shared between processes; the averages are of its own part of
        each weight.
        """
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After step number `step`, from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @torch.no_grad()
    def put_in(self) -> None:
        """The model has the averages as its weights from here on."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages inside, and its own weights, to the bit, afterwards."""
        own = [p.detach().clone() for p in self.parameters.values()]
        self.put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters.values(), own):
                    parameter.copy_(weight)
