"""The base under an adapter: what it was, so that the adapter is never put on another one."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune.errors import ModelError

FILE = "base_weights.json"  # beside an adapter
COMPARED = torch.bfloat16  # what values are rounded to before they are hashed: a base may be loaded in another dtype


def record(
    base: nn.Module, dtype: torch.dtype, quantization: dict[str, Any] | None, *, loftq: bool, new_tokens: Sequence[str],
    new_token_ids: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """What is needed to know this base again; without weights for a model on the meta device."""
    return {
        "dtype": str(dtype).removeprefix("torch."), "quantization": quantization, "loftq": loftq,
        "new_tokens": list(new_tokens), "new_token_ids": list(new_token_ids), "weights": hashes(base),
    }  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """What an adapter knows of its base; empty for adapters from elsewhere."""
    path = folder / FILE
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def require_same(now: dict[str, Any], known: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if an adapter was trained on another base, or on this one in another form. `now`: its `record`."""
    if now["new_tokens"] != known["new_tokens"]:
        raise ModelError(
            f"model.new_tokens: {now['new_tokens']}, but the adapter {folder} was trained with {known['new_tokens']}; "
            "set them alike"
        )
    forms = [describe(each["quantization"]) for each in (now, known)]
    if forms[0] != forms[1]:
        raise ModelError(
            f"adapter.kind: the base would be {forms[0]}, but the adapter {folder} was trained on one that was {forms[1]}; "
            "set adapter.kind and adapter.quantization to that"
        )
    if now["weights"]:
        require_weights(now["weights"], known, folder)


def require_weights(found: dict[str, str], known: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if weights (their `hashes`) are not those of a record."""
    others = [name for name, wanted in known["weights"].items() if found.get(name) != wanted]
    if others:
        raise ModelError(
            f"{folder}: its base has changed since the adapter was trained beside it: {len(others)} of "
            f"{len(known['weights'])} weights are others, such as {others[0]}; put the old base back, or train again"
        )


def describe(quantization: dict[str, Any] | None) -> str:
    """How weights are stored, in words; what they are unpacked to for a product is no part of it."""
    if quantization is None:
        return "not quantised"
    if quantization.get("load_in_8bit"):
        return "int8"
    doubly = ", doubly quantised" if quantization["bnb_4bit_use_double_quant"] else ""
    return f"{quantization['bnb_4bit_quant_type']}{doubly}"


def hashes(model: nn.Module, only_frozen: bool = False) -> dict[str, str]:
    """Name -> hash of the shape and up to 64 values of each weight, rounded to bfloat16."""
    found = {}
    for name, weight in model.named_parameters():
        if not weight.is_meta and not (only_frozen and weight.requires_grad):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(COMPARED).float().cpu().numpy()
            found[name] = hashlib.sha256(f"{tuple(weight.shape)} ".encode() + sample.tobytes()).hexdigest()[:16]
    return found


def fingerprint(model: nn.Module, only_frozen: bool = False) -> str:
    """One hash for all weights, or for those that do not train."""
    return hashlib.sha256(repr(hashes(model, only_frozen)).encode()).hexdigest()[:32]
