"""Attention on a CPU, document by document: a PyTorch operator with its gradient.

Causal, or both ways: then each token also sees those after it.

As an operator, the loop over documents is one call with known shapes for compilers, and each
document's result is written directly to its place, forward and backward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SHORT = 256  # tokens; the scores of 12 heads in float32 take 3 MB


def each(
    lengths: Sequence[int], window: int, device: torch.device, causal: bool = True
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Yield each document's slice and the mask of a sliding window, None if it is not shorter."""
    start = 0
    for length in lengths:
        band = _band(length, window, device, causal) if 0 < window < length else None
        yield slice(start, start + length), band
        start += length


def lengths_of(bounds: torch.Tensor) -> list[int]:
    """Return the lengths of the documents, from bounds on the CPU."""
    lengths: list[int] = bounds.diff().tolist()
    return lengths


@torch.library.custom_op("finetune::one_by_one", mutates_args=())
def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, scale: float,
    window: int, causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Apply PyTorch's flash attention for CPUs to one document at a time.

    Returns (output [1, T, H, D], log-sum-exp of the scores, float32 [1, H, T]).
    """
    out, sums = _shapes(query)
    for part, band in each(lengths_of(bounds), window, query.device, causal):
        states = query[:, :, part], key[:, :, part], value[:, :, part]
        own, own_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *states, 0.0, causal and band is None, attn_mask=_added(band, query.dtype), scale=scale
        )
        out[:, part], sums[:, :, part] = own.transpose(1, 2), own_sums
    return out, sums


@one_by_one.register_fake
def _shapes(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, width = query.shape
    sums = query.new_empty(batch, heads, length, dtype=torch.float32)
    return query.new_empty(batch, length, heads, width), sums


@torch.library.custom_op("finetune::one_by_one_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, scale: float, window: int,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty_like(states) for states in (query, key, value))
    for part, band in each(lengths_of(bounds), window, query.device, causal):
        own_grad, own_out = (states[:, part].transpose(1, 2) for states in (grad, out))
        inputs = query[:, :, part], key[:, :, part], value[:, :, part]
        own_sums = sums[:, :, part]
        if query.dtype == torch.bfloat16 and part.stop - part.start <= SHORT:
            own = _short_backward(own_grad, *inputs, own_sums, band, scale, causal)
        else:
            own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                own_grad, *inputs, own_out, own_sums, 0.0, causal and band is None,
                attn_mask=_added(band, query.dtype), scale=scale,
            )  # fmt: skip
        for whole, piece in zip(grads, own):
            whole[:, :, part] = piece
    return grads


def _short_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    sums: torch.Tensor, band: torch.Tensor | None, scale: float, causal: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """Compute the same gradients by plain products over all heads.

    Faster in bf16, while the scores of a document fit a CPU's cache. Query heads that share keys
    are concatenated. Softmax is recomputed from its sums with powers of two, which take PyTorch a
    third of the time of exp. Its gradient is P * (dP - rowsum(dP * P)), with this sum and not
    rowsum(dO * O) of a rounded O, so that the common parts cancel.
    """
    _, heads, length, _ = query.shape
    shared = key.shape[1]
    grad, query = (states[0].reshape(shared, -1, states.shape[-1]) for states in (grad, query))
    key, value, sums = key[0], value[0], sums.reshape(shared, -1, 1)
    keys, log2_e = key.float().transpose(1, 2), math.log2(math.e)
    scores = torch.baddbmm(sums, query.float(), keys, beta=-log2_e, alpha=scale * log2_e)
    probs = scores.exp2_().view(heads, length, length)
    if band is not None:
        probs = probs.masked_fill_(~band, 0.0)
    elif causal:
        probs = probs.tril_()
    probs = probs.view_as(scores)
    d_value = torch.bmm(probs.to(grad.dtype).transpose(1, 2), grad)
    d_probs = torch.bmm(grad.float(), value.float().transpose(1, 2))
    torch.ops.aten._softmax_backward_data.out(d_probs, probs, -1, torch.float32, grad_input=d_probs)
    d_scores = d_probs.mul_(scale).to(grad.dtype)
    d_query, d_key = torch.bmm(d_scores, key), torch.bmm(d_scores.transpose(1, 2), query)
    return d_query.view(1, heads, length, -1), d_key[None], d_value[None]


@_backward.register_fake
def _(grad: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(states) for states in (query, key, value))


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, bounds, ctx.scale, ctx.window, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _backward_of(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    rest = ctx.scale, ctx.window, ctx.causal
    return (*_backward(grad, *ctx.saved_tensors, *rest), None, None, None, None)


one_by_one.register_autograd(_backward_of, setup_context=_save_for_backward)


def _band(length: int, window: int, device: torch.device, causal: bool) -> torch.Tensor:
    """Return the mask of a sliding window, bool [length, length].

    Each token sees itself and window - 1 tokens before it; unless `causal`, as many after it.
    """
    places = torch.arange(length, device=device)
    distance = places[:, None] - places[None]
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def _added(band: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask to add to the scores: 0 where a token sees another, -infinity elsewhere."""
    if band is None:
        return None
    return torch.zeros(band.shape, dtype=dtype).masked_fill_(~band, float("-inf"))
