"""What trains: all weights, or LoRA adapters. Merging."""

import difflib
import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune.config import Adapter, Model
from finetune.errors import ExportError, ModelError

BASE = "base_weights.json"  # beside an adapter: which weights it was trained on
INITS = {"default": True, "loftq": True, "random": False}  # peft's names for adapter.init; the others are the same


def apply(
    model: Any, adapter: Adapter, base: Model, dtype: torch.dtype = torch.float32, new_token_ids: Sequence[int] = ()
) -> Any:
    """The model with what trains unfrozen: itself (full), or a PeftModel around it. Raises ModelError.

    A PeftModel gets an attribute `base_record`: what is needed to know its base again. It is taken
    here, because some initialisations rewrite the base. Where there are new tokens, embedding and
    head train whole and are saved with the adapter.
    """
    if adapter.kind == "full":
        return _freeze(model, adapter.freeze)
    record = {
        "dtype": str(dtype).removeprefix("torch."),
        "quantization": quantization(adapter, dtype),
        "loftq": adapter.init == "loftq",
        "new_token_ids": list(new_token_ids),
    }
    record["weights"] = hashes(model, dtype)
    known = base_record(Path(adapter.path)) if adapter.path else {}
    if (
        known
        and record["weights"]
        and known["quantization"] == record["quantization"]
        and known["dtype"] == record["dtype"]
    ):
        check_base(model, known, Path(str(adapter.path)))
    ends = {id(module) for module in (model.get_output_embeddings(), model.get_input_embeddings())}
    adapted = _continued(model, adapter.path) if adapter.path else _fresh(model, adapter, bool(new_token_ids))
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
    adapted.base_record = record
    return adapted


def quantization(adapter: Adapter, dtype: torch.dtype) -> dict[str, Any] | None:
    """Arguments of transformers' BitsAndBytesConfig, in words; None if nothing is quantised.

    4 bits: Dettmers et al., 2023. Blocks of 64 weights with a scale; NF4's 16 values are the quantiles of a normal distribution.
    """
    if adapter.kind != "qlora":
        return None
    if adapter.quantization == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True, "bnb_4bit_quant_type": adapter.quantization, "bnb_4bit_use_double_quant": adapter.double_quantization,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch.") if adapter.compute_dtype == "auto" else adapter.compute_dtype,
    }  # fmt: skip


def _freeze(model: Any, patterns: list[str]) -> Any:
    """Weights whose name holds one of the patterns do not train. Raises ModelError if one holds none, or all do."""
    for pattern in patterns:
        try:
            found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as exc:
            raise ModelError(f"adapter.freeze: {pattern!r} is no regular expression: {exc}") from exc
        if not found:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ModelError(f"adapter.freeze: no weight has {pattern!r} in its name; there are {some}, ...")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"adapter.freeze: {patterns} leaves nothing to train")
    return model


