"""What may stand in files that other programs write: quantisations, adapters and tokenizers. No torch."""

import json
from collections.abc import Callable, Mapping
from typing import Any


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


Rules = Mapping[str, tuple[Callable[[Any], bool], str]]  # key -> (whether a value may stand there, what may)
BITS = ("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit")
SWITCH = (lambda value: isinstance(value, bool), "true or false")
DTYPE_NAMES = ("float32", "float16", "bfloat16")
OF_BITSANDBYTES: Rules = {
    **dict.fromkeys((*BITS, "bnb_4bit_use_double_quant"), SWITCH),
    "bnb_4bit_quant_type": (lambda value: value in ("nf4", "fp4"), "nf4 or fp4"),
    "bnb_4bit_compute_dtype": (
        lambda value: value is None or str(value).removeprefix("torch.") in DTYPE_NAMES, f"one of {', '.join(DTYPE_NAMES)}"
    ),
    "bnb_4bit_quant_storage": (
        lambda value: value is None or str(value).removeprefix("torch.") in (*DTYPE_NAMES, "uint8", "int8", "float64"), "uint8"
    ),
    "llm_int8_threshold": (_is_number, "a number"),
    "llm_int8_skip_modules": (lambda value: value is None or _are_words(value), "a list of names"),
    "llm_int8_enable_fp32_cpu_offload": SWITCH, "llm_int8_has_fp16_weight": SWITCH,
}  # fmt: skip
OPTIONAL_SWITCH = (lambda value: value is None or isinstance(value, bool), "true or false")
NAMES = (
    lambda value: value is None or isinstance(value, str) or _are_words(value),
    "a list of names, or an expression",
)
NUMBERS = (lambda value: value is None or (isinstance(value, dict) and all(map(_is_number, value.values()))), "a mapping of names to numbers")  # fmt: skip
OF_LORA: Rules = {
    "peft_type": (lambda value: value == "LORA", "LORA, the one kind of adapter that can be opened here"),
    "base_model_name_or_path": (lambda value: value is None or isinstance(value, str), "the folder or Hub id of the base"),
    "revision": (lambda value: value is None or isinstance(value, str), "a revision of the base, or null"),
    "r": (lambda value: _is_whole(value) and value > 0, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to below 1"),
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "target_modules": NAMES, "exclude_modules": NAMES, "modules_to_save": (lambda value: value is None or _are_words(value), "a list of names"),
    "rank_pattern": NUMBERS, "alpha_pattern": NUMBERS,
    "layers_to_transform": (
        lambda value: value is None or _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value))), "a list of whole numbers"
    ),
    **dict.fromkeys(("use_dora", "use_rslora", "fan_in_fan_out", "ensure_weight_tying", "inference_mode"), OPTIONAL_SWITCH),
    "auto_mapping": (lambda value: value is None or isinstance(value, dict), "a mapping, or null"),
}  # fmt: skip
OF_TOKENIZER: Mapping[str, Rules] = {
    "tokenizer.json": {
        "model": (lambda value: isinstance(value, dict) and "vocab" in value, "an object with the vocabulary"),
        "added_tokens": (lambda value: isinstance(value, list), "a list"),
    },
    "tokenizer_config.json": {
        "added_tokens_decoder": (lambda value: isinstance(value, dict), "an object"),
        "tokenizer_class": (lambda value: value is None or isinstance(value, str), "the name of a class"),
        "chat_template": (lambda value: value is None or isinstance(value, str | list | dict), "text, or a list of templates"),
    },
}  # fmt: skip


def problem(where: str, values: Mapping[str, Any], rules: Rules) -> str | None:
    """Name the first key with a value that its rule does not allow; None if there is none."""
    for name, (allows, wanted) in rules.items():
        if name in values and not allows(values[name]):
            return f"{where}: {name} should be {wanted}, got {short(values[name])}; correct it"
    return None


def short(value: Any) -> str:
    return json.dumps(value, default=str)[:80]
