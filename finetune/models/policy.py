"""The model as objectives see it: a forward pass answers with losses, never with logits."""

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
    """What was wanted of a pass; the rest is None. Float32, nats; S supervised tokens."""

    nll: torch.Tensor | None = None
    """Sum of the cross-entropies, each times its weight; its gradient is already there."""
    logprobs: torch.Tensor | None = None
    """[S] of the labels."""
    entropy: torch.Tensor | None = None
    """[S] of the distributions over the vocabulary."""


class Policy:
    """A model whose forward `head.install` has prepared, in whatever shares it among processes."""

    def __init__(self, model: Any, unwrap: Callable[[Any], Any] = lambda model: model) -> None:
        self.model, self._unwrap = model, unwrap

    def __call__(
        self, batch: Batch, want: Iterable[str], *, label_smoothing: float = 0.0
    ) -> Answers:
        """Run one forward pass. `want`: any of nll, logprobs, entropy; `label_smoothing` is nll's.

        Ask at once for all that you need of a batch: processes that share the weights gather them
        once a pass.
        """
        question = Question(
            batch.labels, batch.positions, self.known(want), batch.weights, label_smoothing
        )
        return Answers(**self.model(**batch.inputs, question=question))

    @staticmethod
    def known(want: Iterable[str]) -> frozenset[str]:
        """Return what is wanted. Raises ValueError if a policy cannot answer all of it."""
        wanted = frozenset(want)
        if unknown := wanted - WANTS:
            raise ValueError(
                f"a policy cannot be asked for {', '.join(sorted(unknown))}; it knows "
                f"{', '.join(sorted(WANTS))}"
            )
        return wanted

    def per_document(self, values_S: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Sum the values of each document's supervised tokens, [D]; differentiable.

        Where processes share a sequence, each gets whole sums of the documents that it owns, so
        every document counts once.
        """
        sums = values_S.new_zeros(batch.num_documents).index_add(0, batch.document, values_S)
        if batch.group is None:
            return sums
        return context_parallel.sum_over(sums, batch.group)[batch.owned]

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Switch the adapters off inside the block. Raises ValueError if there are none."""
        bare = self._unwrap(self.model)
        if not hasattr(bare, "disable_adapter"):
            raise ValueError("all weights are trained, so the model has no adapters to switch off")
        disabled: AbstractContextManager[Any] = bare.disable_adapter()
        return disabled
