"""Score answers: the chosen one of a row above each rejected one; every row counts once.

The model reads a whole conversation, and its head the last token, which ends the last turn.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from torch import Tensor
from torch.nn.functional import logsigmoid

from finetune import config
from finetune.data.batches import Batch
from finetune.data.preferences import MARGIN
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term
from finetune.objectives.preference import Pairs


class Reward(Objective):
    """P(chosen is better) = sigmoid(score of chosen - score of rejected) (Bradley, Terry, 1952)."""

    Settings: type[BaseModel] = config.Reward
    reports_cross_entropy = True  # the model predicts no tokens, so there is none

    def supervises(self, loss_on: str) -> str:
        return "completion"

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
