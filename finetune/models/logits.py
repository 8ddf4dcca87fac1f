"""Logits that are all there: what a model does to them, their losses and log-probabilities."""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from finetune import kernels


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
    logits_SV: torch.Tensor, labels_S: torch.Tensor, with_entropy: bool, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities of labels and entropies of distributions, float32 [S], nats.

    For logits that are all there; `temperature` divides them. Without `with_entropy` the second is
    empty.
    """
    log_SV = _log_softmax(logits_SV, temperature)
    logprobs = log_SV.gather(1, labels_S[:, None])[:, 0]
    return logprobs, -(log_SV.exp() * log_SV).sum(-1) if with_entropy else logprobs.new_zeros(0)


def _log_softmax(logits_SV: torch.Tensor, temperature: float) -> torch.Tensor:
    logits_SV = logits_SV.float()
    if temperature != 1.0:
        logits_SV = logits_SV / temperature
    return torch.log_softmax(logits_SV, -1)


def divergence(
    logits_SV: torch.Tensor, reference_SU: torch.Tensor, beta: float, temperature: float = 1.0
) -> torch.Tensor:
    """Return the generalised Jensen-Shannon divergence of distributions, float32 [S], nats.

    Between p of the logits and r of the reference, with m = (1 - beta) p + beta r, it is
    beta KL(r || m) + (1 - beta) KL(p || m); beta = 0 means the forward KL(r || p), and beta = 1 the
    reverse KL(p || r) (Agarwal et al., 2024). Inside, it is 0 at either end, hence these limits.
    `temperature` divides both logits. Of vocabularies of two sizes V and U, as of models that fill
    theirs up with rows that no token has, the ids that both have are compared.
    """
    size = min(logits_SV.shape[1], reference_SU.shape[1])
    log_p, log_r = (
        _log_softmax(logits[:, :size], temperature) for logits in (logits_SV, reference_SU)
    )
    return _divergence(log_p, log_r, beta)


LEAST_REST = 1e-6
"""Probability below which what is left beside stored ones is their rounding."""


def divergence_from_top(
    logits_SV: torch.Tensor, ids_SK: torch.Tensor, logprobs_SK: torch.Tensor, beta: float,
    temperature: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Return the same from the K likeliest tokens of a reference, float32 [S], nats.

    All other tokens are one event of both distributions, whose probability is what is left: so it
    is never more than the divergence of whole distributions, 0 only if what is stored agrees, and
    with K = V equal to it. `temperature` divides the logits; what is stored has been divided.
    """
    log_p = _log_softmax(logits_SV, temperature)
    of_top = log_p.gather(1, ids_SK)
    if ids_SK.shape[1] == logits_SV.shape[1]:
        return _divergence(of_top, logprobs_SK, beta)
    others = log_p.scatter(1, ids_SK, -math.inf).logsumexp(-1, keepdim=True)
    rest = (1 - logprobs_SK.double().exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST)
    known = torch.cat([logprobs_SK, rest.log().float()], 1)
    return _divergence(torch.cat([of_top, others], 1), known.log_softmax(-1), beta)


def _divergence(log_p: torch.Tensor, log_r: torch.Tensor, beta: float) -> torch.Tensor:
    if beta == 0.0:
        return (log_r.exp() * (log_r - log_p)).sum(-1)
    if beta == 1.0:
        return (log_p.exp() * (log_p - log_r)).sum(-1)
    log_m = torch.logaddexp(log_p + math.log1p(-beta), log_r + math.log(beta))
    to_r, to_p = ((log.exp() * (log - log_m)).sum(-1) for log in (log_r, log_p))
    return beta * to_r + (1 - beta) * to_p


def cross_entropy_(
    raw_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None,
    finish: LogitTransform, smoothing: float, needs_grad: bool,
) -> torch.Tensor:  # fmt: skip
    """Sum the weighted losses of raw logits in float32, and turn `raw_CV` into its gradient."""
    if kernel := fused(raw_CV.device)[0]:
        total: torch.Tensor = kernel.cross_entropy_(
            raw_CV, labels_C, weights_C, finish, smoothing, needs_grad
        )
        return total
    return _plain_(raw_CV, labels_C, weights_C, finish, smoothing, needs_grad)


@functools.cache
def fused(device: torch.device) -> tuple[Any, str]:
    """Return the kernels of a GPU, or None and why they are not used."""
    if device.type != "cuda":
        return None, ""
    return kernels.load(
        "finetune.models.cross_entropy_kernel", lambda made: difference(made, device)
    )


def difference(made: Any, device: torch.device) -> str:
    """Say how the losses and gradients of kernels differ from the reference's by over 1e-5."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(5, 4_999, generator=random)
    labels = torch.randint(4_999, (5,), generator=random).to(device)
    weights = torch.rand(5, generator=random).to(device)
    for finish in (LogitTransform(), LogitTransform(scale=0.5, cap=30.0)):
        for form in ((None, 0.0), (weights, 0.1)):
            own, right = (logits.to(device, copy=True) for _ in range(2))
            loss = made.cross_entropy_(own, labels, form[0], finish, form[1], True)
            wanted = _plain_(right, labels, form[0], finish, form[1], True)
            if not abs(loss - wanted) <= 1e-5 * abs(wanted):
                return f"its loss is {loss:.6g} for {wanted:.6g}"
            if not (error := (own - right).abs().max() / right.abs().max()) <= 1e-5:
                return f"its gradient differs by {error:.1e}"
    return ""


def _plain_(
    raw_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None,
    finish: LogitTransform, smoothing: float, needs_grad: bool,
) -> torch.Tensor:  # fmt: skip
    """Do the same by PyTorch's operations, which hold the logits in float32.

    The sum of exponentials is not needed: the highest probability is exp(highest logit) / sum,
    never less than 1 / V.
    """
    logits, labels = finish(raw_CV.float()), labels_C[:, None]
    chances = torch.softmax(logits, -1)
    highest = finish(raw_CV.amax(-1, keepdim=True).float())  # scales are positive, and tanh rises
    of_labels = logits.gather(1, labels)
    # Exact for the tokens that are known best.
    losses = (highest - of_labels) - chances.amax(-1, keepdim=True).log()
    if smoothing:
        losses += smoothing * (of_labels - logits.mean(-1, keepdim=True))
    if needs_grad:
        if smoothing:
            chances -= smoothing / chances.shape[1]
        chances.scatter_add_(1, labels, torch.full_like(losses, smoothing - 1))
        if weights_C is not None:
            chances *= weights_C[:, None]
        finish.backward_(chances, logits)
        raw_CV.copy_(chances)
    return losses.sum() if weights_C is None else (losses[:, 0] * weights_C).sum()
