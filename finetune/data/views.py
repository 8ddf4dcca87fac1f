"""What a model gets of a document in an epoch, and which labels it should predict where.

The number of labels of a document does not depend on the epoch, so the totals of every step are
known beforehand. What is drawn at random is a pure function of (seed, epoch, document).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import spans
from finetune.data.tokens import predicting

if TYPE_CHECKING:
    from finetune.data.examples import Examples


@dataclass(frozen=True)
class Document:
    """ids int64 [T]; labels int64 [S]; positions int64 [S]: where each is predicted; its example.

    columns: its numbers by name. weights: float32 [S], where rows give some. target int64 [U]: what
    a decoder reads; positions are in it then.
    """

    ids: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    example: int
    columns: Mapping[str, np.ndarray]
    weights: np.ndarray | None = None
    target: np.ndarray | None = None


class View:
    """Base of all views; by itself that of causal models: each token predicts the next."""

    shift = 1
    """How far behind the place that predicts it a label stands in the text, if it does."""
    predicts_documents = False
    """Whether each document has one label, and the model answers once for each."""

    def num_labels(self, examples: "Examples") -> np.ndarray:
        """Return the labels of each document, int64 [documents]."""
        stream = examples.input  # no token predicts the first of a document
        return spans.sums(examples.supervised, stream.starts + 1, stream.ends)

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        """Return a document as the model gets it in an epoch."""
        part = examples.input.span(number)
        ids = np.asarray(examples.input.ids[part], np.int64)
        positions, weights = predicting(examples.supervised[part]), None
        if examples.weights is not None:
            weights = np.asarray(examples.weights[part])[positions + 1]
        columns = _columns(examples, number)
        return Document(ids, ids[positions + 1], positions, example, columns, weights)


NEXT_TOKEN = View()


@dataclass(frozen=True, eq=False)
class Masked(View):
    """Masked language modelling: the model restores a fixed number of tokens (Devlin et al., 2019).

    ordinary int64: the tokens that may stand in for others. probability: of a supervised token to
    be among the k that are predicted; k is the nearest whole number, and at least one.
    """

    mask_id: int
    ordinary: np.ndarray
    probability: float
    seed: int

    shift = 0

    def num_labels(self, examples: "Examples") -> np.ndarray:
        return part_of(num_supervised(examples), self.probability)

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        part = examples.input.span(number)
        ids = np.array(examples.input.ids[part], np.int64)
        candidates = np.flatnonzero(examples.supervised[part])
        random = np.random.default_rng([self.seed, 0x3A5C, epoch, number])
        count = int(part_of(len(candidates), self.probability))
        positions = np.sort(random.choice(candidates, count, replace=False))
        labels, fate = ids[positions], random.random(count)
        ids[positions[fate < 0.8]] = self.mask_id
        others = positions[(fate >= 0.8) & (fate < 0.9)]
        ids[others] = random.choice(self.ordinary, len(others))
        return Document(ids, labels, positions, example, _columns(examples, number))


class TokenLabels(View):
    """A label of some tokens, each predicted at its own place; the target stream has them."""

    shift = 0

    def num_labels(self, examples: "Examples") -> np.ndarray:
        return num_supervised(examples)

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        part, target = examples.input.span(number), examples.streams["target"]
        ids = np.asarray(examples.input.ids[part], np.int64)
        labels = np.asarray(target.ids[target.span(number)], np.int64)
        positions = np.flatnonzero(examples.supervised[part])
        return Document(ids, labels[positions], positions, example, _columns(examples, number))


class DocumentLabels(View):
    """One label of each document, predicted once for all of it; a column has it."""

    shift = 0
    predicts_documents = True

    def num_labels(self, examples: "Examples") -> np.ndarray:
        return np.ones(len(examples.input.starts), np.int64)

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        ids = np.asarray(examples.input.ids[examples.input.span(number)], np.int64)
        columns = _columns(examples, number)
        label = np.array([columns["label"]], np.int64)
        return Document(ids, label, np.zeros(1, np.int64), example, columns)


def part_of(count: Any, fraction: float) -> Any:
    """Return a fraction of a number of tokens: to the nearest, at least one, at most all."""
    return np.clip(np.floor(np.asarray(count) * fraction + 0.5).astype(np.int64), 1, count)


def num_supervised(examples: "Examples") -> np.ndarray:
    """Return the supervised tokens of each document, int64 [documents]."""
    return spans.sums(examples.supervised, examples.input.starts, examples.input.ends)


def _columns(examples: "Examples", number: int) -> dict[str, np.ndarray]:
    return {name: values[number] for name, values in examples.columns.items()}
