"""Choose what trains: all weights or LoRA adapters. Merge adapters."""

import difflib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune import failures, kernels
from finetune.config import Adapter, Full, Lora, Model, QLora, Quantized
from finetune.config.base import adapter_problem
from finetune.config.choices import ADAPTER_INITS, QUANTIZATIONS
from finetune.config.model_files import ADAPTER_WEIGHTS
from finetune.errors import ModelError
from finetune.models import adapter_init, base_identity, families, load, lora_products
from finetune.models.embeddings import embedding_and_head

# peft imports bitsandbytes, and that the compiler: a run of full weights saves these seconds.
if TYPE_CHECKING:
    from peft import PeftModel


def apply(
    model: Any,
    adapter: Full | Adapter,
    base: Model,
    dtype: torch.dtype = torch.float32,
    new_token_ids: Sequence[int] = (),
) -> Any:
    """Freeze what does not train and return the model (full), or a PeftModel around it.

    A PeftModel gets an attribute `base_record`, which identifies its base. It is recorded here,
    because some initialisations rewrite the base. With new tokens, embedding and head train whole
    and are saved with the adapter. Raises ModelError.
    """
    if isinstance(adapter, Quantized):
        return model.requires_grad_(False)
    if isinstance(adapter, Full):
        model = _freeze(model, adapter.freeze)
        if new_token_ids and not model.get_input_embeddings().weight.requires_grad:
            raise ModelError(
                "adapter.freeze: freezes the embedding, so model.new_tokens could not be trained"
            )
        return model
    form = quantization(adapter, dtype)
    record = base_identity.record(
        model, dtype, form, adapter.init == "loftq", base.new_tokens, new_token_ids
    )
    if adapter.path and (known := base_identity.read(Path(adapter.path))):
        base_identity.require_same(record, known, Path(adapter.path))
        base_identity.require_architecture(model, known, Path(adapter.path))
        record["loftq"] = known["loftq"]
    own = {id(module) for module in embedding_and_head(model)}
    if adapter.path:
        adapted = _continued(model, adapter.path)
    else:
        adapted = _fresh(model, adapter, bool(new_token_ids))
    _require_apart(adapted, own)
    # An absolute path: from another directory peft would look for a relative one on the Hub.
    saved, where = adapted.peft_config["default"], base.path
    saved.base_model_name_or_path = (
        os.path.abspath(where) if where and os.path.isdir(where) else where
    )
    saved.revision = base.revision
    adapted.base_record = record
    adapted.start_rewrites_base = ADAPTER_INITS[adapter.init].rewrites_base and not adapter.path
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # in 16 bits, most steps of a norm or an embedding round away
            parameter.data = parameter.data.float()
    _require_directions(adapted, adapter)
    _require_bias(adapted, adapter)
    leave_casts_to_autocast(adapted)
    lora_products.install(adapted)
    return adapted


def leave_casts_to_autocast(model: nn.Module) -> None:
    """Keep the inputs of adapters in 16 bits under autocast.

    peft converts them to the float32 of the adapter, and autocast back: two copies of every input,
    50 of 348 ms of a step on a GPU. DoRA computes norms in the dtype of its input, so it keeps them
    in float32.
    """
    for layer in model.modules() if not kernels.is_left_out("adapter_casts") else ():
        if hasattr(layer, "lora_A") and not getattr(layer, "lora_variant", None):
            layer._cast_input_dtype = _cast_outside_autocast


