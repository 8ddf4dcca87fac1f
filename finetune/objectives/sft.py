"""Supervised fine-tuning: the answers, given the prompts."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel

from finetune.config import CrossEntropy
from finetune.data.batches import Batch
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term


class Sft(Objective):
    """Cross-entropy of the supervised tokens."""

    Settings: type[BaseModel] = CrossEntropy
    reports_cross_entropy = True

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        nll = policy(batch, {"nll"}, label_smoothing=settings.label_smoothing).nll
        assert nll is not None
        return [Term("loss", nll, per="tokens")]

    def evaluate(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        """Leave out label smoothing, so that runs can be compared: cross-entropy itself."""
        nll = policy(batch, {"nll"}).nll
        assert nll is not None
        return [Term("loss", nll, per="tokens"), Term(CROSS_ENTROPY, nll, per="tokens", weight=0.0)]


CROSS_ENTROPY = "cross_entropy"
