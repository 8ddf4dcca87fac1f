"""Which attention kernel a run takes, and what that means for its batches."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

from finetune.config import PADDED_ATTENTION
from finetune.config.choices import FAMILIES
from finetune.errors import ModelError
from finetune.models.families import CAUSAL, Family

DOCUMENTS = "documents"
"""Our own: sequences lie end to end, and each document attends to itself only."""
BOTH_WAYS = "documents_both_ways"
"""The same for encoders: a token sees all of its document, also what comes after it."""
FLASH_2, FLASH_3, FLASH_4, CUDNN = (
    "flash_attention_2", "flash_attention_3", "flash_attention_4", "cudnn",
)  # fmt: skip
HEAD_UNIT = 8  # kernels take heads of multiples of it
BY_SETTING = (FLASH_3, FLASH_4, CUDNN)
"""Kernels for `documents` on a GPU that model.attention may name; varlen_choice.py takes one."""


def has_package(name: str) -> bool:
    """Return whether a package is installed. A module `flash_attn` may be flash-attn-4 alone."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def of_documents(family: Family) -> str:
    """Return our own kernel for a family."""
    return DOCUMENTS if family.causal else BOTH_WAYS


def is_padded(implementation: str) -> bool:
    """Whether a kernel trains padded rectangles; else sequences lie end to end."""
    return implementation in PADDED_ATTENTION


@contextmanager
def own_attention(base: Any) -> Iterator[None]:
    """Let a model attend, inside the block, as a user who opens it has it."""
    kernel = base.config._attn_implementation
    if is_padded(kernel):  # it does already
        yield
        return
    base.set_attn_implementation("sdpa" if getattr(base, "_supports_sdpa", False) else "eager")
    try:
        yield
    finally:
        base.set_attn_implementation(kernel)


def choose(
    wanted: str, model_class: Any, config: Any, device: torch.device, precision: str,
    num_context: int = 1, family: Family = CAUSAL,
) -> str:  # fmt: skip
    """Return the kernel for model.attention. Raises ModelError if it cannot be had.

    `num_context`: processes that share a sequence.
    """
    if family.pads and wanted not in ("auto", *PADDED_ATTENTION):
        raise ModelError(
            f"model.attention: {wanted} takes no padded batches, as {FAMILIES[family.name]} needs "
            "them for this objective; use auto"
        )
    if wanted in (FLASH_2, *BY_SETTING):
        _require_gpu(wanted, device, precision)
    has_sdpa = getattr(model_class, "_supports_sdpa", False) and not _soft_capped(config)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    # Where SDPA cannot follow (sinks, soft caps), neither can the kernel for documents.
    can_separate = (
        has_sdpa
        and getattr(model_class, "_supports_attention_backend", False)
        and layers <= {"full_attention", "sliding_attention"}
        and not family.pads
    )
    if wanted in (DOCUMENTS, *BY_SETTING) and not can_separate:
        raise ModelError(
            f"model.attention: {wanted} does not support {config.model_type} (soft-capped "
            "scores, sinks, or attention of its own); use eager"
        )
    if num_context > 1:
        heads = config.get_text_config().num_attention_heads
        if not can_separate or wanted in (FLASH_2, "sdpa", "eager") or heads % num_context:
            raise ModelError(
                f"sequences shared by {num_context} processes need model.attention: {DOCUMENTS}, "
                "which must be possible for the model, and a number of heads that they can divide; "
                f"{config.model_type} has {heads}, and model.attention is {wanted}"
            )
        return of_documents(family)
    if wanted in (FLASH_2, *PADDED_ATTENTION):
        return wanted
    if not can_separate:
        return "sdpa" if has_sdpa else "eager"
    return of_documents(family)


def _require_gpu(wanted: str, device: torch.device, precision: str) -> None:
    """Raise ModelError if a kernel of a GPU is wanted that this machine does not have."""
    has_flash = wanted != FLASH_2 or has_package("flash-attn")
    found = "" if has_flash else "no flash-attn package"
    if device.type != "cuda":
        found = "no CUDA device"
    elif precision == "fp32":
        found = "train.precision: fp32"
    if found:
        package = ", the flash-attn package" if wanted == FLASH_2 else ""
        raise ModelError(
            f"model.attention: {wanted} needs a CUDA device{package} and bf16 or fp16, found "
            f"{found}; use auto"
        )


def _soft_capped(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
