"""Score answers: beside each other, or each by whether it is right.

The model reads a whole conversation, and its head the last token, which ends the last turn.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from finetune import config
from finetune.data.batches import Batch
from finetune.data.pairs import LABEL
from finetune.data.preferences import MARGIN
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term
from finetune.objectives.preference import Pairs


class Scoring(Objective):
    """Base of what trains a model whose head scores."""

    asks = frozenset({"scores"})
    reports_cross_entropy = True  # the model predicts no tokens, so there is none

    def supervises(self, loss_on: str) -> str:
        return "completion"


class Reward(Scoring):
    """P(chosen is better) = sigmoid(score of chosen - score of rejected) (Bradley, Terry, 1952).

    Every row counts once, also with several rejected answers.
    """

    Settings: type[BaseModel] = config.Reward

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, Tensor]
    ) -> list[Term]:
        """With a column `margin`, the chosen answer should lead by that (Touvron et al., 2023)."""
        scores = policy(batch, {"scores"}).scores
        assert scores is not None
        pairs = Pairs(batch)
        lead, together = pairs.lead(scores), pairs.chosen(scores) + scores
        wanted = batch.columns.get(MARGIN, 0.0)
        center = settings.center_rewards_coefficient
        ahead = (lead > 0).float()
        return [
            Term("loss", pairs.sum(-logsigmoid(lead - wanted)), per="examples"),
            Term("center", pairs.sum(together.square()), per="examples", weight=center),
            Term("accuracy", pairs.sum(ahead), per="examples", weight=0.0),
            Term("margin", pairs.sum(lead), per="examples", weight=0.0),
            Term("chosen_score", pairs.only_chosen(scores).sum(), per="examples", weight=0.0),
            Term("rejected_score", pairs.sum(scores), per="examples", weight=0.0),
        ]


class ProcessReward(Scoring):
    """P(the answer is right up to this step) = sigmoid(score); every step counts once."""

    Settings: type[BaseModel] = config.ProcessReward
    shares_beginnings = True  # a step is an answer that ends with it: one more line than the last

    def loss(
        self, policy: Policy, batch: Batch, settings: Any, prepared: Mapping[str, Tensor]
    ) -> list[Term]:
        scores, labels = policy(batch, {"scores"}).scores, batch.columns[LABEL]
        assert scores is not None
        found = binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        right = ((scores > 0) == (labels > 0.5)).float().sum()
        return [
            Term("loss", found, per="documents"),
            Term("accuracy", right, per="documents", weight=0.0),
        ]
