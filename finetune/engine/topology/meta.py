"""A model without its weights: what all processes but the first have until the weights are shared
out.
"""

from typing import Any

import torch
from torch import nn


def is_empty(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def move(model: nn.Module, device: torch.device | str) -> None:
    """Put weights and buffers without values on a device, in place of those that are there; what
    was tied stays tied.

    `nn.Module.to_empty` would make two weights of a tied one. On a CPU memory is promised here, and
    the system gives it when it is written.
    """
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in known:
                    values = torch.empty_like(parameter, device=device)
                    known[id(parameter)] = nn.Parameter(
                        values, requires_grad=parameter.requires_grad
                    )
                module._parameters[name] = known[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: buffer.detach().cpu() for name, buffer in model.named_buffers(remove_duplicate=False)
    }


def put_buffers(model: nn.Module, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
    """Buffers in the dtype they were made in: rotary frequencies in 16 bits would be other
    frequencies.
    """
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device, copy=True)


def outline(model: nn.Module) -> list[Any]:
    """What all processes must agree on before weights are sent."""
    return [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters()
    ]
