"""Count the weights of a model, and the bytes that they and the optimizer take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.config import Config, QLora, Quantized
from finetune.config.choices import OPTIMIZERS, QUANTIZATIONS
from finetune.engine import optim
from finetune.models import recompute

SMALL = 4096  # 8-bit optimizers keep 32 bits for smaller weights, and for embeddings


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, and their bytes."""

    num: int
    num_trained: int
    stored: float
    """Bytes as stored, which may be quantised."""
    used: float
    """Bytes in the dtype of the arithmetic, or quantised."""
    trained: float
    """Bytes of those that train, and of their gradients."""
    optimizer: float
    """Bytes of its state."""
    layer: float
    """Bytes of the largest layer, in the dtype of the arithmetic or quantised."""
    layer_trained: int
    outside: float
    """Bytes outside of layers, in the dtype of the arithmetic: embedding, last norm, head."""
    outside_stored: float
    outside_trained: float
    unpacked: float
    """Bytes of the largest quantised weight, dequantised."""


def count(model: nn.Module, config: Config, width: int) -> Weights:
    """Count the weights of a model without memory. `width`: bytes of a number of the arithmetic."""
    quantized = set(_quantized(model, config))
    adapter, packed = config.adapter, 0.0
    if isinstance(adapter, QLora | Quantized):
        form = QUANTIZATIONS[adapter.quantization]
        scale_bits = form.double_scale_bits if adapter.double_quantization else form.scale_bits
        packed = (form.bits + scale_bits) / 8
    named = dict(model.named_parameters())
    stored = {
        name: p.numel() * (packed if name in quantized else p.element_size())
        for name, p in named.items()
    }
    used = {
        name: stored[name] if name in quantized else width * p.numel() for name, p in named.items()
    }
    trains = {name for name, p in named.items() if p.requires_grad}
    names = recompute.classes(model)
    layers = [pair for pair in model.named_modules() if type(pair[1]).__name__ in names]
    inside = [{f"{path}.{name}" for name, _ in layer.named_parameters()} for path, layer in layers]
    outside = set(named) - set().union(*inside)

    def total(which: Any, sizes: Mapping[str, float] | None = None) -> Any:
        return sum(sizes[name] if sizes else named[name].numel() for name in which)

    largest = max(inside, key=total, default=set())
    return Weights(
        num=total(named),
        num_trained=total(trains),
        stored=total(named, stored),
        used=total(named, used),
        trained=total(trains, stored),
        optimizer=sum(_states(model, config)),
        layer=total(largest, used),
        layer_trained=total(largest & trains),
        outside=total(outside, used),
        outside_stored=total(outside, stored),
        outside_trained=total(outside & trains, stored),
        unpacked=max((float(width * named[name].numel()) for name in quantized), default=0.0),
    )


def _quantized(model: nn.Module, config: Config) -> Iterator[str]:
    """Yield the names of the matrices that are quantised: frozen linear ones except the head."""
    if not isinstance(config.adapter, QLora | Quantized):
        return
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    of_head = set(head.modules()) if head is not None else set()  # also in the wrapper of peft
    for path, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear) and module not in of_head
        if is_linear and not module.weight.requires_grad:
            yield f"{path}.weight"


def _states(model: nn.Module, config: Config) -> Iterator[float]:
    """Yield the bytes of the optimizer's state of each weight that trains."""
    kind = OPTIMIZERS[config.optimizer.kind]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = optim.parameter_groups(model, config.optimizer)
    for p, hidden in ((p, group["hidden"]) for group in groups for p in group["params"]):
        if kind.moments is None:
            values = p.numel()
            if p.ndim >= 2:  # row and column sums
                values = p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
            yield values * p.element_size()
            continue
        moments = kind.hidden_moments or kind.moments if hidden else kind.moments
        size = p.element_size() if kind.bits is None else kind.bits // 8
        if kind.bits == 8:  # with a float32 scale for 256
            size = 1 + 4 / 256 if p.numel() >= SMALL and id(p) not in looked_up else 4
        yield moments * p.numel() * size
