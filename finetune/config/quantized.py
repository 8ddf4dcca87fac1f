"""Which quantisation the config of a model names, and whether it can be trained. No torch."""

from collections.abc import Mapping
from typing import Any

from finetune.config import values as allowed


def quantization(model_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the quantisation of a model by its config; None if it is not quantised."""
    nested = model_config.get("text_config")
    for values in (model_config, nested if isinstance(nested, Mapping) else {}):
        for name in ("quantization_config", "compression_config", "quantization"):
            found: Any = values.get(name)
            found = found.to_dict() if hasattr(found, "to_dict") else found
            if isinstance(found, dict) and found and not _is_off(found):
                return found
    return None


def _is_off(found: Mapping[str, Any]) -> bool:
    """Return whether bitsandbytes has neither 4 nor 8 bits: the weights are not quantised."""
    return _method(found) == "bitsandbytes" and not any(found.get(name) for name in allowed.BITS)


def _method(found: Mapping[str, Any]) -> str:
    """Return quant_method (in a config that transformers opened, an enum); empty without one."""
    method = found.get("quant_method")
    return str(getattr(method, "value", method) or "")


def form_of(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a quantisation of bitsandbytes as settings of `adapter`; None for any other."""
    has_bits = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = _method(found) or ("bitsandbytes" if has_bits else "")
    if method.removesuffix("_4bit").removesuffix("_8bit") != "bitsandbytes":
        return None
    if found.get("load_in_8bit", found.get("_load_in_8bit")):
        return {"quantization": "int8"}
    return {
        "quantization": found.get("bnb_4bit_quant_type", "fp4"),
        "double_quantization": bool(found.get("bnb_4bit_use_double_quant")),
    }


def name_of(found: Mapping[str, Any]) -> str:
    """Name a quantisation in a few words."""
    form = form_of(found)
    if form:
        doubly = ", doubly quantised" if form.get("double_quantization") else ""
        return f"bitsandbytes {form['quantization']}{doubly}"
    method = _method(found)
    if not method:
        return "MLX" if "group_size" in found else "of an unnamed kind"
    bits = found.get("bits") or found.get("w_bit")
    return method + (f", {bits} bits" if bits else "")


def training_problem(name: str, model_config: Mapping[str, Any], adapter_kind: str) -> str | None:
    """Return why this adapter cannot train a quantised model; None if it can."""
    found = quantization(model_config)
    if found is None:
        return None
    what = f"{name} is quantised already ({name_of(found)})"
    original = "give the model before quantisation as model.path"
    if form_of(found) is None:
        hint = f"{original} (adapter.kind: qlora quantises it itself)"
        return f"{what}, which cannot be trained; {hint}"
    if adapter_kind != "qlora":
        hint = f"set adapter.kind: qlora, or {original}"
        return f"{what}, so adapter.kind: {adapter_kind} cannot train it; {hint}"
    return None


def problem_of(where: str, found: Any) -> str | None:
    """Return why a quantization_config is invalid; None if it is valid, trainable or not."""
    remedy = "correct it, or remove it if the weights are not quantised"
    if not isinstance(found, Mapping):
        got = allowed.short(found)
        return f"{where} should be a mapping with quant_method, got {got}; {remedy}"
    bits = [name for name in allowed.BITS if found.get(name)]
    method = _method(found)
    if not method and not bits and (not found or any(name in found for name in allowed.BITS)):
        return f"{where} has no quant_method, so transformers cannot open the model; {remedy}"
    if not bits and not method.startswith("bitsandbytes"):
        return None
    if problem := allowed.problem(where, found, allowed.OF_BITSANDBYTES):
        return problem
    if len({name.strip("_") for name in bits}) > 1:
        return f"{where} has both load_in_4bit and load_in_8bit; set one of them to false"
    return None
