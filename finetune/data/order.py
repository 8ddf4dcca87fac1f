"""The order of a run: a pure function (seed, epoch, lengths) -> order of sequences.

A position in it is an integer, so resuming is arithmetic.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from finetune.data.examples import Examples
from finetune.data.packing import pack
from finetune.data.tokens import predicting

# Steps whose sequences are sorted by length together; more would wear the order's randomness down
GROUP_STEPS = 50


class Sequences:
    """Examples, alone or packed: what the order orders and batch sizes count."""

    def __init__(self, examples: Examples, packing: bool, max_length: int, seed: int) -> None:
        self.examples = examples
        self._packs = pack(examples.lengths, max_length, seed) if packing else None
        self.lengths = lengths = examples.lengths
        if self._packs:
            self.lengths = np.array([lengths[members].sum() for members in self._packs])

    def __len__(self) -> int:
        return len(self.lengths)

    def members(self, sequence: int) -> np.ndarray:
        """Return the examples of one sequence."""
        return self._packs[sequence] if self._packs else np.array([sequence])

    def documents(self, sequence: int) -> list["Document"]:
        """Return every document in a sequence."""
        return [each for example in self.members(sequence) for each in self._of_example(example)]

    def _of_example(self, example: int) -> Iterator["Document"]:
        examples, stream = self.examples, self.examples.input
        for number in examples.documents(example):
            part = stream.span(number)
            ids = np.asarray(stream.ids[part], np.int64)
            columns = {name: values[number] for name, values in examples.columns.items()}
            predicted = predicting(examples.supervised[part])
            weights = None
            if examples.weights is not None:
                weights = np.asarray(examples.weights[part])[predicted + 1]
            yield Document(ids, predicted, int(example), columns, weights)


@dataclass(frozen=True)
class Document:
    """ids int64 [T]; predicted int64 [S]: places whose next token is supervised; its example.

    columns: its numbers by name. weights: float32 [S], where rows give some.
    """

    ids: np.ndarray
    predicted: np.ndarray
    example: int
    columns: Mapping[str, np.ndarray]
    weights: np.ndarray | None = None


def order(
    seed: int, epoch: int, lengths: np.ndarray, batch_size: int, group_by_length: bool
) -> np.ndarray:
    """Order the sequences of one epoch, int64 [sequences]: every one exactly once.

    With `group_by_length`, each window of GROUP_STEPS steps is sorted by length and cut into
    steps, whose order is random again; a last incomplete step stays last.
    """
    random = np.random.default_rng([seed, epoch])
    sequences = random.permutation(len(lengths))
    if not group_by_length:
        return sequences
    whole = len(sequences) - len(sequences) % batch_size
    steps: list[np.ndarray] = []
    for start in range(0, whole, batch_size * GROUP_STEPS):
        window = sequences[start : min(start + batch_size * GROUP_STEPS, whole)]
        window = window[np.argsort(-lengths[window], kind="stable")]
        steps += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return np.concatenate([*(steps[i] for i in random.permutation(len(steps))), sequences[whole:]])
