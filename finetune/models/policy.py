"""The model as objectives see it: one forward pass answers with losses and log-probabilities, never
with logits.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import Batch
from finetune.models import context_parallel
from finetune.models.head import WANTS, Question


@dataclass(frozen=True)
class Answers:
    """What was wanted of a pass; None is what was not. S: supervised tokens of the batch. Float32,
    nats.
    """

    nll: torch.Tensor | None = None
    """Sum of the cross-entropies, each times its weight; its gradient is already there."""
    logprobs: torch.Tensor | None = None
    """[S] of the labels."""
    entropy: torch.Tensor | None = None
    """[S] of the distributions over the vocabulary."""


class Policy:
    """A model whose forward `models.head.install` has prepared, with whatever shares it between
    processes around it.
    """

    def __init__(self, model: Any, unwrap: Callable[[Any], Any] = lambda model: model) -> None:
        self.model, self._unwrap = model, unwrap

    def __call__(
        self, batch: Batch, want: Iterable[str], *, label_smoothing: float = 0.0
    ) -> Answers:
        """One forward pass. `want`: any of nll, logprobs and entropy; `label_smoothing` is nll's.

        All that is needed of a batch is asked for at once: processes that share the weights gather
        them once a pass.
        """
        question = Question(
            batch.labels, batch.positions, self.known(want), batch.weights, label_smoothing
        )
        return Answers(**self.model(**batch.inputs, question=question))

    @staticmethod
    def known(want: Iterable[str]) -> frozenset[str]:
        """What is wanted, if all of it can be answered. Raises ValueError."""
        wanted = frozenset(want)
        if unknown := wanted - WANTS:
            raise ValueError(
                f"a policy cannot be asked for {', '.join(sorted(unknown))}; it knows "
                f"{', '.join(sorted(WANTS))}"
            )
        return wanted

    def per_document(self, values_S: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum of the values of each document's supervised tokens, [D]; differentiable.

        Where processes share a sequence, each gets the sums of whole documents, of those that it
        `owns` alone: so every document counts once.
        """
        sums = values_S.new_zeros(batch.num_documents).index_add(0, batch.document, values_S)
        return (
            sums
            if batch.group is None
            else context_parallel.sum_over(sums, batch.group)[batch.owned]
        )

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Inside, the model is the base that its adapters were put on. Raises ValueError if it has
        none.
        """
        bare = self._unwrap(self.model)
        if not hasattr(bare, "disable_adapter"):
            raise ValueError("all weights are trained: there is no base under adapters to ask")
        disabled: AbstractContextManager[Any] = bare.disable_adapter()
        return disabled
