"""Rate any number of models from votes: Bradley-Terry with covariates, and Elo.

Bradley-Terry: the second of two models wins with probability sigmoid(b_second - b_first); a tie is
half a win of each (Bradley and Terry, 1952). Covariates such as the length of the answers enter
beside the models, sigmoid(b_second - b_first + sum_k w_k (x_second,k - x_first,k)), so that the
ratings are those of answers of equal length and style.

    found = rate(votes, covariates=("length",))
    found.models["tuned"].rating, found.models["tuned"].low, found.covariates["length"].value
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data import clusters
from finetune.errors import UserError
from finetune.evaluation.votes import Vote

POINTS = 400 / np.log(10)
"""Of Elo's scale, for a difference of 1 in b: 400 points are odds of 10 to 1."""
MIDDLE = 1_000.0
"""Mean rating of all models, as only differences have a meaning."""
MOST = 8.0
"""Coefficients from which a likelihood has no maximum: odds of 3,000 to 1 of an average model."""
RIDGE, LONGEST_STEP, MOST_STEPS = 1e-9, 2.0, 60  # of Newton's method
PRECISION = 1e-4  # of its last step, whose square is about the error that is left
DRAWS = 1_000
K = 32.0  # of Elo: points that a surprising vote moves at most
ORDERS = 100  # of the votes, over which Elo is averaged: their own order has no meaning


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval; None where the votes do not bound it."""

    value: float | None
    low: float | None
    high: float | None

    def scaled(self, middle: float, scale: float) -> "Estimate":
        values = (self.value, self.low, self.high)
        return Estimate(
            *(None if each is None else float(middle + scale * each) for each in values)
        )


UNBOUNDED = Estimate(None, None, None)


@dataclass(frozen=True)
class Model:
    """rating: Bradley-Terry's, on Elo's scale. elo: of one vote after another.

    A model that has won, or lost, all votes against the others has no rating.
    """

    rating: Estimate
    elo: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class Ratings:
    """Models by name, the best first. covariates: the coefficient of each.

    num_prompts: clusters of prompts that resemble each other, over which the bootstrap draws.
    """

    models: Mapping[str, Model]
    covariates: Mapping[str, Estimate]
    num_votes: int
    num_prompts: int


# ---------------------------------------------------------------------------------- covariates

HEADING, ITEM, BOLD = (
    re.compile(pattern, re.MULTILINE)
    for pattern in (r"^ {0,3}#{1,6} \S", r"^ *(?:[-*+]|\d{1,3}[.)]) +\S", r"\*\*[^*\n]+\*\*")
)
COVARIATES: dict[str, Callable[[str], float]] = {
    "length": lambda text: float(len(text.split())),
    "headings": lambda text: float(len(HEADING.findall(text))),
    "lists": lambda text: float(len(ITEM.findall(text))),
    "bold": lambda text: float(len(BOLD.findall(text))),
}
"""What may be held equal: words of an answer, and what its Markdown has. Compared as
(x_second - x_first) / (x_second + x_first), so twice as long is the same for any length."""


def features(votes: Sequence[Vote], names: Sequence[str]) -> np.ndarray:
    """Return the covariates of votes, float64 [votes, names], from -1 to 1."""
    values = np.array(
        [[[COVARIATES[name](text) for text in vote.answers] for name in names] for vote in votes]
    ).reshape(len(votes), len(names), 2)
    first, second = values[:, :, 0], values[:, :, 1]
    total = first + second
    return np.divide(second - first, total, out=np.zeros_like(total), where=total > 0)


# --------------------------------------------------------------------------------------- fits


def rate(votes: Sequence[Vote], covariates: Sequence[str] = (), draws: int = DRAWS) -> Ratings:
    """Return ratings with intervals of a bootstrap over clusters of prompts.

    Raises UserError for an unknown covariate, or models that no votes connect. The seed is fixed:
    the same votes give the same intervals.
    """
    if unknown := [name for name in covariates if name not in COVARIATES]:
        listed = ", ".join(COVARIATES)
        raise UserError(f"{unknown[0]!r} should be one of {listed}")
    names = sorted({name for vote in votes for name in vote.models})
    _require_connected(votes, names)
    rated = _comparable(votes, names)
    used = [vote for vote in votes if rated.issuperset(vote.models)]
    fitted: dict[str, Estimate] = {}
    others, num_prompts = dict.fromkeys(covariates, UNBOUNDED), 0
    if used:
        fitted, others, num_prompts = _bootstrap(used, sorted(rated), covariates, draws)
    results, by_elo = _results(votes), elo(votes)
    models = {
        name: Model(fitted.get(name, UNBOUNDED), by_elo[name], *results[name]) for name in names
    }
    is_rated = all(each.rating.value is not None for each in models.values())
    best = sorted(
        names, key=lambda name: -(models[name].rating.value or 0) if is_rated else -by_elo[name]
    )
    return Ratings({name: models[name] for name in best}, others, len(votes), num_prompts)


def _bootstrap(
    votes: Sequence[Vote], names: Sequence[str], covariates: Sequence[str], draws: int
) -> tuple[dict[str, Estimate], dict[str, Estimate], int]:
    """Return estimates of models and of covariates, and the number of clusters of prompts."""
    points = np.array([[vote.points] for vote in votes])
    values = np.hstack([_differences(votes, names), features(votes, covariates), points])
    # Votes that are equal in all of this count together: few lines, however many votes.
    lines, line = np.unique(values, axis=0, return_inverse=True)
    matrix, points = lines[:, :-1], lines[:, -1]

    def fit(times: np.ndarray | None, start: np.ndarray | None = None) -> np.ndarray:
        counts = np.bincount(line, times, minlength=len(lines)).astype(float)
        drawn = counts > 0
        return _fit(matrix[drawn], points[drawn], counts[drawn], len(names), start)

    groups, random = clusters_of(votes), np.random.default_rng(0)
    found, count, sampled = fit(None), int(groups.max()) + 1, []
    for _ in range(draws):
        times = np.bincount(random.integers(count, size=count), minlength=count)
        sampled.append(fit(times[groups].astype(float), found))
    estimates = [
        _estimate(value, drawn) if matrix[:, place].any() else UNBOUNDED  # as no answers differ
        for place, (value, drawn) in enumerate(zip(found, _bounded(sampled, len(found))))
    ]
    of_models = {name: each.scaled(MIDDLE, POINTS) for name, each in zip(names, estimates)}
    return of_models, dict(zip(covariates, estimates[len(names) :])), count


def _comparable(votes: Sequence[Vote], names: Sequence[str]) -> set[str]:
    """Return the most models of which each has points against the others, directly or not.

    Only among these the likelihood has a maximum (Ford, 1957): a model with all votes on one side
    would have an infinite rating.
    """
    place = {name: number for number, name in enumerate(names)}
    scores = np.eye(len(names), dtype=bool)  # [model, other]: whether it has points against it
    for vote in votes:
        first, second = (place[name] for name in vote.models)
        scores[second, first] |= vote.points > 0
        scores[first, second] |= vote.points < 1
    for middle in range(len(names)):  # Warshall's closure
        scores |= scores[:, middle : middle + 1] & scores[middle]
    mutual = scores & scores.T
    largest = mutual[int(mutual.sum(1).argmax())]
    found = {name for name, is_in in zip(names, largest) if is_in}
    return found if len(found) > 1 else set()


def _require_connected(votes: Sequence[Vote], names: Sequence[str]) -> None:
    """Raise UserError where two groups of models share no vote."""
    reached, edges = {names[0]}, {vote.models for vote in votes}
    while grown := {name for edge in edges if reached & set(edge) for name in edge} - reached:
        reached |= grown
    if apart := sorted(set(names) - reached):
        what = f"no votes compare {apart[0]!r} with {names[0]!r}, even through other models"
        raise UserError(f"{what}; add some, or rate them apart")


def _differences(votes: Sequence[Vote], names: Sequence[str]) -> np.ndarray:
    """Return [votes, models]: 1 for the second model of a vote, -1 for the first."""
    number = {name: place for place, name in enumerate(names)}
    matrix = np.zeros((len(votes), len(names)))
    for place, vote in enumerate(votes):
        matrix[place, number[vote.models[0]]] -= 1
        matrix[place, number[vote.models[1]]] += 1
    return matrix


def clusters_of(votes: Sequence[Vote]) -> np.ndarray:
    """Return the cluster of near-duplicates of each vote's prompt, as numbers from 0."""
    questions = list(dict.fromkeys(vote.question for vote in votes))
    of_questions = dict(zip(questions, clusters.of_texts(questions).tolist()))
    found: np.ndarray = np.unique(
        [of_questions[vote.question] for vote in votes], return_inverse=True
    )[1]
    return found