def _cast_outside_autocast(states: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return states if torch.is_autocast_enabled(states.device.type) else states.to(dtype)


def _require_bias(model: "PeftModel", adapter: Adapter) -> None:
    """Raise ModelError if biases should train and there are none."""
    if isinstance(adapter, Lora) and adapter.bias != "none":
        trained = (name for name, p in model.named_parameters() if p.requires_grad)
        if not any(name.endswith("bias") for name in trained):
            raise ModelError(
                f"adapter.bias: {adapter.bias}, but this model has no bias; set it to none"
            )


def _require_apart(model: "PeftModel", embedding_and_head: set[int]) -> None:
    """Raise ModelError for an adapter on one of two tied modules, given by their `id`s."""
    for name, layer in model.named_modules():
        is_adapted = hasattr(layer, "lora_A") and id(layer.get_base_layer()) in embedding_and_head
        if is_adapted and model.config.get_text_config().tie_word_embeddings:
            raise ModelError(
                f"adapter.target_modules: {name.removeprefix('base_model.model.')} shares its "
                "weights between head and embedding in this model, so an adapter on it could not "
                "be merged; leave it out"
            )


def quantization(adapter: Full | Adapter, dtype: torch.dtype) -> dict[str, Any] | None:
    """Return the arguments of transformers' BitsAndBytesConfig; None if nothing is quantised.

    4 bits: Dettmers et al., 2023. Each block of 64 weights has a scale; NF4's 16 values are
    quantiles of a normal distribution.
    """
    if not isinstance(adapter, QLora | Quantized):
        return None
    if QUANTIZATIONS[adapter.quantization].bits == 8:
        return {"load_in_8bit": True}
    compute_dtype: str = adapter.compute_dtype
    if compute_dtype == "auto":
        compute_dtype = str(dtype).removeprefix("torch.")
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": adapter.quantization,
        "bnb_4bit_use_double_quant": adapter.double_quantization,
        "bnb_4bit_compute_dtype": compute_dtype,
    }


def _freeze(model: Any, patterns: list[str]) -> Any:
    """Freeze the weights whose names match a pattern. Raises ModelError if none or all do."""
    for pattern in patterns:
        try:
            found = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as exc:
            raise ModelError(
                f"adapter.freeze: {pattern!r} is not a valid regular expression: {exc}"
            ) from exc
        if not found:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
            raise ModelError(
                f"adapter.freeze: no weight has {pattern!r} in its name; there are {some}, ..."
            )
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError(f"adapter.freeze: {patterns} freezes every weight")
    return model


def _fresh(model: Any, adapter: Adapter, has_new_tokens: bool) -> "PeftModel":
    from peft import EvaConfig, LoraConfig, get_peft_model

    check_target_modules(model, adapter.target_modules)
    whole = _trained_whole(model, adapter, has_new_tokens)
    family, body = families.of_model(model), families.body(model)
    is_tied = family.has_vocabulary and model.config.get_text_config().tie_word_embeddings
    keeps_tied = bool(whole) and is_tied
    prefix = next((name for name, module in model.named_modules() if module is body), "")
    # Text never reaches the vision layers of a multimodal model: adapters there would stay zero.
    is_everywhere = prefix and adapter.target_modules == "all-linear"
    on_meta = next(model.parameters()).is_meta  # there, only shapes count
    config = LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        exclude_modules=rf"(?!{re.escape(prefix)}\.).*" if is_everywhere else None,
        use_rslora=adapter.rslora, use_dora=adapter.dora,
        init_lora_weights=True if on_meta else ADAPTER_INITS[adapter.init].peft,
        eva_config=EvaConfig(rho=1.0) if adapter.init == "eva" and not on_meta else None,
        bias=adapter.bias if isinstance(adapter, Lora) else "none",
        modules_to_save=list(whole) or None, task_type=family.task, ensure_weight_tying=keeps_tied,
    )  # fmt: skip
    try:
        with warnings.catch_warnings():
            # `apply` raises an error for it.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
            warnings.filterwarnings(
                "ignore", "lora with eva initialization used with low_cpu_mem_usage=False"
            )
            adapted = get_peft_model(model, config)
    except (ValueError, ImportError, re.error) as exc:
        raise ModelError(f"adapter.target_modules: {adapter.target_modules!r}: {exc}") from exc
    if keeps_tied:
        _keep_tied(adapted, whole)
    return adapted


