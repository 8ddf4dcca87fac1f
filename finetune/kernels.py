"""Triton kernels beside their references: used where they compile and compute the same."""

import importlib
import os
from collections.abc import Callable
from typing import Any

WITHOUT = "FINETUNE_WITHOUT_KERNELS"
"""Environment variable: kernels that are not used, separated by commas, to measure each."""


def is_left_out(name: str) -> bool:
    return name in os.environ.get(WITHOUT, "").split(",")


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
