"""Which attention kernel a run takes, and what that means for its batches."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from finetune.config import PADDED_ATTENTION
from finetune.errors import ModelError

DOCUMENTS = "documents"
"""Our own: sequences lie end to end, and each document attends to itself only."""


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
    num_context: int = 1,
) -> str:  # fmt: skip
    """Return the kernel for model.attention. Raises ModelError if it cannot be had.

    `num_context`: processes that share a sequence.
    """
    has_flash = importlib.util.find_spec("flash_attn") is not None
    flash_fits = has_flash and device.type == "cuda" and precision != "fp32"  # it has no float32
    if wanted == "flash_attention_2" and not flash_fits:
        found = "train.precision: fp32" if has_flash else "no flash_attn package"
        raise ModelError(
            "model.attention: flash_attention_2 needs a CUDA device, the flash-attn package and "
            f"bf16 or fp16, found {'no CUDA device' if device.type != 'cuda' else found}; use auto"
        )
    has_sdpa = getattr(model_class, "_supports_sdpa", False) and not _soft_capped(config)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or ())
    # Where SDPA cannot follow (sinks, soft caps), neither can the kernel for documents.
    can_separate = (
        has_sdpa
        and getattr(model_class, "_supports_attention_backend", False)
        and layers <= {"full_attention", "sliding_attention"}
    )
    if wanted == DOCUMENTS and not can_separate:
        raise ModelError(
            f"model.attention: {DOCUMENTS} does not support {config.model_type} (soft-capped "
            "scores, sinks, or attention of its own); use eager"
        )
    if num_context > 1:
        heads = config.get_text_config().num_attention_heads
        if not can_separate or wanted not in ("auto", DOCUMENTS) or heads % num_context:
            raise ModelError(
                f"sequences shared by {num_context} processes need model.attention: {DOCUMENTS}, "
                "which must be possible for the model, and a number of heads that they can divide; "
                f"{config.model_type} has {heads}, and model.attention is {wanted}"
            )
        return DOCUMENTS
    if wanted != "auto":
        return wanted
    if not can_separate:
        return "sdpa" if has_sdpa else "eager"
    if flash_fits and getattr(model_class, "_supports_flash_attn", False):
        return "flash_attention_2"
    return DOCUMENTS


def _soft_capped(config: Any) -> bool:
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
