"""Distillation: the divergence of a student's distributions from a teacher's, token by token.

It needs only documents with supervised tokens, which come from rows, from the teacher, or
from the student itself (generalised knowledge distillation, Agarwal et al., 2024). Of the student's
own completions a token also decides what may follow: `loss: minillm` learns that, too, by a policy
gradient whose reward of a token is log(teacher / student) (Gu et al., 2024).
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
from finetune.objectives import advantages, policy_gradient
from finetune.objectives.advantages import Scored
from finetune.objectives.base import Objective, Term
from finetune.objectives.policy_gradient import ADVANTAGES, OLD
from finetune.objectives.sft import CROSS_ENTROPY

CLIP = 0.2  # of Schulman et al., 2017, as MiniLLM has it
SAMPLER_CAP = 3.0  # largest weight of a token of another sampler, as in grpo


class Distill(Objective):
    """The divergence from a teacher, and where asked for the cross-entropy of the tokens."""

    Settings: type[BaseModel] = config.Distill
    asks = frozenset({"divergence"})
    reports_cross_entropy = True
    learns_rewards = False

    def scored_by(self, settings: Any) -> frozenset[str]:
        # In gkd the teacher's distributions say all that is learned.
        return frozenset({"logprobs"} if self.wants_teacher(settings) else ())

    def wants_teacher(self, settings: Any) -> bool:
        return bool(settings.loss == "minillm")

    def columns(
        self, scored: Scored, settings: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        if not self.wants_teacher(settings):
            return {}, {}
        assert scored.teacher is not None
        rewards = scored.teacher - scored.old_logprobs.astype(np.float64)
        later = advantages.of_later(rewards, scored.ends, settings.length_normalization)
        weights = advantages.sampler_weights(scored, "token", SAMPLER_CAP)
        kl = -scored.sums(rewards)[scored.lengths > 0]
        return {ADVANTAGES: weights * later}, {"sequence_kl": float(kl.mean())} if len(kl) else {}

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
        of_later, wanted = ADVANTAGES in batch.token_columns, {"divergence"}
        wanted |= {"nll"} if with_nll else set()
        wanted |= {"logprobs"} if of_later else set()
        answers = policy(
            batch, wanted,
            reference=self._reference(policy, batch), beta=settings.beta,
            temperature=settings.temperature,
        )  # fmt: skip
        divergence = answers.divergence
        assert divergence is not None
        if batch.weights is not None:
            divergence = divergence * batch.weights
        terms = [Term("divergence", divergence.sum(), per="tokens")]
        if of_later:
            assert answers.logprobs is not None
            terms += _long_range(answers.logprobs, batch.token_columns)
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


def _long_range(logprobs: torch.Tensor, columns: Mapping[str, torch.Tensor]) -> list[Term]:
    """Return what a token changes for later ones, clipped as in PPO after a phase's first step."""
    gain, ratio = columns[ADVANTAGES], policy_gradient.ratio_of(logprobs, columns[OLD])
    value = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
    return [
        Term("long_range", -value.sum(), per="tokens"),
        Term("ratio", ratio.detach().sum(), per="tokens", weight=0.0),
    ]


class DistillText(Distill):
    """The same of rows of plain text: every token, as clm learns them."""

    has_turns = False

    def supervises(self, loss_on: str) -> str:
        """Supervise all of a row, whatever data.loss_on says."""
        return "all"
