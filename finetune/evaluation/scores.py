"""How good one answer is, from 0 to 1, and how sure a difference of means is."""

from collections.abc import Sequence

import numpy as np

from finetune import extras

FEWEST_ROWS = 30
"""Below, drawing rows again cannot show what other rows would have been: the bootstrap's intervals
are too narrow.
"""


def exact_match(answer: str, wanted: str) -> float:
    """1 if the answer is the wanted text, white space at both ends aside."""
    return float(answer.strip() == wanted.strip())


def word_accuracy(answer: str, wanted: str) -> float:
    """Part of the wanted words that stand at the same place of the answer; words too many count as
    wrong.
    """
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


SCORES = {"exact match": exact_match, "word accuracy": word_accuracy}


def paired_interval(
    before: Sequence[float], after: Sequence[float], draws: int = 10_000
) -> tuple[float, float] | None:
    """95% interval of mean(after) - mean(before) over the same rows; None for fewer than
    FEWEST_ROWS graded scores.

    Scores of 0 and 1: Tango's score interval, Wilson's for pairs, which is right for few rows and
    for none that changed. Others: the paired bootstrap, rows drawn again with replacement `draws`
    times, each with both its scores (Efron and Tibshirani, 1993); the seed is fixed, so the same
    scores give the same interval.
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
    """Score interval of (up - down) / n for paired proportions (Tango, Statistics in Medicine 17,
    1998).
    """
    extras.require("scipy", "evaluate")
    from scipy.optimize import brentq

    def distance(delta: float) -> float:
        """Of what was seen from a true difference `delta`, in standard deviations, less `z`."""
        b, c = -up - down + (2 * n - up + down) * delta, -down * delta * (1 - delta)
        falls = ((b * b - 8 * n * c) ** 0.5 - b) / (
            4 * n
        )  # the likeliest part of rows that go down, given delta
        deviation = (n * (2 * falls + delta * (1 - delta))) ** 0.5
        return abs(up - down - n * delta) / max(deviation, 1e-12) - z

    seen, edge = (up - down) / n, 1 - 1e-9
    low = -1.0 if distance(-edge) < 0 or seen <= -edge else brentq(distance, -edge, min(seen, edge))
    high = 1.0 if distance(edge) < 0 or seen >= edge else brentq(distance, max(seen, -edge), edge)
    return float(low), float(high)
