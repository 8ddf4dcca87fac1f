"""`rounded_adamw.update` as one Triton kernel, which gives the same bits.

It reads weight, gradient and averages once and writes three of them once: 14 bytes a weight. `_rn`
operations, and no fused multiply-add, round as IEEE 754 says.
"""

import torch
import triton
import triton.language as tl

from finetune.engine.rounded_adamw import Factors

BLOCK = 1024


def update(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor,
    factors: Factors, key: int,
) -> None:  # fmt: skip
    """Update flat bfloat16 tensors in place."""
    count = len(weight)
    if count:
        _update[(triton.cdiv(count, BLOCK),)](
            weight, grad, mean, square, count, key, factors.decay, factors.mean,
            factors.square_kept, factors.square, factors.correction, factors.eps, factors.rate,
            BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip


# A number that is 1, or a multiple of 16, would be compiled into a kernel of its own.
@triton.jit(do_not_specialize=["count", "key"])
def _update(  # type: ignore[no-untyped-def]
    weight, grad, mean, square, count, key, decay, mean_factor, square_kept, square_factor,
    correction, eps, rate, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    exact = tl.load(grad + place, mask=inside).to(tl.float32)
    first = tl.load(mean + place, mask=inside).to(tl.float32)
    second = tl.load(square + place, mask=inside).to(tl.float32)
    moved = tl.load(weight + place, mask=inside).to(tl.float32)
    first = first + (exact - first) * mean_factor
    second = second * square_kept + exact * exact * square_factor
    scale = tl.sqrt_rn(second * correction) + eps
    moved = moved * decay + tl.div_rn(first, scale) * rate
    bits = place.to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    bits = bits ^ (bits >> 31)
    tl.store(weight + place, _rounded(moved, bits), mask=inside)
    tl.store(mean + place, _rounded(first, bits >> 16), mask=inside)
    tl.store(square + place, _rounded(second, bits >> 32), mask=inside)


@triton.jit
def _rounded(value, bits):  # type: ignore[no-untyped-def]
    carried = value.to(tl.uint32, bitcast=True) + (bits & 0xFFFF).to(tl.uint32)
    return (carried >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
