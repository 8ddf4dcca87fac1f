"""Prefer the chosen answer of a row to each rejected one; every row counts once.

All losses are functions of two numbers of a pair: sums, or means over tokens, of log-probabilities,
where there is a reference beside it. Formulas and sources are in docs/preference.md.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from finetune import config
from finetune.config.choices import REFERENCE
from finetune.data.batches import Batch
from finetune.data.pairs import LABEL
from finetune.data.views import NEXT_TOKEN, Compared, View
from finetune.models.policy import Policy
from finetune.objectives.base import Encoding, Objective, Remark, Term

CHOSEN_TOKENS = "chosen_tokens"
"""The supervised tokens of chosen answers in a step."""


class Pairs:
    """The documents [D] of a batch, each beside the chosen one of its example.

    Without a wait for the device: a chosen document is a pair with itself, of weight 0.
    """

    def __init__(self, batch: Batch) -> None:
        self.is_chosen = batch.columns[LABEL] > 0.5
        self._example, self._size = batch.example, max(1, batch.num_documents)
        rejected = self._of_example((~self.is_chosen).float())
        self._weight = torch.where(self.is_chosen, 0.0, 1 / rejected.clamp(min=1))

    def _of_example(self, values: Tensor) -> Tensor:
        """Return the sum over its example beside each document, [D]."""
        sums = values.new_zeros(self._size).index_add(0, self._example, values)
        return sums[self._example]

    def chosen(self, values: Tensor) -> Tensor:
        """Return the chosen answer's value beside each document, [D]."""
        return self._of_example(self.only_chosen(values))

    def lead(self, values: Tensor) -> Tensor:
        """Return how far the chosen answer's value is above each document's, [D]."""
        return self.chosen(values) - values

    def only_chosen(self, values: Tensor) -> Tensor:
        return torch.where(self.is_chosen, values, 0.0)

    def sum(self, of_pairs: Tensor) -> Tensor:
        """Add up over the pairs, each example in equal parts of its pairs."""
        return (self._weight * of_pairs).sum()


# ---------------------------------------------------------------------------------- the table

Settings = Any


@dataclass(frozen=True)
class PairLoss:
    """of: (log-ratio of the chosen answer, of the rejected one, settings), each [D] -> [D]."""

    of: Callable[[Tensor, Tensor, Settings], Tensor]
    per_token: bool = False
    """Whether log-ratios are means over the tokens of an answer, not sums."""


def _sigmoid(c: Tensor, j: Tensor, s: Settings) -> Tensor:
    return -logsigmoid(s.beta * (c - j))


def _robust(c: Tensor, j: Tensor, s: Settings) -> Tensor:
    e, margin = s.swap_probability, s.beta * (c - j)
    return (e * logsigmoid(-margin) - (1 - e) * logsigmoid(margin)) / (1 - 2 * e)


def _exo(c: Tensor, j: Tensor, s: Settings) -> Tensor:
    e, margin = s.swap_probability, s.beta * (c - j)
    of_chosen = margin.sigmoid() * (logsigmoid(margin) - math.log1p(-e))
    return of_chosen + (-margin).sigmoid() * (logsigmoid(-margin) - math.log(e))


def _nca(c: Tensor, j: Tensor, s: Settings) -> Tensor:
    c, j = s.beta * c, s.beta * j
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-j)


def _discopop(c: Tensor, j: Tensor, s: Settings) -> Tensor:
    margin = s.beta * (c - j)
    blend = (margin / s.discopop_tau).sigmoid()
    return -logsigmoid(margin) * (1 - blend) + (-margin).exp() * blend


