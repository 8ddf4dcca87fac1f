"""Learn from completions of the policy by their rewards; every step counts its own tokens.

A phase turns rewards into columns of tokens (`columns`), and a step reads them (`loss`). Formulas
and sources are in docs/reinforcement.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from finetune.config import objective_fields as fields
from finetune.config.choices import REFERENCE
from finetune.data.batches import Batch
from finetune.models.policy import Answers, Policy
from finetune.objectives import advantages
from finetune.objectives.advantages import Scored
from finetune.objectives.base import Objective, Term

ADVANTAGES, OLD, RETURNS, OLD_VALUES = "advantages", "old_logprobs", "returns", "old_values"
COMPLETIONS = "completions"
"""Those of a step that have tokens to learn; a masked one has none."""
LARGEST = 20.0  # nats of a log-ratio that count: exp(88) overflows
Columns = dict[str, np.ndarray]
Facts = dict[str, float]


@dataclass(frozen=True)
class Loss:
    """What is clipped, and what the sum of it is divided by.

    ratio: of a `token`, or of a completion: the `sum` of its tokens' log-ratios, or their `mean`.
    per: `tokens` of the step; `completions`, each the mean of its tokens; `budget`, the completions
    times max_new_tokens. is_weight: the clipped ratio is a constant factor of the log-probability.
    """

    ratio: str
    per: str
    clip_low: float = 0.2
    clip_high: float = 0.2
    is_weight: bool = False


LOSSES: Mapping[str, Loss] = {
    "grpo": Loss("token", "completions"),
    "dr_grpo": Loss("token", "budget"),
    "bnpo": Loss("token", "tokens"),
    "dapo": Loss("token", "tokens", clip_high=0.28),
    "gspo": Loss("mean", "completions", 3e-4, 4e-4),
    "cispo": Loss("token", "tokens", 1.0, 4.0, is_weight=True),
}


class Completions:
    """The completions [D] of a batch, each one document, whose S supervised tokens are learned."""

    def __init__(self, policy: Policy, batch: Batch) -> None:
        self._policy, self._batch = policy, batch
        lengths = self.sums(torch.ones_like(batch.labels, dtype=torch.float32))
        self.count = (lengths > 0).sum()
        self._lengths = lengths.clamp(min=1)

    def sums(self, of_tokens: Tensor) -> Tensor:
        """Add up over each completion, [D]."""
        return self._policy.per_document(of_tokens, self._batch)

    def means(self, of_tokens: Tensor) -> Tensor:
        """Average over the tokens of each completion, [D]; 0 of none."""
        return self.sums(of_tokens) / self._lengths


class PolicyGradient(Objective):
    """Base of what learns from rewards of its own completions."""

    samples = True
    asks = frozenset({"logprobs", "entropy"})

    def row(self, settings: Any) -> Loss:
        """Return the loss that the settings ask for."""
        raise NotImplementedError

    def scored_by(self, settings: Any) -> frozenset[str]:
        """Return what the policy answers about completions before they are learned from."""
        return frozenset({"logprobs", *self.heads})

    def wants_reference(self, settings: Any) -> bool:
        """Whether log-probabilities of the weights before the first step are compared with."""
        return settings.beta > 0 or settings.stop_kl is not None

    def columns(self, scored: Scored, settings: Any) -> tuple[Columns, Facts]:
        """Return the columns of tokens that `loss` reads, float32 [S], and facts of the phase.

        What another distribution has sampled is weighted here: a factor of the advantage is one of
        the loss.
        """
        of_tokens, more = self.advantages(scored, settings)
        weights = advantages.sampler_weights(
            scored, settings.sampler_correction, settings.sampler_cap
        )
        columns = {ADVANTAGES: weights * of_tokens, OLD: scored.old_logprobs, **more}
        if self.wants_reference(settings):
            assert scored.reference is not None
            columns[REFERENCE] = scored.reference
        return (
            {name: values.astype(np.float32) for name, values in columns.items()},
            _spreads(scored, of_tokens, weights),
        )

    def advantages(self, scored: Scored, settings: Any) -> tuple[np.ndarray, Columns]:
        """Return the advantage of each token, [S], and further columns."""
        raise NotImplementedError

    def rewards(self, scored: Scored, settings: Any) -> np.ndarray:
        """Return rewards less the divergence of each completion, unless the loss has it, [N]."""
        if not settings.beta or self.kl_in_loss(settings):
            return scored.rewards
        less: np.ndarray = scored.rewards - settings.beta * scored.sums(scored.divergence)
        return less

    def prepare(self, policy: Policy, batches: Sequence[Batch], settings: Any) -> dict[str, Tensor]:
        """Count the completions that have tokens to learn."""
        counts = [Completions(policy, each).count for each in batches]
        return {COMPLETIONS: torch.stack(counts).sum()}

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, Tensor]
    ) -> list[Term]:
        row, columns = self.row(settings), batch.token_columns
        wanted = self.asks | self.heads
        answers = policy(batch, wanted, temperature=settings.rollouts.temperature)
        assert answers.logprobs is not None
        assert answers.entropy is not None
        completions, ratio = Completions(policy, batch), ratio_of(answers.logprobs, columns[OLD])
        terms = _surrogate(row, completions, answers.logprobs, columns, settings)
        terms.append(
            Term("entropy", answers.entropy.sum(), "tokens", weight=-settings.entropy_bonus)
        )
        if self.wants_reference(settings):
            ahead = columns[REFERENCE] - answers.logprobs
            divergence = _exp(ahead) - ahead - 1
            terms.append(Term("kl", divergence.detach().sum(), "tokens", weight=0.0))
            if self.kl_in_loss(settings):
                total, per = _added(row, completions, ratio * divergence, settings)
                terms.append(Term("kl_loss", total, per, weight=settings.beta))
        return [*terms, *self.further_terms(answers, batch, settings)]

    def kl_in_loss(self, settings: Any) -> bool:
        """Whether the divergence is part of the loss, not of the reward."""
        return False

    def further_terms(self, answers: Answers, batch: Batch, settings: Any) -> list[Term]:
        return []

    def runs_away(self, terms: Mapping[str, float], settings: Any) -> str:
        kl, entropy = terms.get("kl"), terms.get("entropy")
        if settings.stop_kl is not None and kl is not None and kl > settings.stop_kl:
            return f"kl is {kl:.3g}, above objective.stop_kl: {settings.stop_kl:g}"
        if settings.stop_entropy is None or entropy is None:
            return ""
        low, high = settings.stop_entropy
        limits = f"objective.stop_entropy: [{low:g}, {high:g}]"
        return "" if low <= entropy <= high else f"entropy is {entropy:.3g}, outside {limits}"


def _surrogate(
    row: Loss, completions: Completions, logprobs: Tensor, columns: Mapping[str, Tensor],
    settings: Any,
) -> list[Term]:  # fmt: skip
    """Return what a policy gradient minimises, and how far the policy is from the phase's."""
    log_ratio, gain = logprobs - columns[OLD], columns[ADVANTAGES]
    of_tokens = _exp(log_ratio.detach())
    if row.ratio != "token":
        gather = completions.sums if row.ratio == "sum" else completions.means
        log_ratio, gain = gather(log_ratio), completions.means(gain)
    ratio, (low, high) = _exp(log_ratio), _limits(row, settings)
    clipped = ratio.clamp(1 - low, 1 + high)
    if row.is_weight:
        value = clipped.detach() * gain * logprobs
    else:
        most = math.inf if settings.dual_clip is None else settings.dual_clip
        value = torch.minimum(ratio.clamp(max=most) * gain, clipped * gain)
    is_low, is_high = (ratio < 1 - low) & (gain < 0), (ratio > 1 + high) & (gain > 0)
    if row.ratio == "token":
        (total, per), unit = _added(row, completions, -value, settings), "tokens"
    else:
        total, per, unit = -value.sum(), COMPLETIONS, COMPLETIONS
    return [
        Term("loss", total, per),
        Term("ratio", of_tokens.sum(), "tokens", weight=0.0),
        Term("clip_share_low", is_low.float().sum(), unit, weight=0.0),
        Term("clip_share_high", is_high.float().sum(), unit, weight=0.0),
    ]


