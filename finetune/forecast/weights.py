"""How many weights a model has, how many train, and the bytes that they and the optimizer take."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from finetune.config import Config
from finetune.engine import optim
from finetune.models import recompute

# Values of optimizer state for a weight: PyTorch's have its dtype, those of bitsandbytes are of 32 or 8 bits, these with a float32 scale for 256.
MOMENTS = {"adamw": 2, "paged_adamw_32bit": 2, "lion": 1, "adamw_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1}
SMALL = 4096  # weights of fewer values keep 32 bits, and so do embeddings
# Bytes of a frozen weight and its scales: 4 bits and a float32 for 64; the same with that in 8 bits and a float32 for 256; 8 bits.
QUANTIZED = {("4", False): 0.5625, ("4", True): 0.5 + 1 / 64 + 4 / 64 / 256, ("8", False): 1.0, ("8", True): 1.0}


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
    """Of the model as it will be, from one that has shapes only. `width`: bytes of a number of the arithmetic."""
    quantized = set(_quantized(model, config))
    packed = QUANTIZED["8" if config.adapter.quantization == "int8" else "4", config.adapter.double_quantization]
    named = dict(model.named_parameters())
    stored = {name: p.numel() * (packed if name in quantized else p.element_size()) for name, p in named.items()}
    used = {name: stored[name] if name in quantized else width * p.numel() for name, p in named.items()}
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
    """Names of frozen matrices that transformers lets bitsandbytes store: all linear ones but the head."""
    if config.adapter.kind == "qlora":
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad:
                yield f"{path}.weight"


def _states(model: nn.Module, config: Config) -> Iterator[float]:
    """Bytes of the optimizer's state of each weight that trains."""
    kind = config.optimizer.kind
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups = optim.parameter_groups(model, config.optimizer)
    for p, hidden in ((p, group["hidden"]) for group in groups for p in group["params"]):
        if kind == "adafactor":
            values = p.numel() if p.ndim < 2 else p.numel() // p.shape[-1] + p.numel() // p.shape[-2]
            yield values * p.element_size()
        elif kind in ("adamw", "muon"):
            yield (1 if kind == "muon" and hidden else 2) * p.numel() * p.element_size()
        else:
            is_small = kind.endswith("8bit") and p.numel() >= SMALL and id(p) not in looked_up
            yield MOMENTS[kind] * p.numel() * (1 + 4 / 256 if is_small else 4)
