"""Causal language modelling: every next token of every row."""

from typing import Any

import torch

from finetune.data.batches import Batch
from finetune.models.head import loss_sum


def supervises(loss_on: str) -> str:
    """Learn all of a row, for any data.loss_on."""
    return "all"


def loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> tuple[torch.Tensor, int]:
    """(sum of the losses of all supervised tokens, their number)."""
    return loss_sum(model, batch.model_inputs(), batch.targets, batch.learned, label_smoothing), batch.num_supervised
