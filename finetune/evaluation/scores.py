"""How good one answer is, from 0 to 1, and how sure a difference of means is."""

from collections.abc import Sequence

import numpy as np


def exact_match(answer: str, wanted: str) -> float:
    """1 if the answer is the wanted text, white space at both ends aside."""
    return float(answer.strip() == wanted.strip())


def word_accuracy(answer: str, wanted: str) -> float:
    """Part of the wanted words that stand at the same place of the answer; words too many count as wrong."""
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


SCORES = {"exact match": exact_match, "word accuracy": word_accuracy}


def paired_interval(before: Sequence[float], after: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95% interval of mean(after) - mean(before) over the same rows, by the paired bootstrap.

    Rows are drawn again with replacement `draws` times, each with both its scores (Efron and
    Tibshirani, 1993); the seed is fixed, so the same scores give the same interval.
    """
    gain = np.asarray(after, float) - np.asarray(before, float)
    random = np.random.default_rng(0)
    means = [gain[random.integers(len(gain), size=len(gain))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
