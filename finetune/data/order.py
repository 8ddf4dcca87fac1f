"""The order of a run: a pure function (seed, epoch, lengths) -> order of sequences.

A position in it is an integer, so resuming is arithmetic.
"""

from collections.abc import Iterator

import numpy as np

from finetune.data.examples import Examples
from finetune.data.packing import pack
from finetune.data.views import Document

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

    starts_early = False
    is_whole = True
    """Whether all sequences are there: shards of a stream may still be made."""

    @property
    def num_known(self) -> int:
        """Return how many sequences are there."""
        return len(self)

    def holds(self, position: int) -> bool:
        """Return whether an epoch reaches a position."""
        return position < len(self)

    def progress(self) -> float:
        """Return what does not change, as nothing is made any more."""
        return 0.0

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def order(self, seed: int, epoch: int, batch_size: int, group_by_length: bool) -> np.ndarray:
        """Order the sequences of one epoch; see `order`."""
        return order(seed, epoch, self.lengths, batch_size, group_by_length)

    def counts(self, sequences: np.ndarray) -> dict[str, int]:
        """Return the supervised tokens, documents, examples and input tokens of these sequences."""
        return self.examples.counts(np.concatenate([self.members(each) for each in sequences]))

    def all_counts(self) -> dict[str, int]:
        """Return the same of all sequences."""
        return self.examples.counts(np.arange(len(self.examples)))

    def largest(self, count: int, padded: bool) -> np.ndarray:
        """Return the largest sequences; `padded`: each document is a row as long as the longest."""
        sizes = self.lengths
        if padded:
            sizes = self.examples.most_tokens() * self.examples.num_documents
            if self.examples.view.has_target:
                sizes = sizes + self.examples.num_supervised
        return np.argsort(-sizes, kind="stable")[:count]

    def documents(self, sequence: int, epoch: int = 0) -> list[Document]:
        """Return every document in a sequence, as the model gets it in an epoch."""
        members = self.members(sequence)
        return [each for example in members for each in self._of_example(example, epoch)]

    def _of_example(self, example: int, epoch: int) -> Iterator[Document]:
        examples = self.examples
        for number in examples.documents(example):
            yield examples.view.document(examples, number, int(example), epoch)


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
