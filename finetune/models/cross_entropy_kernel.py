"""`logits.cross_entropy_` as one Triton kernel.

It reads the logits of a chunk twice and writes their gradient once, in 16 bits: 6 bytes for each,
where PyTorch's operations move about 26 in float32. Sums, exponentials and gradients are float32.
"""

import torch
import triton
import triton.language as tl

from finetune.models.logits import LogitTransform

BLOCK = 4096


def cross_entropy_(
    raw_CV: torch.Tensor, labels_C: torch.Tensor, weights_C: torch.Tensor | None,
    finish: LogitTransform, smoothing: float, needs_grad: bool,
) -> torch.Tensor:  # fmt: skip
    """Sum weighted losses in float32, and turn `raw_CV` into its gradient."""
    count, size = raw_CV.shape
    losses_C = torch.empty(count, dtype=torch.float32, device=raw_CV.device)
    _cross_entropy[(count,)](
        raw_CV, raw_CV.stride(0), labels_C, losses_C if weights_C is None else weights_C, losses_C,
        finish.scale, finish.cap or 1.0, smoothing, SIZE=size, HAS_CAP=finish.cap is not None,
        HAS_WEIGHTS=weights_C is not None, NEEDS_GRAD=needs_grad, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return losses_C.sum()


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    raw, row_stride, labels, weights, losses, scale, cap, smoothing, SIZE: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_WEIGHTS: tl.constexpr, NEEDS_GRAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for each token."""
    row = tl.program_id(0).to(tl.int64)
    raw += row * row_stride
    label = tl.load(labels + row)
    # Before the reductions, where all warps meet: later one of them might find its gradient here.
    of_label = _finished(tl.load(raw + label).to(tl.float32), scale, cap, HAS_CAP)
    highest = -float("inf")
    total = 0.0
    summed = 0.0  # of the logits, for label smoothing
    for start in range(0, SIZE, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < SIZE
        logits = _finished(tl.load(raw + place, mask=inside).to(tl.float32), scale, cap, HAS_CAP)
        summed += tl.sum(tl.where(inside, logits, 0.0))
        logits = tl.where(inside, logits, -float("inf"))
        higher = tl.maximum(highest, tl.max(logits))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher))
        highest = higher
    weight = 1.0
    if HAS_WEIGHTS:
        weight = tl.load(weights + row)
    loss = (highest - of_label) + tl.log(total) + smoothing * (of_label - summed / SIZE)
    tl.store(losses + row, loss * weight)
    if NEEDS_GRAD:
        for start in range(0, SIZE, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < SIZE
            logits = _finished(
                tl.load(raw + place, mask=inside).to(tl.float32), scale, cap, HAS_CAP
            )
            grad = tl.exp(logits - highest) / total - smoothing / SIZE
            grad += tl.where(place == label, smoothing - 1.0, 0.0)
            grad *= weight * scale
            if HAS_CAP:
                grad *= 1.0 - (logits / cap) * (logits / cap)
            tl.store(raw + place, grad.to(raw.dtype.element_ty), mask=inside)


@triton.jit
def _finished(raw, scale, cap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `LogitTransform`. Near 0, tanh by its series: the formula would cancel."""
    logits = raw * scale
    if HAS_CAP:
        x = logits / cap
        square = x * x
        near = x * (1.0 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315))))
        far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
        logits = cap * tl.where(square < 0.01, near, far)
    return logits
