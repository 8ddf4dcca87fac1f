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
    all, for any number of tokens: a start takes as long for 8 layers as for 80. Only in training: checks,
    evaluations and samples would each ask for compilations of their own, until the compiler gives up.
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
        trained: Any = torch.compile(layer.forward, dynamic=True) if compiled else layer.forward
        if recomputed:  # only the inputs are kept (Chen et al., 2016)
            trained = functools.partial(checkpoint, trained, use_reentrant=False)
        layer.forward = _in_training(layer, trained)


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)


def _in_training(layer: nn.Module, trained: Callable[..., Any]) -> Callable[..., Any]:
    """`trained` where there will be a backward pass, the layer's own forward where there is none."""
    plain: Any = layer.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        chosen = trained if layer.training and torch.is_grad_enabled() else plain
        return chosen(*arguments, **keywords)

    return forward
