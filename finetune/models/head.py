"""Output projection and loss, only where there is something to learn."""

from typing import Any

import torch
import torch.nn.functional as F


def loss_sum(model: Any, inputs: dict[str, Any], targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Sum of the cross-entropies of all supervised tokens, float32 scalar, in nats.

    `inputs` are the model's keyword arguments; targets int64 [B, T] hold the next token, negative
    where nothing is learned. The head computes logits [supervised, V] only: transformers slices
    the hidden states with the boolean mask [B, T] before the projection. With nothing supervised
    the sum is 0 and still has a gradient (of zero), so that every process takes part in every
    backward pass. `label_smoothing`: a part of each target spread over the vocabulary (Szegedy et al., 2016).
    """
    wanted = targets >= 0
    logits = model(**inputs, logits_to_keep=wanted).logits
    if logits.shape[:-1] == targets.shape:  # a model without logits_to_keep gave all of [B, T, V]
        logits = logits[wanted]
    return F.cross_entropy(logits.float(), targets[wanted], reduction="sum", label_smoothing=label_smoothing)
