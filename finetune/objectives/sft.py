"""Supervised fine-tuning: the answers, given the prompts."""

from typing import Any

import torch

from finetune.data.batches import Batch
from finetune.models.head import loss_sum


def supervises(loss_on: str) -> str:
    """Which part of a row is learned: what data.loss_on says."""
    return loss_on


def loss(model: Any, batch: Batch) -> tuple[torch.Tensor, int]:
    """(sum of token losses, number of supervised tokens)."""
    return loss_sum(model, batch.model_inputs(), batch.targets), batch.num_supervised
