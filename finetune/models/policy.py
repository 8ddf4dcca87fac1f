"""The model as objectives see it: a forward pass answers with losses, never with logits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import Batch
from finetune.models import context_parallel
from finetune.models.distributions import Distribution, Reference
from finetune.models.head import WANTS, Question


@dataclass(frozen=True)
class Answers:
    """What was wanted of a pass; the rest is None. Float32, nats.

    S supervised tokens, D documents.
    """

    nll: torch.Tensor | None = None
    """Sum of the cross-entropies, each times its weight; its gradient is already there."""
    logprobs: torch.Tensor | None = None
    """[S] of the labels."""
    entropy: torch.Tensor | None = None
    """[S] of the distributions over the vocabulary."""
    divergence: torch.Tensor | None = None
    """[S] from the distributions of `reference`; `logits.divergence` has the formula."""
    values: torch.Tensor | None = None
    """[S] of the value head, where the labels are predicted."""
    scores: torch.Tensor | None = None
    """[D] of the score head, at the last token of each document."""
    predictions: torch.Tensor | None = None
    """int64 [S]: the likeliest label; without gradient."""
    distribution: Distribution | None = None
    """What another pass may take as its `reference`."""


class Policy:
    """A model whose forward `head.install` has prepared, in whatever shares it among processes."""

    def __init__(
        self, model: Any, unwrap: Callable[[Any], Any] = lambda model: model,
        companion: "Callable[..., Answers] | None" = None,
    ) -> None:  # fmt: skip
        self.model, self._unwrap = model, unwrap
        self.companion = companion
        """A frozen model beside it, asked like it; None where the run has none."""

    def __call__(
        self, batch: Batch, want: Iterable[str], *, label_smoothing: float = 0.0,
        reference: Reference | None = None, beta: float = 0.0, temperature: float = 1.0,
    ) -> Answers:  # fmt: skip
        """Run one forward pass. `want`: fields of `Answers`; `label_smoothing` is nll's.

        `reference`, `beta`: of the divergence. `temperature` divides the logits of logprobs and
        entropy, as in sampling, and of the divergence. Ask at once for all that you need of a
        batch: processes that share the weights gather them once a pass. Raises ValueError for what
        the policy cannot answer.
        """
        wanted = self.known(want)
        require_reference(wanted, batch, reference, beta)
        question = Question(
            batch.labels, batch.positions, wanted, batch.weights, label_smoothing,
            ends=batch.ends, reference=reference, beta=beta, temperature=temperature,
        )  # fmt: skip
        found = self.model(**batch.inputs, question=question)
        if "scores" in found:
            found["scores"] = _of_owned(found["scores"], batch)
        return Answers(**found)

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
        return _of_owned(sums, batch)

    def without_adapters(self) -> AbstractContextManager[Any]:
        """Switch off the adapters, dropout and noise inside the block: the base as it was loaded.

        Raises ValueError if all weights are trained.
        """
        bare = self._unwrap(self.model)
        if not hasattr(bare, "disable_adapter"):
            raise ValueError("all weights are trained, so the model has no adapters to switch off")
        return _without_adapters(bare)


@contextmanager
def _without_adapters(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        model.train(was_training)


def _of_owned(sums: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Turn this process's part of sums of documents into [D], whole, of those that count here."""
    if batch.group is None:
        return sums
    return context_parallel.sum_over(sums, batch.group)[batch.owned]


def require_reference(
    wanted: frozenset[str], batch: Batch, reference: Reference | None, beta: float
) -> None:
    """Raise ValueError unless a divergence, and only that, has a reference of this batch."""
    if ("divergence" in wanted) != (reference is not None):
        raise ValueError("divergence and reference come together; give both or neither")
    if reference is not None and len(reference.tensors[0]) != len(batch.labels):
        raise ValueError("reference is the distribution of another batch")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is between 0 and 1, got {beta}")
