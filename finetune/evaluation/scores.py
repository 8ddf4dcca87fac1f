"""Score answers from 0 to 1, and give the interval of a difference of means."""

from collections.abc import Sequence

import numpy as np

from finetune import extras

FEWEST_ROWS = 30
"""Of fewer rows, the bootstrap's intervals are too narrow: drawing cannot show unseen rows."""


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if the answer is the wanted text, but for white space at both ends; else 0."""
    return float(answer.strip() == wanted.strip())


def word_accuracy(answer: str, wanted: str) -> float:
    """Return the share of the wanted words that stand at the same place of the answer.

    Additional words of the answer count as wrong.
    """
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


SCORES = {"exact match": exact_match, "word accuracy": word_accuracy}


def paired_interval(
    before: Sequence[float], after: Sequence[float], draws: int = 10_000
) -> tuple[float, float] | None:
    """Return the 95% interval of mean(after) - mean(before) over the same rows.

    None for fewer than FEWEST_ROWS graded scores. Scores of 0 and 1: Tango's score interval,
    Wilson's for pairs, which is right for few rows and if none changed. Others: the paired
    bootstrap, which draws rows with replacement `draws` times, each with both its scores (Efron and
    Tibshirani, 1993); the seed is fixed, so the same scores give the same interval.
    """
    gain = np.asarray(after, float) - np.asarray(before, float)
    if set(before) | set(after) <= {0.0, 1.0}:
        return _tango(int((gain > 0).sum()), int((gain < 0).sum()), len(gain))
    if len(gain) < FEWEST_ROWS:
        return None
    random = np.random.default_rng(0)
    means = [gain[random.integers(len(gain), size=len(gain))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _tango(up: int, down: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Tango's score interval of (up - down) / n (Statistics in Medicine 17, 1998)."""
    extras.require("scipy", "evaluate")
    from scipy.optimize import brentq

    def distance(delta: float) -> float:
        """Return how far a true difference `delta` is, in standard deviations, less `z`."""
        b, c = -up - down + (2 * n - up + down) * delta, -down * delta * (1 - delta)
        # The likeliest share of rows that go down, given delta.
        falls = ((b * b - 8 * n * c) ** 0.5 - b) / (4 * n)
        deviation = (n * (2 * falls + delta * (1 - delta))) ** 0.5
        return abs(up - down - n * delta) / max(deviation, 1e-12) - z

    seen, edge = (up - down) / n, 1 - 1e-9
    low = -1.0 if distance(-edge) < 0 or seen <= -edge else brentq(distance, -edge, min(seen, edge))
    high = 1.0 if distance(edge) < 0 or seen >= edge else brentq(distance, max(seen, -edge), edge)
    return float(low), float(high)
