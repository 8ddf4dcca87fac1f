"""Whether raters agree, and what a few labels of people make of the scores of a judge.

    kappa(["a", "tie"], ["a", "b"])              # two raters of the same answers
    alpha([[5, 4, None], [5, 3, 2]], "ordinal")  # any number of raters, with gaps
    prediction_powered(scores, labels)           # a mean of what people would say, and its interval

A judge that agrees with people is not thereby right about each model: its errors may favour one.
The prediction-powered interval measures this error on the labelled rows and corrects for it, so it
holds for any judge; a good judge makes it narrow.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finetune import extras
from finetune.errors import UserError
from finetune.evaluation.statistics import CONFIDENCE, FEWEST_ROWS

Scale = Literal["nominal", "ordinal", "interval"]


def kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Return Cohen's kappa of two raters: (agreement - chance) / (1 - chance) (Cohen, 1960).

    None where both give everything the same label, as chance alone then agrees.
    """
    if len(first) != len(second) or not len(first):
        raise ValueError("kappa takes the labels of two raters for the same answers")
    agreed = sum(one == other for one, other in zip(first, second)) / len(first)
    chance = (
        sum(
            sum(each == label for each in first) * sum(each == label for each in second)
            for label in set(first)
        )
        / len(first) ** 2
    )
    return None if chance == 1 else (agreed - chance) / (1 - chance)


def alpha(ratings: Sequence[Sequence[float | None]], scale: Scale = "nominal") -> float | None:
    """Return Krippendorff's alpha: 1 - observed / expected disagreement (Krippendorff, 2011).

    ratings: [raters, answers], None for a gap; answers with one rating do not count. scale: how two
    values differ; nominal: at all; ordinal: by the number of ratings between them; interval: by the
    square of their distance. None where fewer than two values can be compared, or all are equal.
    """
    return alpha_of(
        ([value for value in column if value is not None] for column in zip(*ratings)), scale
    )


def alpha_of(answers: Iterable[Sequence[float]], scale: Scale = "nominal") -> float | None:
    """Return the same of the ratings of each answer, in any order."""
    columns = [column for column in answers if len(column) > 1]
    values = sorted({value for column in columns for value in column})
    number = {value: place for place, value in enumerate(values)}
    pairs = np.zeros((len(values), len(values)))  # of ratings of the same answer, each way
    # Answers that were rated alike count together: few, where values are few.
    alike = Counter(tuple(sorted(column)) for column in columns)
    for column, times in alike.items():
        counts = np.bincount([number[value] for value in column], minlength=len(values))
        pairs += times * (np.outer(counts, counts) - np.diag(counts)) / (len(column) - 1)
    if len(values) < 2:
        return None
    totals = pairs.sum(0)
    chance = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    distance = _distances(np.array(values), totals, scale)
    return float(1 - (pairs * distance).sum() / (chance * distance).sum())


def _distances(values: np.ndarray, totals: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the squared distances of values, [values, values]."""
    if scale == "nominal":
        return (values[:, None] != values).astype(float)
    at = values.astype(float)
    if scale == "ordinal":
        # From the middle of one value's ratings to the middle of the other's.
        at = np.cumsum(totals) - totals / 2
    return (at[:, None] - at) ** 2


# ------------------------------------------------------------------- prediction-powered intervals


@dataclass(frozen=True)
class Corrected:
    """The mean that people would give all rows, from a judge's scores and a few labels.

    low, high: the 95% interval; None for fewer than FEWEST_ROWS labelled rows or clusters of them.
    weight: of the judge's scores; 0 where they do not tell of the labels, and 1 of a good judge.
    by_people: the mean of the labelled rows alone. by_judge: the mean of all the judge's scores.
    """

    mean: float
    low: float | None
    high: float | None
    weight: float
    by_people: float
    by_judge: float
    num_labelled: int
    num_rows: int


def prediction_powered(
    scores: Sequence[float], labels: Sequence[float | None],
    clusters: Sequence[int] | None = None, weight: float | None = None,
) -> Corrected:  # fmt: skip
    """Return the mean label of all rows, with its interval (Angelopoulos et al., 2023).

    scores: of the judge, or differences of its scores, [rows]. labels: the same of people; None
    where a row has none. Labelled rows must be drawn at random. With n labelled and N other rows,

        mean = weight mean_N(score) + mean_n(label - weight score)

    weight: None chooses the one with the shortest interval, cov(label, score) / (var(score)
    (1 + n / N)), from 0 to 1 (PPI++, 2024); 1 is the first form. The standard error is clustered,
    and t has the degrees of freedom of the labelled clusters less 2, as they also give the weight.
    """
    extras.require("scipy", "the interval of a judge")
    from scipy.stats import t

    judged = np.asarray(scores, float)
    is_labelled = np.array([label is not None for label in labels])
    people = np.array([label for label in labels if label is not None], float)
    n, others = len(people), int((~is_labelled).sum())
    if not n:
        raise UserError("the judge's scores have no labels of people to be corrected with")
    if weight is None:
        weight = _best_weight(people, judged[is_labelled], judged, others)
    of_rest = judged[~is_labelled] if others else judged
    # What each row adds to the mean, less its expectation.
    parts = np.zeros(len(judged))
    rest = people - weight * judged[is_labelled]
    parts[is_labelled] = (rest - rest.mean()) / n
    if others:
        parts[~is_labelled] = weight * (of_rest - of_rest.mean()) / others
    else:  # every row is labelled: people alone
        weight, parts[is_labelled] = 0.0, (people - people.mean()) / n
        rest = people
    groups = np.arange(len(judged)) if clusters is None else np.asarray(clusters)
    mean = float(rest.mean() + weight * of_rest.mean())
    freedom = len(np.unique(groups[is_labelled])) - 2
    low = high = None
    if freedom + 2 >= FEWEST_ROWS:
        reach = _error(parts, groups, is_labelled) * t.ppf((1 + CONFIDENCE) / 2, freedom)
        low, high = float(mean - reach), float(mean + reach)
    return Corrected(
        mean, low, high, float(weight), float(people.mean()), float(judged.mean()), n, len(judged)
    )


def _best_weight(
    people: np.ndarray, judged: np.ndarray, everywhere: np.ndarray, others: int
) -> float:
    """Return the weight with the shortest interval. judged: the scores of labelled rows."""
    variance = float(everywhere.var())
    if not others or len(people) < 2 or variance == 0:
        return 0.0
    shared = float(np.cov(people, judged)[0, 1])
    return float(np.clip(shared / (variance * (1 + len(people) / others)), 0, 1))


def _error(parts: np.ndarray, groups: np.ndarray, is_labelled: np.ndarray) -> float:
    """Return the standard error of a sum of parts, whose clusters are independent.

    C / (C - 2) with C labelled clusters, from which most of the variance comes, and which give both
    the mean and the weight.
    """
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], parts)
    count = len(np.unique(groups[is_labelled]))
    return float(np.sqrt(count / (count - 2) * (sums**2).sum()))
