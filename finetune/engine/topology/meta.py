"""Models without weights: all processes but the first have one until the weights are sharded."""

from typing import Any

import torch
from torch import nn


def is_empty(model: nn.Module) -> bool:
    return any(p.is_meta for p in model.parameters())


def move(model: nn.Module, device: torch.device | str) -> None:
    """Replace weights and buffers by uninitialised ones on a device; keep tied weights tied.

    `nn.Module.to_empty` would make two weights of a tied one. On a CPU the system provides the
    memory only when it is written.
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
    buffers = model.named_buffers(remove_duplicate=False)
    return {name: buffer.detach().cpu() for name, buffer in buffers}


def put_buffers(model: nn.Module, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
    """Set buffers in their original dtype: 16 bits would change rotary frequencies."""
    for name, buffer in buffers.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = buffer.to(device, copy=True)


def send(model: nn.Module, on_main: Any, device: torch.device) -> None:
    """Move a model to a device, with weights and buffers of the main process. Collective.

    Tied weights stay tied. `on_main`: as in sharing.py.
    """
    buffers = on_main(lambda: buffers_of(model))
    if is_empty(model):
        move(model, device)
    else:
        model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.distributed.broadcast(parameter.data.view(-1).view(torch.uint8), src=0)
    put_buffers(model, buffers, device)


def outline(model: nn.Module) -> list[Any]:
    """Return what all processes must agree on before weights are sent."""
    return [
        (name, tuple(p.shape), str(p.dtype), p.requires_grad)
        for name, p in model.named_parameters()
    ]