def _trained_whole(model: Any, adapter: Adapter, has_new_tokens: bool) -> list[str]:
    """Return the names of the modules that train without an adapter.

    Raises ModelError if the model lacks one of adapter.modules_to_save.
    """
    whole = list(adapter.modules_to_save)
    modules = [(name.split(".")[-1], module) for name, module in model.named_modules()]
    if has_new_tokens:
        ids = {id(module) for module in embedding_and_head(model)}
        whole += [name for name, module in modules if id(module) in ids]
    if adapter.train_norms:
        whole += sorted({name for name, m in modules if "norm" in type(m).__name__.lower()})
    whole += families.new_head(model)
    names = {name for name, _ in modules}
    for name in adapter.modules_to_save:
        if name.split(".")[-1] not in names:
            near = difflib.get_close_matches(name, sorted(names), n=1)
            raise ModelError(
                f"adapter.modules_to_save: no module is called {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
    return list(dict.fromkeys(whole))


def _keep_tied(model: "PeftModel", whole: list[str]) -> None:
    """Keep embedding and head tied, here and when the adapter is opened. Raises ModelError.

    peft knows such modules by name, and forgets the head's name when it saves.
    """
    embedding, head = (
        next((p for p in module.parameters() if p.requires_grad), None)
        for module in embedding_and_head(model)
    )
    if embedding is not head:
        raise ModelError(
            "adapter.modules_to_save: peft cannot keep embedding and head of "
            f"{model.config.model_type} tied, which share their weights; use adapter.kind: full, "
            "or leave embedding and new tokens out"
        )
    model.peft_config["default"].modules_to_save = whole


def _continued(model: Any, path: str) -> "PeftModel":
    from peft import PeftConfig, PeftModel, get_peft_model

    if problem := adapter_problem(path):
        raise ModelError(f"adapter.path: {problem}")
    try:
        with warnings.catch_warnings():
            # `base_identity.require_same` has compared the weights.
            warnings.filterwarnings("ignore", ".*base_model_name_or_path.* was renamed")
            if next(model.parameters()).is_meta:
                config = PeftConfig.from_pretrained(path)
                config.inference_mode = False
                config.init_lora_weights = True  # without weights to start from
                adapted = get_peft_model(model, config)
            else:
                adapted = PeftModel.from_pretrained(model, path, is_trainable=True)
        require_whole(adapted, path)
        return adapted
    except Exception as exc:  # peft raises many types: no folder, another shape, a damaged file
        failures.reraise(exc, f"adapter.path: {path}: cannot be loaded now")
        raise ModelError(f"adapter.path: {path}: cannot be continued: {exc}") from exc


def require_whole(model: "PeftModel", path: str, adapter: str = "default") -> None:
    """Raise ModelError unless the adapter in `model` has exactly the weights saved in `path`.

    Compares names and shapes. peft only warns of missing weights, and ignores extra ones silently.
    """
    from peft import get_peft_model_state_dict

    file = Path(path) / ADAPTER_WEIGHTS[0]
    saved = load.shapes_of_file(file if file.exists() else file.with_name(ADAPTER_WEIGHTS[1]))
    if saved is None:
        return
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    # peft has saved some of DoRA's without this ending.
    wanted = {name.removesuffix(".weight"): list(weight.shape) for name, weight in state.items()}
    held = {name.removesuffix(".weight"): shape for name, shape in saved.items()}
    other = [name for name, shape in wanted.items() if held.get(name) != shape]
    other += [name for name in held if "lora_" in name and name not in wanted]
    if other:
        raise ModelError(
            f"{path}: {len(other)} of its weights do not fit its adapter_config.json and this "
            f"base, such as {other[0]}; put back the adapter_config.json that belongs to them, or "
            "give the base that they were trained on"
        )


def _require_directions(model: "PeftModel", adapter: Adapter) -> None:
    """Raise ModelError where adapter.init starts from directions that the layers do not have."""
    if adapter.path is not None or not ADAPTER_INITS[adapter.init].has_directions:
        return
    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        inner = layer.get_base_layer()
        if not isinstance(inner, nn.Linear if adapter.init == "loftq" else (nn.Linear, Conv1D)):
            raise ModelError(
                f"adapter.init: {adapter.init} is for linear layers, and {name} is "
                f"{type(inner).__name__}; name others in adapter.target_modules, or use default"
            )
        is_linear = isinstance(inner, nn.Linear)  # quantised ones too, whose weight is packed
        sizes = (inner.in_features, inner.out_features) if is_linear else inner.weight.shape
        if layer.r["default"] > min(sizes):
            raise ModelError(
                f"adapter.r: {layer.r['default']} is more than the {min(sizes)} directions of "
                f"{name}, from which {adapter.init} starts"
            )


def round_to_base(model: "PeftModel") -> None:
    """Round trained norms, biases and whole modules to the dtype of the base.

    A program that opens the adapter loads them in this dtype.
    """
    for _, parameter in _whole_parts(model):
        with torch.no_grad():
            parameter.copy_(parameter.to(getattr(torch, model.base_record["dtype"])))


def in_base_dtype(model: "PeftModel", weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return `weights` as saved, after `round_to_base`: all but LoRA in the base's dtype."""
    dtype = getattr(torch, model.base_record["dtype"])
    whole = {name for name, _ in _whole_parts(model)}
    return {name: weight.to(dtype) if name in whole else weight for name, weight in weights.items()}


def _whole_parts(model: "PeftModel") -> list[tuple[str, nn.Parameter]]:
    named = model.named_parameters(remove_duplicate=False)
    return [(name, p) for name, p in named if p.requires_grad and "lora_" not in name]


def starts_at_zero(adapter: Adapter) -> bool:
    """Return whether one factor of each fresh adapter is 0, so the other's first gradient is 0."""
    return adapter.path is None and ADAPTER_INITS[adapter.init].leaves_model


def leaves_base(adapter: Adapter | Full) -> bool:
    """Return whether a model with fresh adapters switched off is what training starts from."""
    if isinstance(adapter, Full) or not starts_at_zero(adapter) or adapter.train_norms:
        return False
    return not isinstance(adapter, Lora) or adapter.bias == "none"


def waits_for_other_factor(name: str) -> bool:
    """Return whether a weight's name is of the factor that cannot move in the first step.

    That holds if `starts_at_zero`.
    """
    return "lora_A" in name or "lora_embedding_B" in name


def trains_embedding_and_head(model: nn.Module) -> bool:
    """Return whether any weight of embedding or head trains."""
    return any(p.requires_grad for m in embedding_and_head(model) for p in m.parameters())


def check_target_modules(model: nn.Module, names: str | list[str]) -> None:
    """Raise ModelError if one of `names` is not a linear layer of the model."""
    if isinstance(names, str):  # all-linear, or a regular expression that peft matches whole
        return
    linear = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    leaves = sorted({name.split(".")[-1] for name in linear})
    for wanted in names:
        if not any(name == wanted or name.endswith("." + wanted) for name in linear):
            near = difflib.get_close_matches(wanted, leaves, n=1)
            hint = f"did you mean {near[0]}?" if near else "use all-linear for all of them"
            raise ModelError(
                f"adapter.target_modules: no linear layer is called {wanted!r}; there are "
                f"{', '.join(leaves)}; {hint}"
            )


def are_in(model: nn.Module) -> bool:
    """Return whether `model` is a PeftModel, without importing peft."""
    return any(kind.__name__ == "PeftModel" for kind in type(model).__mro__)


def dead_adapters(model: nn.Module) -> list[str]:
    """Return the names of the LoRA B matrices that are zero: those adapters change nothing."""
    return [name for name, p in model.named_parameters() if "lora_B" in name and not p.any()]


def merge(model: "PeftModel", names: list[str]) -> Any:
    """Return the base model with adapters added: W + sum of (alpha / r) B A."""
    return model.merge_and_unload(safe_merge=True, adapter_names=names)


def copy_dequantized(source: nn.Module, target: nn.Module) -> None:
    """Copy the dequantised weights of `source` into the same layers of `target`."""
    from peft.utils.integrations import dequantize_bnb_weight

    for name, module in source.named_modules():
        if type(module).__name__ in adapter_init.QUANTIZED:
            weight = dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))
            target.get_submodule(name).weight.data.copy_(weight)
