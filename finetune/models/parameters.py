"""Count weights, and find those that have changed or hold NaN."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from finetune.errors import ExportError

SLICE = 1 << 24  # numbers that are in float64 at once: 134 MB


def count(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of (trainable, all) parameters; tied count once, 4-bit unpacked."""
    packed = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    sizes = [
        (p.requires_grad, p.numel() if state is None else state.shape.numel())
        for p, state in packed
    ]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def in_products(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of (trained, frozen) parameters that a token is multiplied with.

    Counts matrices: no embeddings, unless tied to the head, no norms, no biases. Counts as many
    experts as the router chooses for a token, and of a module that trains next to its frozen
    original (peft's modules_to_save) only the one that trains.
    """
    modules = [m for m in model.modules() if getattr(m, "weight", None) is not None]
    multiplied = {id(m.weight) for m in modules if not isinstance(m, nn.Embedding)}
    looked_up = {id(m.weight) for m in modules if isinstance(m, nn.Embedding)} - multiplied
    share, trained, frozen = _share_of_experts(model), 0.0, 0.0
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in looked_up or ".original_module." in name:
            continue
        state = getattr(p, "quant_state", None)
        number = float(p.numel() if state is None else state.shape.numel())
        if ".experts." in name:
            number *= share
        if p.requires_grad:
            trained += number
        else:
            frozen += number
    return round(trained), round(frozen)


def _share_of_experts(model: nn.Module) -> float:
    """Return the share of the experts that one token passes through; 1 without experts."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    every = next((number for name in names if (number := getattr(text, name, None))), None)
    chosen = getattr(text, "num_experts_per_tok", None)
    return chosen / every if chosen and every else 1.0


def attention_per_token(config: Any, lengths: Sequence[int]) -> float:
    """Return the multiplications of attention's scores for a token, averaged over documents.

    Summed over all layers: heads x head size x tokens that it sees. A token sees half of its
    document on average (causal), within a sliding window. `lengths`: tokens of each document.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    number = getattr(text, "num_hidden_layers", None) or 0
    size = getattr(text, "head_dim", None) or 0
    if not size and heads:
        size = getattr(text, "hidden_size", 0) // heads
    window = getattr(text, "sliding_window", None)
    if getattr(text, "use_sliding_window", True) is False:
        window = None
    usual = "sliding_attention" if window else "full_attention"
    kinds = getattr(text, "layer_types", None) or [usual] * number
    tokens, total = max(sum(lengths), 1), 0.0
    for kind in set(kinds) & {"full_attention", "sliding_attention"}:
        most = window if kind == "sliding_attention" else None
        seen = sum(
            n * n / 2 if not most or n <= most else most * n - most * most / 2 for n in lengths
        )
        total += kinds.count(kind) * heads * size * seen / tokens
    return total


def flops_per_token(trained: float, frozen: float, attention: float) -> float:
    """Return the FLOPs of training for a token (Chowdhery et al., 2022, appendix B; torchtitan).

    A parameter in a product costs 2 forward, 2 backward for the gradient of its input, and 2 for
    its own gradient if it trains. Attention has two products a score, forward once and backward
    twice: 12. Recomputation does not count.
    """
    return 6.0 * trained + 4.0 * frozen + 12.0 * attention


def fingerprints(
    model: nn.Module, local_shard: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, float | str]:
    """Return name -> a value that changes when the weight does.

    It is the float64 sum of its values; of quantised weights a hash with their scales.
    `local_shard`: returns the shard of a weight in this process.
    """
    quantized = (m for m in model.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt"))
    scales = {id(m.weight): _scales(m) for m in quantized}

    def fingerprint(p: torch.Tensor) -> float | str:
        if id(p) in scales:
            return _hash(local_shard(p), *scales[id(p)])
        return float(_sum(local_shard(p)))

    return {name: fingerprint(p) for name, p in model.named_parameters()}


def _scales(layer: Any) -> list[torch.Tensor | None]:
    """Return the scales of a bitsandbytes layer; 4-bit ones keep them if the weight is sharded."""
    state = getattr(layer, "quant_state", None) or getattr(layer.weight, "quant_state", None)
    if state is None:  # 8 bits: one scale for each row
        return [getattr(layer.weight, "SCB", None)]
    return [state.absmax, state.state2.absmax if state.nested else None]


def _hash(*tensors: torch.Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            raw = tensor.detach().cpu().contiguous().view(torch.uint8)
            digest.update(raw.as_subclass(torch.Tensor).numpy().tobytes())
    return digest.hexdigest()


def unchanged(model: nn.Module, moved: set[str]) -> tuple[list[str], int]:
    """Return (names of weights that train but have not changed, number of weights that train).

    Raises ExportError if a frozen weight is in `moved`, the names of those that have changed.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if frozen := moved.difference(trained):
        raise ExportError(f"{len(frozen)} frozen weights have moved, such as {min(frozen)}")
    return [name for name in trained if name not in moved], len(trained)


def not_finite(model: nn.Module) -> list[str]:
    """Return the names of the weights that hold NaN or infinity."""
    floats = [(name, p.detach()) for name, p in model.named_parameters() if p.is_floating_point()]
    return [name for name, p in floats if not math.isfinite(float(_sum(p)))]


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Return the sum in float64, slice by slice: PyTorch first makes a copy in the dtype of a sum.

    Of an embedding of 128,256 words and 4,096 numbers in bfloat16, 1 GB, the copy takes 4.2 GB.
    """
    parts = values.detach().reshape(-1).split(SLICE)
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum()
