"""Make good answers likelier and bad ones less likely, each by itself (Ethayarajh et al., 2024).

An answer counts by how far its log-ratio to the reference is from z, how far the policy is from it
on other answers: the mean log-ratio, at least 0, of prompts with the answers of other rows. z is of
the whole step over all processes, and has no gradient.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from finetune import config
from finetune.config.choices import REFERENCE
from finetune.data.batches import Batch
from finetune.data.pairs import LABEL
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term

DESIRABLE, UNDESIRABLE = "desirable", "undesirable"
DRIFT, MISMATCHED = "drift", "mismatched"
"""The sum of the log-ratios of mismatched documents in a step, and their number."""
BALANCED = 1.0, 4 / 3
"""What the weights of good answers over those of bad ones should add up to, by the paper."""


class Kto(Objective):
    """Kahneman-Tversky optimisation beside the weights before the first step."""

    Settings: type[BaseModel] = config.Kto
    needs = frozenset({REFERENCE})
    asks = frozenset({"logprobs"})

    def mismatches(self, settings: Any) -> bool:
        return bool(settings.loss == "kto")

    def notes(self, settings: Any, columns: Mapping[str, np.ndarray]) -> list[str]:
        good, total = float(columns[LABEL].sum()), len(columns[LABEL])
        least, most = BALANCED
        weights = settings.desirable_weight, settings.undesirable_weight
        bad = total - good
        share = good * weights[0] / (bad * weights[1])
        if least - 1e-9 <= share <= most + 1e-9:
            return []
        if share < least:
            advice = f"objective.desirable_weight: {least * bad * weights[1] / good:.2f} or more"
        else:
            advice = f"objective.undesirable_weight: {good * weights[0] / (bad * most):.2f} or more"
        return [
            f"{good:,.0f} desirable answers with a weight of {weights[0]:g} count "
            f"{share:.2f} times as much as {bad:,.0f} undesirable ones with {weights[1]:g}; KTO's "
            f"authors advise 1 to 1.33 times: set {advice}"
        ]

    def prepare(self, policy: Policy, batches: Sequence[Batch], settings: Any) -> dict[str, Tensor]:
        """Count the answers of both kinds, and add up the log-ratios that z is the mean of."""
        labels = torch.cat([batch.columns[LABEL] for batch in batches])
        found = {DESIRABLE: labels.sum(), UNDESIRABLE: (1 - labels).sum()}
        if not self.mismatches(settings):
            return found
        was_training = policy.model.training
        policy.model.eval()  # dropout would be another in each pass
        ratios = [_log_ratios(policy, each.mismatched) for each in batches if each.mismatched]
        policy.model.train(was_training)
        drift = torch.cat(ratios).double()
        return {**found, DRIFT: drift.sum(), MISMATCHED: drift.new_tensor(len(drift))}

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, Tensor]
    ) -> list[Term]:
        ratio = _log_ratios(policy, batch)
        is_good = batch.columns[LABEL] > 0.5
        z = ratio.new_zeros(())
        if self.mismatches(settings):
            z = (prepared[DRIFT] / prepared[MISMATCHED]).clamp(min=0).to(ratio)
        # Without z this is the unpaired form of APO-zero (D'Oosterlinck et al., 2024).
        ahead = torch.where(is_good, ratio - z, z - ratio)
        weight = torch.where(is_good, settings.desirable_weight, settings.undesirable_weight)
        reward = (settings.beta * ratio).detach()
        good_reward = torch.where(is_good, reward, 0.0).sum()
        return [
            Term("loss", (weight * (-settings.beta * ahead).sigmoid()).sum(), per="documents"),
            Term("accuracy", (ahead > 0).float().sum(), per="documents", weight=0.0),
            Term("z", z * len(ratio), per="documents", weight=0.0),
            Term("desirable_reward", good_reward, per=DESIRABLE, weight=0.0),
            Term("undesirable_reward", reward.sum() - good_reward, per=UNDESIRABLE, weight=0.0),
        ]


def _log_ratios(policy: Policy, batch: Batch) -> Tensor:
    """Return log pi - log pi_ref of each document's answer, [D]."""
    logprobs = policy(batch, {"logprobs"}).logprobs
    assert logprobs is not None
    return policy.per_document(logprobs - batch.token_columns[REFERENCE], batch)
