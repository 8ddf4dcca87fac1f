"""What a model gets of a document in an epoch, and which labels it should predict where.

The number of labels of a document does not depend on the epoch, so the totals of every step are
known beforehand. What is drawn at random is a pure function of (seed, epoch, document).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.data import spans
from finetune.data.tokens import predicting
from finetune.errors import ConfigError

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
    token_columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """[S] by name: numbers of its labels."""


class View:
    """Base of all views; by itself that of causal models: each token predicts the next."""

    shift = 1
    """How far behind the place that predicts it a label stands in the text, if it does."""
    predicts_documents = False
    """Whether each document has one label, and the model answers once for each."""
    has_target = False
    """Whether a decoder reads a target of its own."""

    def num_labels(self, examples: "Examples") -> np.ndarray:
        """Return the labels of each document, int64 [documents]."""
        stream = examples.input  # no token predicts the first of a document
        return spans.sums(examples.supervised, stream.starts + 1, stream.ends)

    def token_columns(self, known: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
        """Return the names and types of what documents have for each label.

        `known`: columns of tokens of the examples.
        """
        return {name: values.dtype for name, values in known.items()}

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        """Return a document as the model gets it in an epoch."""
        part = examples.input.span(number)
        ids = np.asarray(examples.input.ids[part], np.int64)
        positions, weights = predicting(examples.supervised[part]), None
        if examples.weights is not None:
            weights = np.asarray(examples.weights[part])[positions + 1]
        columns = _columns(examples, number)
        of_tokens = {
            name: np.asarray(values[part])[positions + 1]
            for name, values in examples.token_columns.items()
        }
        return Document(
            ids, ids[positions + 1], positions, example, columns, weights, token_columns=of_tokens
        )


NEXT_TOKEN = View()


class Compared(View):
    """Answers to one prompt: `tail` is 1 for tokens beyond the length that all of them have."""

    def token_columns(self, known: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
        return {**super().token_columns(known), "tail": np.dtype(np.float32)}

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        made = super().document(examples, number, example, epoch)
        stream, supervised = examples.input, examples.supervised
        spans_of = [stream.span(each) for each in examples.documents(example)]
        # No token predicts the first of a document.
        shared = min(int(supervised[each][1:].sum()) for each in spans_of)
        tail = (np.arange(len(made.labels)) >= shared).astype(np.float32)
        return replace(made, token_columns={**made.token_columns, "tail": tail})


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


class Pairs(View):
    """An encoder-decoder: the encoder reads the input, the decoder predicts the target stream.

    start_id: what the decoder reads before the first token.
    """

    shift = 0
    has_target = True

    def __init__(self, start_id: int) -> None:
        self.start_id = start_id

    def num_labels(self, examples: "Examples") -> np.ndarray:
        return examples.streams["target"].lengths

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        target = examples.streams["target"]
        ids = np.asarray(examples.input.ids[examples.input.span(number)], np.int64)
        labels = np.asarray(target.ids[target.span(number)], np.int64)
        return self.pair(ids, labels, example, _columns(examples, number))

    def pair(
        self, ids: np.ndarray, labels: np.ndarray, example: int, columns: Mapping[str, np.ndarray]
    ) -> Document:
        """Return a document whose decoder predicts each label from those before it."""
        read = np.concatenate([[self.start_id], labels[:-1]])
        return Document(ids, labels, np.arange(len(labels)), example, columns, target=read)

    def _framed(
        self, examples: "Examples", number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a document's text, and the tokenizer's frame before and behind it."""
        part = examples.input.span(number)
        ids = np.asarray(examples.input.ids[part], np.int64)
        inner = np.flatnonzero(examples.supervised[part])
        return ids[inner], ids[: inner[0]], ids[inner[-1] + 1 :]