def _fit(
    matrix: np.ndarray, points: np.ndarray, times: np.ndarray, num_models: int,
    start: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Return the likeliest coefficients, by Newton's method; those of the models have the mean 0.

    matrix: [votes, coefficients]. points, times: [votes], what the second model got, and how often
    the vote counts. Where the likelihood has no maximum, the climb ends beyond MOST.
    """
    b = np.zeros(matrix.shape[1]) if start is None else start
    # Only differences of models count: this fixes their mean. The ridge keeps a coefficient that
    # no vote bears on at 0, and is far under any rounding that is shown.
    fixed = RIDGE * np.eye(len(b))
    fixed[:num_models, :num_models] += 1.0
    for _ in range(MOST_STEPS):
        chance = _sigmoid(matrix @ b)
        weights = times * chance * (1 - chance)
        gradient = matrix.T @ (times * (chance - points)) + fixed @ b
        step = np.linalg.solve((matrix.T * weights) @ matrix + fixed, gradient)
        b = b - step * min(1.0, LONGEST_STEP / max(np.abs(step).max(), 1e-300))
        if np.abs(step).max() < PRECISION or np.abs(b).max() > 2 * MOST:
            break
    return b


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _bounded(sampled: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Return draws as [coefficients, draws], infinite where one has no maximum.

    The others of such a draw, which it has moved with their mean, become NaN.
    """
    drawn = np.array(sampled).T.reshape(count, -1)
    is_beyond = np.abs(drawn) >= MOST
    moved = np.where(is_beyond.any(0), np.nan, drawn)
    return np.where(is_beyond, np.copysign(np.inf, drawn), moved)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    """Return a value with the percentiles of its draws; None for those that are infinite.

    Draws that are all equal, such as of votes that are all ties, say nothing of other votes.
    """
    if abs(value) >= MOST:
        return UNBOUNDED
    if np.isnan(drawn).all() or np.nanmax(drawn) - np.nanmin(drawn) < 1e-9:
        return Estimate(float(value), None, None)
    low, high = np.nanpercentile(drawn, [2.5, 97.5], method="nearest")
    bounds = (float(end) if np.isfinite(end) else None for end in (low, high))
    return Estimate(float(value), *bounds)


def _results(votes: Sequence[Vote]) -> dict[str, tuple[int, int, int]]:
    """Return wins, ties and losses of each model."""
    counts: Counter[tuple[str, str]] = Counter()
    for vote in votes:
        first, second = vote.models
        better = {"first": ("won", "lost"), "second": ("lost", "won"), "tie": ("tied", "tied")}
        counts.update(zip((first, second), better[vote.better]))
    return {
        name: (counts[name, "won"], counts[name, "tied"], counts[name, "lost"])
        for name, _ in counts
    }


# ----------------------------------------------------------------------------------------- Elo


def elo(votes: Sequence[Vote], k: float = K, orders: int = ORDERS) -> dict[str, float]:
    """Return Elo ratings: each vote moves two models by k times what surprises in it.

    The mean over random orders of the votes, with a fixed seed.
    """
    names = sorted({name for vote in votes for name in vote.models})
    number = {name: place for place, name in enumerate(names)}
    one, other = np.array([[number[name] for name in vote.models] for vote in votes]).T.copy()
    points = np.array([vote.points for vote in votes])
    random = np.random.default_rng(0)
    ratings = np.full(orders * len(names), MIDDLE)  # [orders, models], flat, as it is faster so
    start = np.arange(orders) * len(names)
    order = np.array([random.permutation(len(votes)) for _ in range(orders)])
    for turn in np.ascontiguousarray(order.T):  # the next vote of each order
        first, second = start + one.take(turn), start + other.take(turn)
        logits = (ratings.take(second) - ratings.take(first)) / POINTS
        moved = k * (points.take(turn) - _sigmoid(logits))
        ratings[second] += moved
        ratings[first] -= moved
    means = ratings.reshape(orders, len(names)).mean(0)
    return dict(zip(names, means.tolist()))