def _fresh(model: Any, adapter: Adapter, has_new_tokens: bool) -> PeftModel:
    check_targets(model, adapter.target_modules)
    whole = list(adapter.modules_to_save)
    if adapter.train_norms:
        whole += sorted({n.split(".")[-1] for n, m in model.named_modules() if "norm" in type(m).__name__.lower()})
    if has_new_tokens:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        whole += [name.split(".")[-1] for name, module in model.named_modules() if any(module is end for end in ends)]
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    for name in adapter.modules_to_save:
        if name.split(".")[-1] not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1)
            raise ModelError(
                f"adapter.modules_to_save: no module is called {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    num_layers = model.config.get_text_config().num_hidden_layers
    if adapter.layers and max(adapter.layers) >= num_layers:
        raise ModelError(f"adapter.layers: {max(adapter.layers)}, but the model has layers 0 to {num_layers - 1}")
    if adapter.layers is not None and adapter.target_modules == "all-linear":
        raise ModelError(
            "adapter.layers: peft needs names of modules beside it; set adapter.target_modules, as [q_proj, v_proj]"
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    # A model that also sees has linear layers that no text ever reaches: their adapters would stay dead.
    elsewhere = rf"(?!{re.escape(prefix)}\.).*" if prefix and adapter.target_modules == "all-linear" else None
    on_meta = next(model.parameters()).is_meta  # there, only shapes count
    config = LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout, target_modules=adapter.target_modules, exclude_modules=elsewhere,
        layers_to_transform=adapter.layers, rank_pattern=dict(adapter.rank_pattern), alpha_pattern=dict(adapter.alpha_pattern),
        use_rslora=adapter.rslora, use_dora=adapter.dora, init_lora_weights=True if on_meta else INITS.get(adapter.init, adapter.init),
        eva_config=EvaConfig() if adapter.init == "eva" and not on_meta else None,
        bias=adapter.bias, modules_to_save=list(dict.fromkeys(whole)) or None, task_type="CAUSAL_LM",
        ensure_weight_tying=bool(whole) and model.config.get_text_config().tie_word_embeddings,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # refused by `apply`
            warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False")
            return get_peft_model(model, config)
    except (ValueError, ImportError, re.error) as exc:
        raise ModelError(f"adapter.target_modules: {adapter.target_modules!r}: {exc}") from exc


def _continued(model: Any, path: str) -> PeftModel:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*base_model_name_or_path.* was renamed"
            )  # `check_base` looks at the weights
            if next(model.parameters()).is_meta:
                return get_peft_model(model, PeftConfig.from_pretrained(path))
            return PeftModel.from_pretrained(model, path, is_trainable=True)
    except Exception as exc:  # a folder that is not there, another shape, a broken file: each in its own family
        raise ModelError(f"adapter.path: {path}: cannot be gone on from: {exc}") from exc


def base_record(folder: Path) -> dict[str, Any]:
    """What an adapter knows of its base; empty for adapters from elsewhere."""
    path = folder / BASE
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return record


def check_base(base: nn.Module, record: dict[str, Any], folder: Path) -> None:
    """Raise ModelError if the base is not the one that an adapter was trained on."""
    found = hashes(base, getattr(torch, record["dtype"]))
    others = [name for name, wanted in record["weights"].items() if found.get(name) != wanted]
    if others:
        raise ModelError(
            f"{folder}: its base {base.name_or_path} has changed since the adapter was trained beside it: {len(others)} of "
            f"{len(record['weights'])} weights are others, such as {others[0]}; put the old base back, or train again"
        )


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


def initialise_from_data(model: PeftModel, batches: Iterable[dict[str, Any]]) -> None:
    """EVA (Paischer et al., 2024): A from the main directions of what each layer is given. `batches`: model inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "input of type .* could not be moved"
        )  # lengths and switches, which are no tensors
        initialize_lora_eva_weights(
            model, list(batches), forward_fn=lambda inner, inputs: inner(**inputs), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip


def initialise_from_quantization(model: PeftModel, original: nn.Module) -> None:
    """LoftQ (Li et al., 2023), one iteration: B A = the best rank-r part of W - Q, of original and quantised weights.

    peft's own function needs a CUDA device and leaves the scale alpha / r out.
    """
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            quantized = layer.get_base_layer()
            state = getattr(quantized, "state", None)  # of 8 bits; 4-bit weights carry theirs
            weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
            lost = (
                weight.to(quantized.weight.device).float()
                - dequantize_bnb_weight(quantized.weight, state=state).float()
            )
            rank, scale = layer.r["default"], layer.scaling["default"]
            u, s, v = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=4)
            root = s[:rank].sqrt()
            layer.lora_A["default"].weight.data.copy_(root[:, None] * v[:, :rank].T)
            layer.lora_B["default"].weight.data.copy_(u[:, :rank] * root / scale)


def sums(model: nn.Module) -> dict[str, float]:
    """Name -> sum of each weight tensor, in float64: a tensor whose sum stays has not moved."""
    return {name: float(p.detach().sum(dtype=torch.float64)) for name, p in model.named_parameters()}


def not_moved(model: nn.Module, before: dict[str, float]) -> tuple[list[str], int]:
    """(names of weights that train and are what they were, number of weights that train). `before`: their `sums`.

    Raises ExportError if a frozen weight has moved.
    """
    moved = {name for name, total in sums(model).items() if total != before[name]}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if frozen := moved.difference(trained):
        raise ExportError(f"{len(frozen)} frozen weights have moved, such as {min(frozen)}")
    return [name for name in trained if name not in moved], len(trained)


def not_finite(model: nn.Module) -> list[str]:
    """Names of weights that hold NaN or infinity."""
    return [name for name, total in sums(model).items() if not math.isfinite(total)]


def hashes(model: nn.Module, dtype: torch.dtype, only_frozen: bool = False) -> dict[str, str]:
    """Name -> hash of up to 64 values, cast to `dtype`, of each weight. Adapters belong to these weights and no others."""
    found = {}
    for name, weight in model.named_parameters():
        if not weight.is_meta and not (only_frozen and weight.requires_grad):
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)][:64].to(dtype).float().cpu().numpy()
            found[name] = hashlib.sha256(f"{tuple(weight.shape)} ".encode() + sample.tobytes()).hexdigest()[:16]
    return found


def frozen_fingerprint(model: nn.Module) -> str:
    """One hash for all weights that do not train."""
    return hashlib.sha256(repr(hashes(model, torch.float32, only_frozen=True)).encode()).hexdigest()[:32]


def dead_adapters(model: nn.Module) -> list[str]:
    """LoRA B matrices that are still zero: their adapters changed nothing."""
    return [name for name, p in model.named_parameters() if "lora_B" in name and not p.any()]


def merge(model: PeftModel, names: list[str]) -> Any:
    """The base model with adapters added in: W + sum of (alpha / r) B A."""
    return model.merge_and_unload(safe_merge=True, adapter_names=names)


def copy_dequantized(source: nn.Module, target: nn.Module) -> None:
    """Put what quantisation has left of the weights of `source` into the same layers of `target`."""
    for name, module in source.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            target.get_submodule(name).weight.data.copy_(weight)
