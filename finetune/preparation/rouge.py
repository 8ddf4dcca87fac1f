"""ROUGE-L between a text and many: the F-measure of their longest common subsequence of words.

    known = Texts(0.7)
    known.add("Name three colours.")
    known.resembled("Name three other colours.")  # 0: it is over 0.7

Words are those of near-duplicates: without case and punctuation, in any script. Of thousands of
texts few share enough words for the score to be over the threshold, whatever their order; only
those are compared exactly.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from finetune.data import clusters


class Texts:
    """Texts that are known; a new one may resemble one of them."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._words: list[list[bytes]] = []
        self._lengths = array("q")
        # (word, how many times it came before in its text) -> the texts that have it.
        self._having: dict[tuple[bytes, int], array[int]] = defaultdict(lambda: array("q"))

    def __len__(self) -> int:
        return len(self._words)

    def add(self, text: str) -> None:
        words = clusters.words(text)
        for word in _numbered(words):
            self._having[word].append(len(self._words))
        self._words.append(words)
        self._lengths.append(len(words))

    def resembled(self, text: str) -> int | None:
        """Return the first known text whose score is over the threshold, or None."""
        words = clusters.words(text)
        having = [self._having[word] for word in _numbered(words) if word in self._having]
        if not having:
            return None
        texts = np.concatenate([np.array(each, np.int64) for each in having])
        shared = np.bincount(texts, minlength=len(self))
        # Words in common, in any order, are at least as many as in order.
        possible = _score(shared, np.array(self._lengths, np.int64), len(words)) > self.threshold
        for number in np.flatnonzero(possible).tolist():
            if rouge_l(words, self._words[number]) > self.threshold:
                return int(number)
        return None


def rouge_l(one: Sequence[bytes], other: Sequence[bytes]) -> float:
    """Return the F-measure of ROUGE-L: twice the common words in order by the words of both."""
    return float(_score(_common(one, other), max(1, len(one)), len(other)))


def _score(common: "int | np.ndarray", one: "int | np.ndarray", other: int) -> "float | np.ndarray":
    return 2 * common / (one + other)


def _numbered(words: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Return each word with its number among equal ones, so that a set can hold it twice."""
    counts: Counter[bytes] = Counter()
    numbered = []
    for word in words:
        numbered.append((word, counts[word]))
        counts[word] += 1
    return numbered


def _common(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Return the length of the longest common subsequence.

    A row of the usual table is the bits of one integer, as Hyyrö (2004) has it: a bit is 0 where
    the subsequence grows.
    """
    places: dict[bytes, int] = defaultdict(int)
    for number, word in enumerate(one):
        places[word] |= 1 << number
    whole = (1 << len(one)) - 1
    row = whole
    for word in other:
        matched = row & places[word]
        row = ((row + matched) | (row - matched)) & whole
    return len(one) - row.bit_count()