LOSSES: Mapping[str, PairLoss] = {
    "sigmoid": PairLoss(_sigmoid),
    "hinge": PairLoss(lambda c, j, s: relu(1 - s.beta * (c - j))),
    "ipo": PairLoss(lambda c, j, s: (c - j - 1 / (2 * s.beta)).square(), per_token=True),
    "robust": PairLoss(_robust),
    "sigmoid_norm": PairLoss(_sigmoid, per_token=True),
    "exo_pair": PairLoss(_exo),
    "nca_pair": PairLoss(_nca),
    "bco_pair": PairLoss(lambda c, j, s: -logsigmoid(s.beta * c) - logsigmoid(-s.beta * j)),
    "sppo_hard": PairLoss(lambda c, j, s: (c - 0.5 / s.beta) ** 2 + (j + 0.5 / s.beta) ** 2),
    "apo_zero": PairLoss(lambda c, j, s: (-s.beta * c).sigmoid() + (s.beta * j).sigmoid()),
    "apo_down": PairLoss(lambda c, j, s: (s.beta * c).sigmoid() + (-s.beta * (c - j)).sigmoid()),
    "discopop": PairLoss(_discopop),
}


def _alpha(ratio: Tensor, order: float) -> Tensor:
    if abs(order - 1) < 1e-6:
        return ratio
    return torch.expm1(((order - 1) * ratio).clamp(max=80)) / (order - 1)  # e^88 overflows


# f'(pi / pi_ref) of a divergence, from the log-ratio (Wang et al., 2023)
DIVERGENCES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, order: ratio,
    "forward_kl": lambda ratio, order: 1 - (-ratio).exp(),
    "js_divergence": lambda ratio, order: math.log(2) + logsigmoid(ratio),
    "alpha_divergence": _alpha,
}


# ----------------------------------------------------------------------------- the objectives


class FallingTogether:
    """Says once that both answers become less likely while the margin grows."""

    NAMES = ("chosen_logprobs", "rejected_logprobs", "margin")

    def __init__(
        self, remedy: str = "raise objective.sft_weight", window: int = 10, nats: float = 1.0
    ) -> None:
        """`window`: steps whose mean is compared; `nats`: what the chosen answer has to lose."""
        self._remedy = remedy
        self._window, self._nats, self._has_said = window, nats, False
        self._first, self._last = list[list[float]](), deque[list[float]](maxlen=window)

    def __call__(self, terms: Mapping[str, float]) -> str:
        values = [terms[name] for name in self.NAMES]
        if len(self._first) < self._window:
            self._first.append(values)
            return ""
        self._last.append(values)
        if self._has_said or len(self._last) < self._window:
            return ""
        before, now = ([sum(each) / len(rows) for each in zip(*rows)]
                       for rows in (self._first, self._last))  # fmt: skip
        falls = now[0] < before[0] - self._nats and now[1] < before[1] and now[2] > before[2]
        if not falls:
            return ""
        self._has_said = True
        return (
            f"chosen answers have become less likely ({before[0]:.1f} -> {now[0]:.1f} nats), "
            "and rejected ones even less likely: the loss looks at their difference alone; if "
            f"answers get worse, lower optimizer.lr, or {self._remedy} (docs/preference.md)"
        )


@dataclass(frozen=True)
class Likelihoods:
    """What the policy says of the answers of a batch.

    logprobs [S]. sums [D] of them over each document; lengths [D]: their number, at least 1.
    """

    policy: Policy
    batch: Batch
    pairs: Pairs
    logprobs: Tensor
    sums: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, policy: Policy, batch: Batch) -> "Likelihoods":
        logprobs = policy(batch, {"logprobs"}).logprobs
        assert logprobs is not None
        sums, lengths = policy.per_document(logprobs, batch), _lengths(policy, batch)
        return cls(policy, batch, Pairs(batch), logprobs, sums, lengths.clamp(min=1))


