"""What an objective is: sums over a micro-batch, each with the name of what it is divided by.

Never a mean: the step divides each sum once, by its total over all micro-batches and processes. So
how a step is cut up, packed or shared cannot change what is learned.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from finetune.config.choices import REFERENCE
from finetune.data.batches import Batch
from finetune.data.views import NEXT_TOKEN, View
from finetune.models.policy import Policy
from finetune.objectives.advantages import Scored


@dataclass(frozen=True)
class Term:
    """A sum with its unit.

    sum: float32 scalar. per: what the step divides it by: `tokens` (supervised), `documents`,
    `examples`, or a name that `prepare` returned. weight: factor in the loss; 0: a metric only.
    """

    name: str
    sum: torch.Tensor
    per: str
    weight: float = 1.0


Remark = Callable[[Mapping[str, float]], str]
"""Takes the means of a step's terms, one step after another; returns a note, mostly ""."""


@dataclass(frozen=True)
class Encoding:
    """What turns text into tokens, and draws among them.

    start_id: what the decoder of an encoder-decoder reads first; -1 for other models.
    """

    tokenizer: Any
    seed: int
    start_id: int = -1


class Objective:
    """Base of all objectives. Your own is a subclass with a `loss`; see docs/objectives.md.

    Which models and rows a built-in one takes stands in `OBJECTIVES` of config/choices.py.
    """

    Settings: type[BaseModel] = BaseModel
    """Settings of the section `objective` in a config, which the methods get as `settings`."""
    has_turns = True
    """Whether rows are conversations, whose template the export keeps."""
    needs: frozenset[str] = frozenset()
    """Heads that the policy gets, for `values`, `scores`; "reference": batch.token_columns then has
    the log-probability of each supervised token by the weights before the first step, [S]."""

    @property
    def heads(self) -> frozenset[str]:
        """Return those of `needs` that are heads of the model."""
        return frozenset(self.needs) - {REFERENCE}

    asks: frozenset[str] = frozenset({"nll"})
    """What `loss` asks of the policy, for forecasts of memory."""
    samples = False
    """Whether it learns from completions of the policy, of which `columns` makes columns."""
    learns_rewards = True
    """Whether it learns from rewards, if it samples: else completions may have equal ones, or
    none."""
    shares_beginnings = False
    """Whether the model reads what documents of an example begin with alike only once. Where
    processes share a sequence, or it is padded, it reads them one by one, as those of an objective
    of a user's own."""
    reports_cross_entropy = False
    """Whether `evaluate` returns the cross-entropy of the supervised tokens itself, if there is
    one."""

    @property
    def prepares(self) -> bool:
        """Whether `prepare` computes anything."""
        return type(self).prepare is not Objective.prepare

    def mismatches(self, settings: Any) -> bool:
        """Return whether batches have `mismatched`, prompts with the answers of other rows."""
        return False

    def notes(self, settings: Any, columns: Mapping[str, np.ndarray]) -> list[str]:
        """Return what may surprise about the training rows, from their columns [documents]."""
        return []

    def supervises(self, loss_on: str) -> str:
        """Return which part of a row is supervised, in the words of data.loss_on."""
        return loss_on

    def view(self, settings: Any, encoding: Encoding) -> View:
        """Return what the model gets of each document in an epoch, and its labels."""
        return NEXT_TOKEN

    def remark(self) -> Remark:
        """Return what says, while it trains, how to read its terms."""
        return lambda terms: ""

    def runs_away(self, terms: Mapping[str, float], settings: Any) -> str:
        """Return why a step with these terms has to be the last, mostly ""; some may be missing."""
        return ""

    def scored_by(self, settings: Any) -> frozenset[str]:
        """Return what the policy is asked of each token of a phase of rollouts before its first
        step: `logprobs`, perhaps `values`; nothing saves a pass."""
        return frozenset({"logprobs"})

    def wants_reference(self, settings: Any) -> bool:
        """Return whether the tokens of rollouts need log-probabilities of the weights before the
        first step."""
        return False

    def wants_teacher(self, settings: Any) -> bool:
        """Return whether the tokens of rollouts need log-probabilities of the teacher."""
        return False

    def columns(
        self, scored: Scored, settings: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Return (columns of the supervised tokens of a phase, [S] by name; facts for the log)."""
        raise NotImplementedError("an objective that samples needs a method columns")

    def prepare(
        self, policy: Policy, batches: Sequence[Batch], settings: Any
    ) -> dict[str, torch.Tensor]:
        """Return scalars that only a whole step knows, such as a divisor of your own.

        Called without gradient before the first pass of a step, then summed over processes.
        """
        return {}

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        """Return the terms of one micro-batch; their weighted sum is the loss."""
        raise NotImplementedError("an objective needs a method loss")

    def evaluate(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, torch.Tensor]
    ) -> list[Term]:
        """Return the terms of held-out rows, without gradient; by default those of `loss`."""
        return self.loss(policy, batch, settings, prepared)


def add(added: dict[str, Term], term: Term) -> None:
    """Add a micro-batch's term to those of its name, in float64 and without its graph."""
    so_far = added.get(term.name)
    here = term.sum.detach().double()
    added[term.name] = replace(term, sum=here if so_far is None else so_far.sum + here)


def as_divisors(prepared: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Turn what an objective prepared into divisors: a sum over nothing is 0, so is its mean."""
    return {name: torch.where(value == 0, 1.0, value) for name, value in prepared.items()}


def total(terms: Sequence[Term], divisors: Mapping[str, float | torch.Tensor]) -> torch.Tensor:
    """Return a micro-batch's part of the step's loss: the one division of what is learned."""
    parts = [term.weight * term.sum / divisors[term.per] for term in terms if term.weight]
    return torch.stack(parts).sum() if len(parts) != 1 else parts[0]


def with_blank_reference(batch: Batch) -> Batch:
    """Return a batch with zeros as its reference, for a trial before there is one."""
    columns = {REFERENCE: torch.zeros(len(batch.labels)), **batch.token_columns}
    beside = batch.mismatched and with_blank_reference(batch.mismatched)
    return replace(batch, token_columns=columns, mismatched=beside)
