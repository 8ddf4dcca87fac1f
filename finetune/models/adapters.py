"""What trains: all weights, or LoRA adapters. Merging."""

import difflib
import hashlib
import os
import re
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune.config import Adapter, Model
from finetune.errors import ModelError


def apply(model: Any, adapter: Adapter, base: Model) -> Any:
    """The model with what trains unfrozen: itself (full), or a PeftModel around it. Raises ModelError."""
    if adapter.kind == "full":
        return model
    check_targets(model, adapter.target_modules)
    base_head, base_embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # refused below
            adapted = get_peft_model(model, config)
    except (ValueError, re.error) as exc:
        raise ModelError(f"adapter.target_modules: {adapter.target_modules!r}: {exc}") from exc
    ends = {id(module) for module in (base_head, base_embedding)}
    touched = [name for name, m in adapted.named_modules() if hasattr(m, "lora_A") and id(m.get_base_layer()) in ends]
    if touched and model.config.get_text_config().tie_word_embeddings:
        raise ModelError(
            f"adapter.target_modules: {touched[0].removeprefix('base_model.model.')} shares its weights between head and "
            "embedding in this model, so an adapter on it could not be merged; leave it out"
        )
    # peft notes the base as it was given; a relative folder would be looked for on the Hub from anywhere else.
    saved = adapted.peft_config["default"]
    saved.base_model_name_or_path = os.path.abspath(base.path) if base.path and os.path.isdir(base.path) else base.path
    saved.revision = base.revision
    return adapted


def check_targets(model: nn.Module, targets: str | list[str]) -> None:
    """Raise ModelError if a target names no linear layer of the model."""
    if isinstance(targets, str):  # all-linear, or a regular expression that peft matches whole
        return
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    leaves = sorted({name.split(".")[-1] for name in linear})
    for target in targets:
        if not any(name == target or name.endswith("." + target) for name in linear):
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]}?" if near else "use all-linear for all of them"
            raise ModelError(
                f"adapter.target_modules: no linear layer is called {target!r}; there are {', '.join(leaves)}; {hint}"
            )


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; tied ones count once."""
    sizes = [(p.requires_grad, p.numel()) for p in model.parameters()]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def sums(model: nn.Module) -> dict[str, float]:
    """Name -> sum of each weight tensor that trains, in float64: a tensor whose sum stays has not moved."""
    return {name: float(p.detach().sum(dtype=torch.float64)) for name, p in model.named_parameters() if p.requires_grad}


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights that hold NaN or infinity."""
    return [name for name, p in model.named_parameters() if not p.detach().sum(dtype=torch.float64).isfinite()]


def frozen_hashes(model: nn.Module, dtype: torch.dtype) -> dict[str, str]:
    """Name in the base model -> hash of up to 64 values, cast to `dtype`, of each weight that does not train.

    Adapters belong to these weights and no others.
    """
    hashes = {}
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(dtype).float().cpu().numpy()
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
            hashes[name] = hashlib.sha256(f"{tuple(weight.shape)} ".encode() + sample.tobytes()).hexdigest()[:16]
    return hashes


def frozen_fingerprint(model: nn.Module) -> str:
    """One hash for all weights that do not train."""
    return hashlib.sha256(repr(frozen_hashes(model, frozen_dtype(model))).encode()).hexdigest()[:32]


def frozen_dtype(model: nn.Module) -> torch.dtype:
    """The narrowest dtype of the weights that do not train; float32 if all do."""
    frozen = [p.dtype for p in model.parameters() if not p.requires_grad]
    return min(frozen, key=lambda dtype: dtype.itemsize, default=torch.float32)


def dead_adapters(model: nn.Module) -> list[str]:
    """LoRA B matrices that are still zero: their adapters changed nothing."""
    return [name for name, p in model.named_parameters() if "lora_B" in name and not p.any()]


def merge(model: PeftModel) -> Any:
    """The base model with every adapter added in: W + (alpha / r) B A."""
    return model.merge_and_unload(safe_merge=True)
