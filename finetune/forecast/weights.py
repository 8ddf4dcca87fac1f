"""How many weights a model has, how many train, and the bytes that they and the optimizer take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.config import Config
from finetune.config.choices import OPTIMIZERS, QUANTIZATIONS
from finetune.engine import optim
from finetune.models import recompute

SMALL = 4096  # weights of fewer values keep 32 bits, and so do embeddings


@dataclass(frozen=True)
class Weights:
    """Numbers of weights, and bytes where they say so."""

    num: int
    num_trained: int
    stored: float
    """Bytes, quantised ones as such."""
    used: float
    """Bytes in the dtype of the arithmetic, or quantised."""
    trained: float
    """Bytes of those that train; their gradients have as many."""
    optimizer: float
    """Bytes of its state."""
    layer: float
    """Bytes of the largest layer, in the dtype of the arithmetic or quantised."""
    layer_trained: int
    ends: float
    """Bytes outside of layers, in the dtype of the arithmetic: embedding, last norm, head."""
    ends_stored: float
    ends_trained: float
    unpacked: float
    """Bytes of the largest quantised weight, as it is multiplied."""


def count(model: nn.Module, config: Config, width: int) -> Weights:
    """Of the model as it will be, from one that has shapes only. `width`: bytes of a number of the
    arithmetic.
    """
    quantized = set(_quantized(model, config))
    adapter, packed = config.adapter, 0.0
    if adapter.kind == "qlora":
        form = QUANTIZATIONS[adapter.quantization]
        packed = (
            form.bits + (form.double_scale_bits if adapter.double_quantization else form.scale_bits)
        ) / 8
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
    inside = [
        {f"{path}.{name}" for name, _ in module.named_parameters()}
        for path, module in model.named_modules() if type(module).__name__ in names
    ]  # fmt: skip
    ends = set(named) - set().union(*inside)

    def total(which: Any, sizes: Mapping[str, float] | None = None) -> Any:
        return sum(sizes[name] if sizes else named[name].numel() for name in which)

    largest = max(inside, key=total, default=set())
    return Weights(
        num=total(named), num_trained=total(trains), stored=total(named, stored), used=total(named, used), trained=total(trains, stored),
        optimizer=sum(_states(model, config)),
        layer=total(largest, used), layer_trained=total(largest & trains),
        ends=total(ends, used), ends_stored=total(ends, stored), ends_trained=total(ends & trains, stored),
        unpacked=max((float(width * named[name].numel()) for name in quantized), default=0.0),
    )  # fmt: skip


def _quantized(model: nn.Module, config: Config) -> Iterator[str]:
    """Names of frozen matrices that transformers lets bitsandbytes store: all linear ones but the
    head.
    """
    if config.adapter.kind == "qlora":
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        for path, module in model.named_modules():
            if (
                isinstance(module, nn.Linear)
                and module is not head
                and not module.weight.requires_grad
            ):
                yield f"{path}.weight"


def _states(model: nn.Module, config: Config) -> Iterator[float]:
    """Bytes of the optimizer's state of each weight that trains."""
    kind = OPTIMIZERS[config.optimizer.kind]
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = optim.parameter_groups(model, config.optimizer)
    for p, hidden in ((p, group["hidden"]) for group in groups for p in group["params"]):
        if kind.moments is None:
            values = (
                p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
            )
            yield values * p.element_size()
            continue
        moments = kind.hidden_moments or kind.moments if hidden else kind.moments
        size = p.element_size() if kind.bits is None else kind.bits // 8
        if kind.bits == 8:  # with a float32 scale for 256
            size = 1 + 4 / 256 if p.numel() >= SMALL and id(p) not in looked_up else 4
        yield moments * p.numel() * size
