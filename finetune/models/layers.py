"""The layers of a model: what is sharded, compiled and recomputed as one."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import ModelError


def classes(model: nn.Module) -> set[str]:
    """Names of classes that transformers says must not be split."""
    return {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}


def wrap(model: nn.Module, *, compiled: bool, recomputed: bool) -> None:
    """Give each layer a forward that is compiled, or done again in the backward pass, or both. Raises ModelError.

    What hangs on a layer (sharding, hooks) stays outside. Layers are alike, so one compilation serves
    all, for any number of tokens: a start takes as long for 8 layers as for 80.
    """
    names = classes(model)
    layers = list(_outermost(model, names))
    if not layers:
        raise ModelError(
            f"train.gradient_checkpointing, train.compile: transformers does not say what the layers of {type(model).__name__} are; leave them out"
        )
    if compiled:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ModelError(
                f"train.compile: needs a C++ compiler, and there is no {compiler} here; install one (CXX names another), or set it to false"
            )
        torch._dynamo.config.specialize_float = True  # scales and epsilons are constants; else all is compiled twice
    for layer in layers:
        forward: Any = layer.forward
        if compiled:
            forward = torch.compile(forward, dynamic=True)
        layer.forward = _again(layer, forward) if recomputed else forward


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _again(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Only the inputs are kept (Chen et al., 2016)."""

    @functools.wraps(forward)
    def recomputing(*arguments: Any, **keywords: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return forward(*arguments, **keywords)
        return checkpoint(forward, *arguments, use_reentrant=False, **keywords)

    return recomputing
