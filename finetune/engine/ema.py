"""Keep an exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class Ema:
    """Float32 averages of the weights (4 bytes each), which evaluation, samples and export use.

    After step t: average = d x average + (1 - d) x weight, with d = min(decay, (1 + t) / (10 + t)),
    so that the first steps forget the initial weights (as in TensorFlow's
    ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """`model`: unwrapped, after sharding; each process averages its part of each weight."""
        self.decay = decay
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages after step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        now = [p.detach().float() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - decay)

    @torch.no_grad()
    def put_in(self) -> None:
        """Replace the model's weights by the averages."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.weights[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its own weights again, bit for bit."""
        own = [p.detach().clone() for p in self.parameters.values()]
        self.put_in()
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight in zip(self.parameters.values(), own):
                    parameter.copy_(weight)