class Preference(Objective):
    """Base of what compares answers."""

    asks = frozenset({"logprobs"})

    def remark(self) -> Remark:
        return FallingTogether()

    def supervises(self, loss_on: str) -> str:
        return "completion"

    def prepare(self, policy: Policy, batches: Sequence[Batch], settings: Any) -> dict[str, Tensor]:
        """Count the tokens of chosen answers, which divide their cross-entropy."""
        counts = [Pairs(each).only_chosen(_lengths(policy, each)).sum() for each in batches]
        return {CHOSEN_TOKENS: torch.stack(counts).sum()}

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, Tensor]
    ) -> list[Term]:
        answers = Likelihoods.of(policy, batch)
        pairs, sums = answers.pairs, answers.sums
        loss, margin = self.compared(answers, settings)
        ahead = (margin > 0).float()
        nll = -pairs.only_chosen(sums).sum()
        return [
            Term("loss", pairs.sum(loss), per="examples"),
            Term("chosen_nll", nll, per=CHOSEN_TOKENS, weight=self.sft_weight(settings)),
            Term("accuracy", pairs.sum(ahead), per="examples", weight=0.0),
            Term("margin", pairs.sum(margin), per="examples", weight=0.0),
            Term("chosen_logprobs", pairs.only_chosen(sums).sum(), per="examples", weight=0.0),
            Term("rejected_logprobs", pairs.sum(sums), per="examples", weight=0.0),
        ]

    def sft_weight(self, settings: Any) -> float:
        return float(settings.sft_weight)

    def compared(self, answers: Likelihoods, settings: Any) -> tuple[Tensor, Tensor]:
        """Return (loss [D], margin [D]) of each document beside its chosen one."""
        raise NotImplementedError


def _lengths(policy: Policy, batch: Batch) -> Tensor:
    """Return the supervised tokens of each document, float32 [D]."""
    return policy.per_document(torch.ones_like(batch.labels, dtype=torch.float32), batch)


class Dpo(Preference):
    """Direct preference optimisation beside the weights before the first step."""

    Settings: type[BaseModel] = config.Dpo
    needs = frozenset({REFERENCE})

    def view(self, settings: Any, encoding: Encoding) -> View:
        return NEXT_TOKEN if settings.ld_alpha is None else Compared()

    def compared(self, answers: Likelihoods, settings: Any) -> tuple[Tensor, Tensor]:
        columns, row = answers.batch.token_columns, LOSSES[settings.loss]
        moved = answers.logprobs - columns[REFERENCE]
        if settings.ld_alpha is not None:
            moved = moved * (1 - (1 - settings.ld_alpha) * columns["tail"])
        ratio = answers.policy.per_document(moved, answers.batch)
        score = DIVERGENCES[settings.divergence](ratio, settings.divergence_alpha)
        if row.per_token:
            score = score / answers.lengths
        loss = row.of(answers.pairs.chosen(score), score, settings)
        return loss, settings.beta * answers.pairs.lead(ratio)


class Cpo(Preference):
    """The same without a reference, beside the cross-entropy of the chosen answer."""

    Settings: type[BaseModel] = config.Cpo

    def compared(self, answers: Likelihoods, settings: Any) -> tuple[Tensor, Tensor]:
        margin = settings.beta * answers.pairs.lead(answers.sums)
        return -logsigmoid(margin), margin


class Simpo(Preference):
    """By log-probabilities per token, with a lead."""

    Settings: type[BaseModel] = config.Simpo

    def compared(self, answers: Likelihoods, settings: Any) -> tuple[Tensor, Tensor]:
        margin = settings.beta * answers.pairs.lead(answers.sums / answers.lengths)
        return -logsigmoid(margin - settings.gamma), margin


class Orpo(Preference):
    """The cross-entropy of the chosen answer, and the odds against the rejected one."""

    Settings: type[BaseModel] = config.Orpo

    def remark(self) -> Remark:
        return FallingTogether("lower objective.beta")  # it has no sft_weight

    def sft_weight(self, settings: Any) -> float:
        return 1.0

    def compared(self, answers: Likelihoods, settings: Any) -> tuple[Tensor, Tensor]:
        margin = answers.pairs.lead(_log_odds(answers.sums / answers.lengths))
        return -settings.beta * logsigmoid(margin), margin


def _log_odds(mean: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of log p, [D]; finite where p rounds to 1."""
    mean = mean.clamp(max=-1e-6)
    return mean - torch.log(-torch.expm1(mean))
