"""Find the layers of a model, and compile or recompute them."""

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.errors import ModelError
from finetune.models.offload import Offload


def classes(model: nn.Module) -> set[str]:
    """Return the names of the classes that transformers says must not be split.

    But not those around the embedding, as BERT's, whose weights the head may share.
    """
    lists = [getattr(module, "_no_split_modules", None) or () for module in model.modules()]
    names = set().union(*lists)
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    for module in model.modules():
        if type(module).__name__ in names and any(each is embedding for each in module.modules()):
            names.discard(type(module).__name__)
    return names


def chosen(model: nn.Module, wanted: bool | int | str) -> int:
    """Return the number of layers to recompute. Raises ModelError if the model has fewer.

    A run on a GPU has replaced auto by a number; elsewhere auto means none.
    """
    if wanted in (False, "auto"):
        return 0
    count = len(layers(model))
    if wanted is not True and int(wanted) > count:
        raise ModelError(
            f"train.gradient_checkpointing: {wanted}, but {type(model).__name__} has {count} "
            "layers; true recomputes all of them"
        )
    return count if wanted is True else int(wanted)


def count_layers(model: nn.Module) -> int:
    """Return how many layers can be recomputed; 0 if transformers does not say what they are."""
    return len(list(_outermost(model, classes(model))))


def wrap(
    model: nn.Module, *, compiled: bool, num_recomputed: int, offloads: bool = False
) -> Offload | None:
    """Compile the forward of each layer and recompute the first N in backward. Raises ModelError.

    `offloads`: keep the inputs of recomputed layers in host memory; then return what moves them.
    Sharding and hooks of a layer stay outside. Layers are alike, so one compilation serves all, for
    any number of tokens: compiling takes as long for 8 layers as for 80. Checks, evaluations and
    samples run uncompiled: each would need its own compilations, until the compiler gives up.
    """
    if compiled:
        if not has_compiler():
            raise ModelError(
                f"train.compile: needs a C++ compiler, and {_compiler()} was not found; install "
                "one, or name another in CXX, or set it to false"
            )
        # Treat scales and epsilons as constants; otherwise everything is compiled twice.
        torch._dynamo.config.specialize_float = True
    offload = Offload() if offloads and num_recomputed else None
    for number, layer in enumerate(layers(model)):
        trained: Any = torch.compile(layer.forward, dynamic=True) if compiled else layer.forward
        if number < num_recomputed:  # only the inputs are kept (Chen et al., 2016)
            trained = functools.partial(checkpoint, trained, use_reentrant=False)
            trained = offload.around(trained) if offload else trained
        layer.forward = _in_training(layer, trained)
    return offload


def has_compiler() -> bool:
    """Return whether there is the C++ compiler that torch.compile needs."""
    return shutil.which(_compiler()) is not None


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a model, shared out or not. Raises ModelError if unknown."""
    found = list(_outermost(model, classes(model)))
    if not found:
        raise ModelError(
            "train.gradient_checkpointing, train.compile: transformers does not say what the "
            f"layers of {type(model).__name__} are; leave both settings out"
        )
    return found


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        # `fully_shard` puts a class of its own before a layer's.
        if not names.isdisjoint(kind.__name__ for kind in type(child).__mro__):
            yield child
        else:
            yield from _outermost(child, names)


def _in_training(layer: nn.Module, trained: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that calls `trained` in training with gradients, else the layer's own."""
    plain: Any = layer.forward

    @functools.wraps(plain)
    def forward(*arguments: Any, **keywords: Any) -> Any:
        chosen = trained if layer.training and torch.is_grad_enabled() else plain
        return chosen(*arguments, **keywords)

    return forward
