"""Long sequences: several processes share one. Each has a stretch of its tokens, and for attention
a part of the heads.

Before attention every process gives its tokens' queries, keys and values of the other processes'
heads away, and gets those of its own heads for all tokens; after it the way back
(DeepSpeed-Ulysses, Jacobs et al., 2023). Attention itself sees whole sequences, so packs, windows
and kernels stay what they are, to the last bit of each head.
"""

from typing import Any

import torch
import torch.distributed


def exchange(states: torch.Tensor, group: Any, cut: int, join: int) -> torch.Tensor:
    """Own tokens of all heads [1, H, T / P, D] -> all tokens of own heads [1, H / P, T, D], with
    cut 1 and join 2; or back.

    Pieces of dimension `cut` go to the P processes of `group`, and what comes from them is joined
    along `join`. Differentiable: gradients travel back the same way.
    """
    exchanged: torch.Tensor = _Exchange.apply(states, group, cut, join)
    return exchanged


def sum_over(values: torch.Tensor, group: Any) -> torch.Tensor:
    """Values summed over the processes of `group`, on each of them. Differentiable: so are their
    gradients.
    """
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
