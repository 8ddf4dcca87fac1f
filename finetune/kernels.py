"""Triton kernels beside their references: used where they compile and compute the same."""

import difflib
import importlib
import os
from collections.abc import Callable
from typing import Any

from finetune.errors import ConfigError

WITHOUT = "FINETUNE_WITHOUT_KERNELS"
"""Environment variable: kernels that are not used, separated by commas, to measure each."""


NAMES = (
    "cross_entropy_kernel", "adamw_kernel", "lora_products", "adapter_casts", "rms_norm", "swiglu",
    "flash_attention_3", "flash_attention_4", "cudnn",
)  # fmt: skip
"""What it may name."""


def left_out() -> list[str]:
    names = (name.strip() for name in os.environ.get(WITHOUT, "").split(","))
    return [name for name in names if name]


def is_left_out(name: str) -> bool:
    return name in left_out()


def require_known() -> None:
    """Raise ConfigError for a name in FINETUNE_WITHOUT_KERNELS that would be ignored."""
    for name in left_out():
        if name not in NAMES:
            near = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"the kernels are {', '.join(NAMES)}"
            raise ConfigError(f"{WITHOUT}: no kernel has the name {name!r}; {hint}")


def load(module: str, difference: Callable[[Any], str]) -> tuple[Any, str]:
    """Import a module of kernels, or return None and why.

    `difference` runs them beside their reference, and says how they differ.
    """
    if is_left_out(module.rpartition(".")[2]):
        return None, f"{WITHOUT} names it"
    try:
        kernels = importlib.import_module(module)  # needs Triton
        why = difference(kernels)
    # Triton compiles at the first call; what is missing for it comes in many exceptions. Of a
    # broken GPU the next operation reports.
    except Exception as exc:
        why = reason(exc)
    return (None, why) if why else (kernels, "")


def reason(exc: Exception) -> str:
    """Return the kind and the first line of an exception of a compiler, a library, a driver."""
    return f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"


def error(own: Any, right: Any) -> float:
    """Return the root of the mean squared difference of two tensors, relative to that of `right`.

    In float64; NaN if either holds one.
    """
    own, right = own.detach().double(), right.detach().double()
    return float(((own - right).square().mean() / right.square().mean()).sqrt())
