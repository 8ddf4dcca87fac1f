"""Split a long sequence over several processes: by tokens, and within attention by heads.

Before attention, an all-to-all gives each process all tokens of its own heads; after attention,
another one gives it all heads of its own tokens (DeepSpeed-Ulysses, Jacobs et al., 2023). Attention
sees whole sequences, so packs, windows and kernels work unchanged, and each head's result is the
same to the last bit.
"""

from typing import Any

import torch
import torch.distributed


def exchange(states: torch.Tensor, group: Any, cut: int, join: int) -> torch.Tensor:
    """Split `states` along `cut` over the P processes of `group`; join what they send along `join`.

    [1, H, T / P, D] (own tokens, all heads) -> [1, H / P, T, D] (all tokens, own heads) with cut 1
    and join 2; back with 2 and 1. Differentiable.
    """
    exchanged: torch.Tensor = _Exchange.apply(states, group, cut, join)
    return exchanged


def sum_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Return `values` summed over the processes of `group`; backward sums the gradients alike."""
    summed: torch.Tensor = _SumOver.apply(values, group)
    return summed


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        summed = values.clone()
        torch.distributed.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = gradients[0].clone()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, group: Any, cut: int, join: int) -> torch.Tensor:
        ctx.way_back = (group, join, cut)
        return _exchange(states, group, cut, join)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return _exchange(gradients[0], *ctx.way_back), None, None, None


def _exchange(states: torch.Tensor, group: Any, cut: int, join: int) -> torch.Tensor:
    sent = torch.stack(states.chunk(torch.distributed.get_world_size(group), dim=cut))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=join)
