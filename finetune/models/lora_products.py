"""The products of a layer with LoRA on a GPU, with fewer passes over its inputs and outputs.

peft computes W x, B A x, (B A x) s and the sum one after the other: six passes over the output
besides the first, and two to scale its gradient. Here the product by B adds to W x as it writes, s
scales what has r columns, and the gradient of the input is one sum as well: two passes each. An
uncompiled step of 8,192 tokens in 8 layers of an 8B Llama moves 66 GB less, 16 of 348 ms at 4.2
TB/s. Compiled layers keep peft's: the compiler fuses most of it (benchmarks/LOG.md).
"""

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from finetune import kernels
from finetune.models.cross_entropy import arithmetic


def install(model: nn.Module) -> None:
    """Give the LoRA layers of a peft model this forward; what it cannot do stays peft's."""
    for layer in model.modules() if not kernels.is_left_out("lora_products") else ():
        if hasattr(layer, "lora_A") and isinstance(layer.get_base_layer(), nn.Linear):
            layer.forward = types.MethodType(_forward, layer)


# A method, not an object for each layer: the compiler would compile each layer anew, and give up
# after eight.
def _forward(layer: Any, states: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    peft = type(layer).forward
    if arguments or keywords or torch.compiler.is_compiling() or not on_gpu(states):
        return peft(layer, states, *arguments, **keywords)
    dtype = arithmetic(states)
    if not fits(layer, dtype):
        return peft(layer, states)
    name = layer.active_adapters[0]
    base, down, up = layer.base_layer, layer.lora_A[name], layer.lora_B[name]
    out = _Products.apply(
        states.to(dtype).flatten(0, -2), base.weight, base.bias, down.weight.to(dtype),
        up.weight.to(dtype), layer.scaling[name],
    )  # fmt: skip
    return out.unflatten(0, states.shape[:-1])


def on_gpu(states: torch.Tensor) -> bool:
    return states.is_cuda


def fits(layer: Any, dtype: torch.dtype) -> bool:
    """Return whether a layer is one frozen matrix, in this dtype, and one plain adapter in use."""
    active, base = layer.active_adapters, layer.base_layer
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return False
    name = active[0]
    down, up = layer.lora_A[name], layer.lora_B[name]
    drops = layer.training and not isinstance(layer.lora_dropout[name], nn.Identity)
    trains = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return (
        type(base) is nn.Linear  # not one that is quantised, nor one that computes in 8 bits
        and base.weight.dtype == dtype
        and name not in layer.lora_variant  # DoRA
        and up.bias is None
        and not drops
        and not trains
        and not any(_is_watched(module) for module in (base, down, up))
    )


def _is_watched(module: nn.Module) -> bool:
    """Return whether something acts when this module is called, as ZeRO-3 gathers its weights."""
    return bool(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module))


class _Products(torch.autograd.Function):
    """states [N, in], weight [out, in], bias [out], down [r, in], up [out, r] -> [N, out]"""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        down: torch.Tensor, up: torch.Tensor, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        low = F.linear(states, down)
        out = F.linear(states, weight, bias).addmm_(low, up.T, alpha=scale)
        ctx.save_for_backward(states, weight, down, up, low)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        states, weight, down, up, low = ctx.saved_tensors
        of_low = _scaled_product(grad, up, ctx.scale)
        of_up = _scaled_product(grad.T, low, ctx.scale)
        of_states = None
        if ctx.needs_input_grad[0]:
            of_states = (grad @ weight).addmm_(of_low, down)
        return of_states, None, None, of_low.T @ states, of_up, None


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """Return (left @ right) x scale, rounded once."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
