"""Attention on a CPU, one document of a pack after the other: an operator of PyTorch with its
gradient.

As an operator, so that compilers see one call with known shapes where there is a loop over
documents, and so that what each document gives goes to its place at once, forward and backward.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

SHORT = 256  # tokens; scores of 12 heads in float32 are 3 MB


def each(
    lengths: Sequence[int], window: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Where each document lies, and the mask of its sliding window if that is shorter than the
    document.
    """
    start = 0
    for length in lengths:
        yield (
            slice(start, start + length),
            _band(length, window, device) if 0 < window < length else None,
        )
        start += length


def lengths_of(bounds: torch.Tensor) -> list[int]:
    """Lengths of the documents, from bounds on the CPU."""
    lengths: list[int] = bounds.diff().tolist()
    return lengths


@torch.library.custom_op("finetune::one_by_one", mutates_args=())
def one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """([1, T, H, D], log-sum-exp of the scores float32 [1, H, T]): PyTorch's flash attention for
    CPUs, a document at a time.
    """
    out, sums = _shapes(query, key, value, bounds, scale, window)
    for part, band in each(lengths_of(bounds), window, query.device):
        states = query[:, :, part], key[:, :, part], value[:, :, part]
        own, own_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *states, 0.0, band is None, attn_mask=_added(band, query.dtype), scale=scale
        )
        out[:, part], sums[:, :, part] = own.transpose(1, 2), own_sums
    return out, sums


@one_by_one.register_fake
def _shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, width = query.shape
    return query.new_empty(batch, length, heads, width), query.new_empty(
        batch, heads, length, dtype=torch.float32
    )


@torch.library.custom_op("finetune::one_by_one_backward", mutates_args=())
def _backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, sums: torch.Tensor,
    bounds: torch.Tensor, scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    grads = tuple(torch.empty_like(states) for states in (query, key, value))
    for part, band in each(lengths_of(bounds), window, query.device):
        states = (
            grad[:, part].transpose(1, 2),
            query[:, :, part],
            key[:, :, part],
            value[:, :, part],
        )
        if query.dtype == torch.bfloat16 and part.stop - part.start <= SHORT:
            own = _short_backward(*states, sums[:, :, part], band, scale)
        else:
            own = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *states, out[:, part].transpose(1, 2), sums[:, :, part], 0.0, band is None, attn_mask=_added(band, query.dtype), scale=scale
            )  # fmt: skip
        for whole, piece in zip(grads, own):
            whole[:, :, part] = piece
    return grads


def _short_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sums: torch.Tensor,
    band: torch.Tensor | None, scale: float,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The same by plain products over all heads: faster in bf16, while the scores of a document fit
    a CPU's cache.

    Heads of queries that share keys are laid end to end. Softmax again from its sums, by powers of
    two, which PyTorch makes in a third of the time of exp. Its gradient is P * (dP - rowsum(dP *
    P)), with that very sum and not rowsum(dO * O) of a rounded O: what both share must cancel.
    """
    _, heads, length, _ = query.shape
    shared = key.shape[1]
    grad, query = (states[0].reshape(shared, -1, states.shape[-1]) for states in (grad, query))
    key, value, sums = key[0], value[0], sums.reshape(shared, -1, 1)
    scores = torch.baddbmm(
        sums,
        query.float(),
        key.float().transpose(1, 2),
        beta=-math.log2(math.e),
        alpha=scale * math.log2(math.e),
    )
    chances = scores.exp2_().view(heads, length, length)
    chances = (chances.tril_() if band is None else chances.masked_fill_(~band, 0.0)).view_as(
        scores
    )
    d_value = torch.bmm(chances.to(grad.dtype).transpose(1, 2), grad)
    d_chances = torch.bmm(grad.float(), value.float().transpose(1, 2))
    torch.ops.aten._softmax_backward_data.out(
        d_chances, chances, -1, torch.float32, grad_input=d_chances
    )
    d_scores = d_chances.mul_(scale).to(grad.dtype)
    d_query, d_key = torch.bmm(d_scores, key), torch.bmm(d_scores.transpose(1, 2), query)
    return d_query.view(1, heads, length, -1), d_key[None], d_value[None]


@_backward.register_fake
def _(grad: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(states) for states in (query, key, value))


def _remember(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, bounds, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)


def _go_back(ctx: Any, grad: torch.Tensor, _: Any) -> Any:
    return (*_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.window), None, None, None)


one_by_one.register_autograd(_go_back, setup_context=_remember)


def _band(length: int, window: int, device: torch.device) -> torch.Tensor:
    """Causal mask of a sliding window, bool [length, length]: each token sees itself and window - 1
    before it.
    """
    distance = (
        torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    )
    return (distance >= 0) & (distance < window)


def _added(band: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as what is added to the scores."""
    return (
        None
        if band is None
        else torch.zeros(band.shape, dtype=dtype).masked_fill_(~band, float("-inf"))
    )
