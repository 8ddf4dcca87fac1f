"""Distillation: the divergence of a student's distributions from a teacher's, token by token.

It needs only documents with supervised tokens, which come from rows, from the teacher, or
from the student itself (generalised knowledge distillation, Agarwal et al., 2024).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from finetune import config
from finetune.data.batches import Batch
from finetune.data.taught import IDS, LOGPROBS
from finetune.models.distributions import Reference, TopK
from finetune.models.policy import Policy
from finetune.objectives.advantages import Scored
from finetune.objectives.base import Objective, Term
from finetune.objectives.sft import CROSS_ENTROPY


class Distill(Objective):
    """The divergence from a teacher, and where asked for the cross-entropy of the tokens."""

    Settings: type[BaseModel] = config.Distill
    reports_cross_entropy = True
    learns_rewards = False

    def scored_by(self, settings: Any) -> frozenset[str]:
        return frozenset()  # the teacher says all that is learned

    def columns(
        self, scored: Scored, settings: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        return {}, {}

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        return self._terms(policy, batch, settings, with_nll=settings.sft_weight > 0)[0]

    def evaluate(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        terms, nll = self._terms(policy, batch, settings, with_nll=True)
        assert nll is not None
        return [*terms, Term(CROSS_ENTROPY, nll, per="tokens", weight=0.0)]

    def _terms(
        self, policy: Policy, batch: Batch, settings: Any, with_nll: bool
    ) -> tuple[list[Term], torch.Tensor | None]:
        """Return the terms of the loss, and the sum of the cross-entropies."""
        answers = policy(
            batch, {"divergence", "nll"} if with_nll else {"divergence"},
            reference=self._reference(policy, batch), beta=settings.beta,
            temperature=settings.temperature,
        )  # fmt: skip
        divergence = answers.divergence
        assert divergence is not None
        if batch.weights is not None:
            divergence = divergence * batch.weights
        terms = [Term("divergence", divergence.sum(), per="tokens")]
        if settings.sft_weight and answers.nll is not None:
            terms += [Term("nll", answers.nll, per="tokens", weight=settings.sft_weight)]
        return terms, answers.nll

    def _reference(self, policy: Policy, batch: Batch) -> Reference:
        """Return the teacher's distributions: stored beside the tokens, or of a pass of it."""
        if policy.companion is None:
            ids, logprobs = (batch.token_columns[name] for name in (IDS, LOGPROBS))
            return TopK(ids.long(), logprobs)
        found = policy.companion(batch, {"distribution"}).distribution
        assert found is not None
        return found


class DistillText(Distill):
    """The same of rows of plain text: every token, as clm learns them."""

    has_turns = False

    def supervises(self, loss_on: str) -> str:
        """Supervise all of a row, whatever data.loss_on says."""
        return "all"