class Spans(Pairs):
    """Span corruption, as T5 is pretrained (Raffel et al., 2020).

    A sentinel takes the place of each hidden span, and the target holds each sentinel with its
    span. The numbers of hidden tokens and of spans follow from the length alone. sentinels int64,
    in their order. end int64: what ends the target.
    """

    def __init__(
        self, start_id: int, sentinels: np.ndarray, end: np.ndarray, density: float,
        mean_length: float, seed: int,
    ) -> None:  # fmt: skip
        super().__init__(start_id)
        self.sentinels, self.end, self.seed = sentinels, end, seed
        self.density, self.mean_length = density, mean_length

    def sizes(self, count: Any) -> tuple[Any, Any]:
        """Return how many of `count` tokens are hidden, and in how many spans."""
        hidden = np.minimum(part_of(count, self.density), np.maximum(np.asarray(count) - 1, 1))
        most = np.minimum(hidden, np.maximum(np.asarray(count) - hidden, 1))
        return hidden, np.clip(np.rint(hidden / self.mean_length).astype(np.int64), 1, most)

    def num_labels(self, examples: "Examples") -> np.ndarray:
        hidden, num_spans = self.sizes(num_supervised(examples))
        if (most := int(num_spans.max())) > len(self.sentinels):
            raise ConfigError(
                f"objective.kind: span_corruption hides {most} spans of the longest text, and the "
                f"tokenizer has {len(self.sentinels)} sentinels (<extra_id_0>, ...); lower "
                "data.max_length, or raise objective.mean_noise_span_length"
            )
        found: np.ndarray = hidden + num_spans + len(self.end)
        return found

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        text, head, tail = self._framed(examples, number)
        hidden, num_spans = map(int, self.sizes(len(text)))
        random = np.random.default_rng([self.seed, 0x59A5, epoch, number])
        gaps = _segments(hidden, num_spans, random)
        kept = _segments(len(text) - hidden + 2, num_spans + 1, random)
        kept[[0, -1]] -= 1  # a span may begin or end the text, but none touches another
        lengths = np.zeros(2 * num_spans + 1, np.int64)
        lengths[::2], lengths[1::2] = kept, gaps
        parts = np.split(text, np.cumsum(lengths)[:-1])  # kept, hidden, kept, ..., kept
        source, labels = [head, parts[0]], list[np.ndarray]()
        for sentinel, gap, stays in zip(self.sentinels, parts[1::2], parts[2::2]):
            source += [sentinel[None], stays]
            labels += [sentinel[None], gap]
        return self.pair(
            np.concatenate([*source, tail]), np.concatenate([*labels, self.end]), example,
            _columns(examples, number),
        )  # fmt: skip


def _segments(count: int, num: int, random: np.random.Generator) -> np.ndarray:
    """Return the lengths of `num` parts of `count` tokens, drawn at random; none is empty."""
    cuts = np.zeros(0, np.int64)
    if num > 1:
        cuts = np.sort(random.choice(np.arange(1, count), num - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [count]]))


class Infilling(Pairs):
    """Text infilling, as BART is pretrained (Lewis et al., 2020): one mask for each hidden span.

    Spans have lengths of a Poisson distribution; one of none inserts a mask. The target is the
    whole text. The number of hidden tokens follows from the length alone.
    """

    def __init__(
        self, start_id: int, mask_id: int, end: np.ndarray, ratio: float, mean_length: float,
        seed: int,
    ) -> None:  # fmt: skip
        super().__init__(start_id)
        self.mask_id, self.end, self.seed = mask_id, end, seed
        self.ratio, self.mean_length = ratio, mean_length

    def num_labels(self, examples: "Examples") -> np.ndarray:
        found: np.ndarray = examples.input.lengths + len(self.end)
        return found

    def document(self, examples: "Examples", number: int, example: int, epoch: int) -> Document:
        text, head, tail = self._framed(examples, number)
        hidden = int(part_of(len(text), self.ratio))
        random = np.random.default_rng([self.seed, 0x1F11, epoch, number])
        gaps = self._gaps(hidden, random)
        order = np.ones(len(text) - hidden + len(gaps), np.int64)  # what each place stands for
        places = np.sort(random.choice(len(order), len(gaps), replace=False))
        order[places] = gaps
        starts = np.cumsum(order) - order
        source = text[np.minimum(starts, len(text) - 1)]
        source[places] = self.mask_id
        return self.pair(
            np.concatenate([head, source, tail]), np.concatenate([head, text, tail, self.end]),
            example, _columns(examples, number),
        )  # fmt: skip

    def _gaps(self, hidden: int, random: np.random.Generator) -> np.ndarray:
        """Draw the lengths of spans that hide exactly this many tokens, in random order.

        No more empty ones than the others save: the input never gets longer than the text.
        """
        drawn = np.empty(0, np.int64)
        while drawn.sum() < hidden:
            more = random.poisson(self.mean_length, 2 + int(hidden / self.mean_length))
            drawn = np.concatenate([drawn, more])
        last = int(np.searchsorted(np.cumsum(drawn), hidden))
        drawn = drawn[: last + 1]
        drawn[-1] -= drawn.sum() - hidden
        empty = np.flatnonzero(drawn == 0)
        saved = hidden - (len(drawn) - len(empty))
        return random.permutation(np.delete(drawn, empty[max(saved, 0) :]))
