"""Whether probabilities mean what they say: the share that comes true beside them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Bin:
    """Forecasts between two probabilities: their number, their mean, and the share that is true."""

    low: float
    high: float
    count: int
    expected: float
    true: float


@dataclass(frozen=True)
class Calibration:
    """ece: the mean distance of bins, by their counts (Naeini et al., 2015). brier: mean square."""

    bins: tuple[Bin, ...]
    ece: float
    brier: float


def of(
    probabilities: ArrayLike, outcomes: ArrayLike, low: float = 0.0, count: int = 5
) -> Calibration:
    """Compare probabilities from `low` to 1 with outcomes, in `count` bins of one width."""
    expected, true = np.asarray(probabilities, float), np.asarray(outcomes, float)
    edges = np.linspace(low, 1, count + 1)
    number = np.clip(np.searchsorted(edges, expected, side="right") - 1, 0, count - 1)
    bins = tuple(_bins(edges, number, expected, true))
    distance = sum(each.count * abs(each.expected - each.true) for each in bins)
    return Calibration(bins, distance / len(true), float(((expected - true) ** 2).mean()))


def _bins(
    edges: np.ndarray, number: np.ndarray, expected: np.ndarray, true: np.ndarray
) -> Iterator[Bin]:
    for each, (low, high) in enumerate(zip(edges[:-1], edges[1:])):
        inside = number == each
        if count := int(inside.sum()):
            means = float(expected[inside].mean()), float(true[inside].mean())
            yield Bin(float(low), float(high), count, *means)


def table(found: Calibration, what: str) -> list[str]:
    """Return the bins as lines. `what`: what the probabilities are of."""
    lines = [f"{what:<24}{'number':>8}{'expected':>10}{'true':>8}"]
    for each in found.bins:
        between = f"{100 * each.low:.0f}% to {100 * each.high:.0f}%"
        lines.append(
            f"  {between:<22}{each.count:>8,}{100 * each.expected:>9.1f}%{100 * each.true:>7.1f}%"
        )
    return [
        *lines,
        f"calibration error (ECE) {100 * found.ece:.1f} points, Brier {found.brier:.4f}",
    ]
