"""Rules for files of other programs: quantisations, adapters and tokenizers. No torch."""

import json
from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]


def _is(*types: type) -> Test:
    """Return a test of a value's type; true and false are not numbers."""
    is_bool = bool in types
    return lambda value: isinstance(value, types) and (is_bool or not isinstance(value, bool))


_is_number, _is_whole, _is_text, _is_list = _is(int, float), _is(int), _is(str), _is(list)
is_switch, is_object = _is(bool), _is(dict)


def are_words(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _or_null(allows: Test) -> Test:
    return lambda value: value is None or allows(value)


def _dtype_in(names: tuple[str, ...]) -> Test:
    return _or_null(lambda value: str(value).removeprefix("torch.") in names)


Rules = Mapping[str, tuple[Test, str]]
"""Key -> (a test of its value, what the value should be)."""
BITS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
SWITCH, OPTIONAL_SWITCH = (is_switch, "true or false"), (_or_null(is_switch), "true or false")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
OF_BITSANDBYTES: Rules = {
    **dict.fromkeys((*BITS, "bnb_4bit_use_double_quant"), SWITCH),
    "bnb_4bit_quant_type": (lambda value: value in ("nf4", "fp4"), "nf4 or fp4"),
    "bnb_4bit_compute_dtype": (_dtype_in(DTYPE_NAMES), f"one of {', '.join(DTYPE_NAMES)}"),
    "bnb_4bit_quant_storage": (_dtype_in((*DTYPE_NAMES, "uint8", "int8", "float64")), "uint8"),
    "llm_int8_threshold": (_is_number, "a number"),
    "llm_int8_skip_modules": (_or_null(are_words), "a list of names"),
    "llm_int8_enable_fp32_cpu_offload": SWITCH, "llm_int8_has_fp16_weight": SWITCH,
}  # fmt: skip


_are_names = _or_null(lambda value: _is_text(value) or are_words(value))
_are_numbers = _or_null(lambda value: is_object(value) and all(map(_is_number, value.values())))
_are_whole = _or_null(
    lambda value: _is_whole(value) or (_is_list(value) and all(map(_is_whole, value)))
)
_is_template = _or_null(_is(str, list, dict))
NAMES = (_are_names, "a list of names, or an expression")
NUMBERS = (_are_numbers, "a mapping of names to numbers")
OF_LORA: Rules = {
    "peft_type": (lambda value: value == "LORA", "LORA, the only supported kind of adapter"),
    "base_model_name_or_path": (_or_null(_is_text), "the folder or Hub id of the base"),
    "revision": (_or_null(_is_text), "a revision of the base, or null"),
    "r": (lambda value: _is_whole(value) and value > 0, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (
        lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1",
    ),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": NAMES, "exclude_modules": NAMES,
    "modules_to_save": (_or_null(are_words), "a list of names"),
    "rank_pattern": NUMBERS, "alpha_pattern": NUMBERS,
    "layers_to_transform": (_are_whole, "a list of whole numbers"),
    **dict.fromkeys(
        ("use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying", "inference_mode"),
        OPTIONAL_SWITCH,
    ),
    "auto_mapping": (_or_null(is_object), "a mapping, or null"),
}  # fmt: skip
OF_TOKENIZER: Mapping[str, Rules] = {
    "tokenizer.json": {
        "model": (
            lambda value: is_object(value) and "vocab" in value, "an object with the vocabulary",
        ),
        "added_tokens": (_is_list, "a list"),
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": (is_object, "an object"),
        "tokenizer_class": (_or_null(_is_text), "the name of a class"),
        "chat_template": (_is_template, "text, or a list of templates"),
    },
}  # fmt: skip


def problem(where: str, values: Mapping[str, Any], rules: Rules) -> str | None:
    """Return a message about the first value that its rule does not allow; None if all are fine."""
    for name, (allows, expected) in rules.items():
        if name in values and not allows(values[name]):
            return f"{where}: {name} should be {expected}, got {short(values[name])}; correct it"
    return None


def short(value: Any) -> str:
    """Return a value as JSON, cut off where it is long."""
    return json.dumps(value, default=str)[:80]
