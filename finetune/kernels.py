"""Triton kernels beside their references: used where they compile and compute the same."""

import importlib
from collections.abc import Callable
from typing import Any

from finetune import failures


def load(module: str, difference: Callable[[Any], str]) -> tuple[Any, str]:
    """Import a module of kernels, or return None and why.

    `difference` runs them beside their reference, and says how they differ.
    """
    try:
        kernels = importlib.import_module(module)  # needs Triton
        why = difference(kernels)
    # Triton compiles at the first call; what is missing for it comes in many exceptions.
    except Exception as exc:
        failures.reraise(exc)
        why = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0]}"
    return (None, why) if why else (kernels, "")