def _added(
    row: Loss, completions: Completions, of_tokens: Tensor, settings: Any
) -> tuple[Tensor, str]:
    """Return (the sum of numbers of tokens [S] in the unit of a loss, what divides it)."""
    if row.per == "completions":
        return completions.means(of_tokens).sum(), COMPLETIONS
    if row.per == "budget":
        return of_tokens.sum() / settings.rollouts.max_new_tokens, COMPLETIONS
    return of_tokens.sum(), "tokens"


def _limits(row: Loss, settings: Any) -> tuple[float, float]:
    low, high = settings.clip_low, settings.clip_high
    return row.clip_low if low is None else low, row.clip_high if high is None else high


def ratio_of(logprobs: Tensor, old: Tensor) -> Tensor:
    """Return the ratio of probabilities to those of the phase, [S]."""
    return _exp(logprobs - old)


def _exp(nats: Tensor) -> Tensor:
    return nats.clamp(max=LARGEST).exp()


def _spreads(scored: Scored, of_tokens: np.ndarray, weights: np.ndarray) -> Facts:
    """Return how far rewards, advantages and the two log-probabilities lie apart in a phase."""
    facts = {"reward_std": scored.rewards.std()}
    if len(of_tokens):  # else all are masked
        facts["advantage_std"] = of_tokens.std()
    if len(of_tokens) and scored.sampler_logprobs is not None:
        facts["sampler_gap"] = np.abs(scored.old_logprobs - scored.sampler_logprobs).mean()
        facts["sampler_dropped"] = np.mean(weights == 0)
    return {name: float(value) for name, value in facts.items()}


