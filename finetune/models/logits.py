"""Logits that are all there: what a model does to them, their losses and log-probabilities."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to logits x after the projection: scale x, or cap tanh(scale x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    def backward_(self, grad: torch.Tensor, finished: torch.Tensor) -> None:
        """Turn the gradient of the finished logits into that of the raw ones, in place."""
        if self.cap is not None:
            grad.mul_(1 - (finished / self.cap) ** 2)  # tanh' = 1 - tanh^2
        if self.scale != 1.0:
            grad.mul_(self.scale)


def cross_entropy_sum(
    logits_SV: torch.Tensor,
    labels_S: torch.Tensor,
    weights_S: torch.Tensor | None,
    smoothing: float,
) -> torch.Tensor:
    """Sum the losses of logits that are all there, each times its weight; float32."""
    how = "sum" if weights_S is None else "none"
    losses = F.cross_entropy(logits_SV.float(), labels_S, reduction=how, label_smoothing=smoothing)
    return losses if weights_S is None else (losses * weights_S).sum()


def logprobs_and_entropy(
    logits_SV: torch.Tensor, labels_S: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of labels and entropies of distributions, float32 [S], nats.

    For logits that are all there. Without `with_entropy` the second is empty.
    """
    log_SV = torch.log_softmax(logits_SV.float(), -1)
    logprobs = log_SV.gather(1, labels_S[:, None])[:, 0]
    return logprobs, -(log_SV.exp() * log_SV).sum(-1) if with_entropy else logprobs.new_zeros(0)
