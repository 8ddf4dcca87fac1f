"""Stand-ins for Liger's kernels in a forecast: they hold the same memory, and compute nothing."""

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from finetune import kernels
from finetune.models import liger
from finetune.models.attention_choice import has_package

PROGRAMS = 132  # of a norm's backward pass: a GPU's multiprocessors; an H100 has 132


class _Norm(torch.autograd.Function):
    """Keeps its input and a number for each row; PyTorch's operations keep float32 copies."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        of_rows = states.new_empty(states.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(states, weight, of_rows)
        return torch.empty_like(states)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        states, weight, _ = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            parts = states.new_empty((PROGRAMS, len(weight)), dtype=torch.float32)
            of_weight = parts.sum(0).to(weight.dtype)
        return torch.empty_like(states), of_weight


class _Gate(torch.autograd.Function):
    """Keeps its inputs, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return gate, up


class _GateOfOne(torch.autograd.Function):
    """Keeps gate and up, which lie side by side, until their gradient is there."""

    @staticmethod
    def forward(ctx: Any, both: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(both)
        return both.new_empty((*both.shape[:-1], both.shape[-1] // 2))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.empty_like(ctx.saved_tensors[0])


class LeanNorm(liger.Norm):
    def fused(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Norm.apply(states, weight)
        return out


class LeanGate(liger.Gate):
    def fused(self, *given: torch.Tensor) -> torch.Tensor:
        function: Any = _Gate if len(given) == 2 else _GateOfOne
        out: torch.Tensor = function.apply(*given)
        return out


def install(model: nn.Module, is_compiled: bool = False) -> None:
    """Let stand-ins take the place of the norms and gates that Liger's kernels do on a GPU.

    A GPU's run compares the kernels with PyTorch first; here they count as right. Compiled layers
    keep as little: of an 8B Llama's layer 139 KB a token by the compiler's cut, 140 KB so.
    """
    if not (is_compiled or has_package("liger-kernel")):
        return
    for module, part in liger.parts(model):
        if is_compiled or not kernels.is_left_out(part.name):
            lean = LeanNorm if isinstance(part, liger.Norm) else LeanGate
            values = {field.name: getattr(part, field.name) for field in fields(part)}
            liger.stand_for(module, lean(**values))