class Grpo(PolicyGradient):
    """By the advantage over the other completions of a prompt."""

    Settings: type[BaseModel] = fields.Grpo

    def row(self, settings: Any) -> Loss:
        return LOSSES[settings.loss]

    def kl_in_loss(self, settings: Any) -> bool:
        return bool(settings.beta) and settings.kl == "in_loss"

    def advantages(self, scored: Scored, settings: Any) -> tuple[np.ndarray, Columns]:
        scale = settings.scale_advantages or ("none" if settings.loss == "dr_grpo" else "group")
        rewards = self.rewards(scored, settings)
        return scored.of_tokens(advantages.beside_group(rewards, scored.groups, scale)), {}


class Rloo(PolicyGradient):
    """REINFORCE with leave-one-out baselines: a completion is one action."""

    Settings: type[BaseModel] = fields.Rloo

    def row(self, settings: Any) -> Loss:
        return Loss("sum", "completions")

    def advantages(self, scored: Scored, settings: Any) -> tuple[np.ndarray, Columns]:
        rewards = self.rewards(scored, settings)
        return scored.of_tokens(advantages.beside_others(rewards, scored.groups)), {}


class Ppo(PolicyGradient):
    """By the advantage over what a value head expected of each token."""

    Settings: type[BaseModel] = fields.Ppo
    needs = frozenset({"values"})

    def row(self, settings: Any) -> Loss:
        return Loss("token", "tokens")

    def advantages(self, scored: Scored, settings: Any) -> tuple[np.ndarray, Columns]:
        assert scored.values is not None
        rewards = np.zeros(len(scored.values))
        if settings.beta:
            rewards -= settings.beta * scored.divergence
        has_tokens = scored.lengths > 0
        rewards[scored.ends[has_tokens] - 1] += scored.rewards[has_tokens]
        found, returns = advantages.generalised(
            rewards, scored.values, scored.ends, settings.gamma, settings.gae_lambda
        )
        return advantages.whitened(found), {RETURNS: returns, OLD_VALUES: scored.values}

    def columns(self, scored: Scored, settings: Any) -> tuple[Columns, Facts]:
        columns, facts = super().columns(scored, settings)
        if not len(columns[RETURNS]):  # all are masked
            return columns, facts
        left, all_of = (columns[RETURNS] - columns[OLD_VALUES]).var(), columns[RETURNS].var()
        return columns, {**facts, "explained_variance": float(1 - left / max(all_of, 1e-12))}

    def further_terms(self, answers: Answers, batch: Batch, settings: Any) -> list[Term]:
        values, columns = answers.values, batch.token_columns
        assert values is not None
        old, returns = columns[OLD_VALUES], columns[RETURNS]
        near = old + (values - old).clamp(-settings.value_clip, settings.value_clip)
        error = torch.maximum((values - returns).square(), (near - returns).square())
        return [Term("value_loss", 0.5 * error.sum(), "tokens", weight=settings.value_weight)]
