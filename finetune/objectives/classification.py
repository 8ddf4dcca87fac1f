"""Labels of rows, and of words: cross-entropy, and the share of labels that are right."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel

from finetune.config import SequenceClassification, TokenClassification
from finetune.data.batches import Batch
from finetune.data.views import DocumentLabels, TokenLabels, View
from finetune.models.policy import Policy
from finetune.objectives.base import Encoding, Term
from finetune.objectives.sft import CROSS_ENTROPY, Sft


class SequenceLabels(Sft):
    """Cross-entropy of a label for each row."""

    Settings: type[BaseModel] = SequenceClassification
    has_turns = False

    def supervises(self, loss_on: str) -> str:
        return "all"

    def view(self, settings: Any, encoding: Encoding) -> View:
        return DocumentLabels()

    def evaluate(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        """Add the accuracy: the share of labels that are the likeliest."""
        answers = policy(batch, {"nll", "predictions"})
        assert answers.nll is not None
        right = (answers.predictions == batch.labels).float().sum()
        return [
            Term("loss", answers.nll, per="tokens"),
            Term(CROSS_ENTROPY, answers.nll, per="tokens", weight=0.0),
            Term("accuracy", right, per="tokens", weight=0.0),
        ]


class WordLabels(SequenceLabels):
    """Cross-entropy of a label for each word, at its first token."""

    Settings = TokenClassification

    def view(self, settings: Any, encoding: Encoding) -> View:
        return TokenLabels()
