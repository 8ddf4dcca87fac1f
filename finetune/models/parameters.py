"""Count weights, and find those that have changed or hold NaN."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import ExportError


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once, and 4-bit ones, two to a byte, as what
    they stand for.
    """
    packed = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    sizes = [
        (p.requires_grad, p.numel() if state is None else state.shape.numel())
        for p, state in packed
    ]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def in_products(model: nn.Module) -> tuple[int, int]:
    """(trained, frozen) parameters that a token is multiplied with.

    Matrices only: no tables that are looked up, unless tied to the head, no norms, no biases. Of
    experts as many as the router chooses for a token; of a module that trains next to its frozen
    original (peft's modules_to_save) the one.
    """
    weights = [
        (isinstance(m, nn.Embedding), id(w))
        for m in model.modules()
        if (w := getattr(m, "weight", None)) is not None
    ]
    looked_up = {key for is_table, key in weights if is_table} - {
        key for is_table, key in weights if not is_table
    }
    share, trained, frozen = _share_of_experts(model), 0.0, 0.0
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in looked_up or ".original_module." in name:
            continue
        state = getattr(p, "quant_state", None)
        number = (p.numel() if state is None else state.shape.numel()) * (
            share if ".experts." in name else 1.0
        )
        trained, frozen = (
            (trained + number, frozen) if p.requires_grad else (trained, frozen + number)
        )
    return round(trained), round(frozen)


def _share_of_experts(model: nn.Module) -> float:
    """Experts that a token meets, of all; 1 without experts."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    numbers = (
        getattr(text, name, None)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
    )
    chosen, every = (
        getattr(text, "num_experts_per_tok", None),
        next((n for n in numbers if n), None),
    )
    return chosen / every if chosen and every else 1.0


def attention_per_token(config: Any, lengths: Sequence[int]) -> float:
    """Multiplications of attention's scores for a token, on average over documents of these
    lengths: over all layers, heads x head size x tokens that it sees. A token sees half of its
    document (causal), in a window at most the window.
    """
    text = config.get_text_config()
    heads, number = (
        getattr(text, "num_attention_heads", None) or 0,
        getattr(text, "num_hidden_layers", None) or 0,
    )
    size = getattr(text, "head_dim", None) or (
        getattr(text, "hidden_size", 0) // heads if heads else 0
    )
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    kinds = (
        getattr(text, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"] * number
    )
    tokens, total = max(sum(lengths), 1), 0.0
    for kind in set(kinds) & {"full_attention", "sliding_attention"}:
        most = window if kind == "sliding_attention" else None
        seen = sum(
            n * n / 2 if not most or n <= most else most * n - most * most / 2 for n in lengths
        )
        total += kinds.count(kind) * heads * size * seen / tokens
    return total


def flops_per_token(trained: float, frozen: float, attention: float) -> float:
    """Of training, as the field counts them (Chowdhery et al., 2022, appendix B; torchtitan).

    For each parameter in a product 2 forward and 2 backward for its input, and 2 for itself where
    it trains; attention has two products a score, forward once and backward twice: 12. What is
    recomputed is not counted.
    """
    return 6.0 * trained + 4.0 * frozen + 12.0 * attention


def fingerprints(
    model: nn.Module, local_shard: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float | str]:
    """Name -> what tells whether a weight has moved: the float64 sum of its values, or a hash of
    quantised ones with their scales.

    `own_part`: what this process holds of a weight.
    """
    scales = {
        id(m.weight): _scales(m)
        for m in model.modules()
        if type(m).__name__ in ("Linear4bit", "Linear8bitLt")
    }
    return {
        name: float(local_shard(p).sum(dtype=torch.float64))
        if id(p) not in scales
        else _hash(local_shard(p), *scales[id(p)])
        for name, p in model.named_parameters()
    }


def _scales(layer: Any) -> list[torch.Tensor | None]:
    """What the bytes of a layer of bitsandbytes are multiplied with. 4-bit layers keep it also
    where their weight is a part only.
    """
    state = getattr(layer, "quant_state", None) or getattr(layer.weight, "quant_state", None)
    if state is None:  # 8 bits: one scale for each row
        return [getattr(layer.weight, "SCB", None)]
    return [state.absmax, state.state2.absmax if state.nested else None]


def _hash(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(
                tensor.detach()
                .cpu()
                .contiguous()
                .view(torch.uint8)
                .as_subclass(torch.Tensor)
                .numpy()
                .tobytes()
            )
    return digest.hexdigest()


def unchanged(model: nn.Module, moved: set[str]) -> tuple[list[str], int]:
    """(names of weights that train and are what they were, number of weights that train).

    Raises ExportError if a frozen weight is among those that `moved`.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if frozen := moved.difference(trained):
        raise ExportError(f"{len(frozen)} frozen weights have moved, such as {min(frozen)}")
    return [name for name in trained if name not in moved], len(trained)


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights that hold NaN or infinity."""
    return [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not math.isfinite(float(p.detach().sum(dtype=torch.float64)))
    ]
