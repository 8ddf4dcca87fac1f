"""The order of an epoch that does not fit into memory: shuffled inside windows of whole shards.

It is a pure function (seed, epoch, sizes of the windows, position) -> sequence, so that a run
resumes anywhere by arithmetic, and any number of processes makes the same steps. Memory grows with
the number of windows, never with that of sequences.
"""

from collections.abc import Callable, Sequence

import numpy as np

from finetune.data.permutation import Permutation

# What a key stands for, so that the order of windows tells nothing of the order inside them.
OF_WINDOWS, INSIDE = 1, 2


def spans(sizes: Sequence[int], most: int | None) -> list[tuple[int, int]]:
    """Group consecutive shards into windows: (first shard, the one behind the last) of each.

    sizes: bytes of the shards. A window has at most `most` bytes, or is one shard; None: one window
    holds all. Where a window ends depends only on the shards before it and the one behind it.
    """
    found: list[tuple[int, int]] = []
    begin, held = 0, 0
    for number, size in enumerate(sizes):
        if most is not None and number > begin and held + size > most:
            found.append((begin, number))
            begin, held = number, 0
        held += size
    return [*found, (begin, len(sizes))] if len(sizes) > begin else found


class WindowedOrder:
    """The order of the sequences of one epoch: slices of it are computed when they are read."""

    def __init__(
        self, sizes: Sequence[int], seed: int, epoch: int,
        entered: Callable[[list[int]], None] = lambda windows: None,
    ) -> None:  # fmt: skip
        """`sizes`: the sequences of each window. `entered`: called with the windows of a slice that
        is read, or with its only one and that behind it.

        Windows of epoch 0 come in their own order, so that training can start before the last one
        is there; those of later epochs are shuffled.
        """
        counted = np.asarray(sizes, np.int64)
        self._seed, self._epoch, self._sizes, self._entered = seed, epoch, counted, entered
        self._first = np.cumsum(counted) - counted  # the number of each window's first sequence
        self.windows = np.arange(len(counted))
        if epoch:
            self.windows = Permutation(len(counted), seed, epoch, OF_WINDOWS)(self.windows)
        self._ends = np.cumsum(counted[self.windows])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the sequences at these positions, int64."""
        positions = np.arange(*part.indices(len(self)))
        if len(positions):
            first, last = self.turn(positions[[0, -1]])
            self._entered(self.windows[first : max(first + 2, last + 1)].tolist())
        return self.at(positions)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the sequences at any positions of the epoch, int64."""
        turns = self.turn(positions)
        found = np.empty(len(positions), np.int64)
        for turn in np.unique(turns):
            window, here = self.windows[turn], turns == turn
            begin = self._ends[turn] - self._sizes[window]
            shuffle = Permutation(int(self._sizes[window]), self._seed, self._epoch, INSIDE, window)
            found[here] = self._first[window] + shuffle(positions[here] - begin)
        return found

    def turn(self, positions: np.ndarray) -> np.ndarray:
        """Return the window of each position, counted as they come in this epoch, int64."""
        return np.searchsorted(self._ends, positions, side="right")
