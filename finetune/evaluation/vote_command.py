"""Rate models by votes of people and of judges: finetune votes."""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from finetune import page
from finetune.config import paths
from finetune.evaluation import agreement, ratings, votes
from finetune.evaluation.ratings import COVARIATES, Estimate
from finetune.evaluation.votes import MODEL, PERSON, Pair, Vote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "files of votes: of the page that evaluate --votes-page writes, of evaluate --pairwise"
    add("files", nargs="+", type=paths.argument, metavar="VOTES", help=what)
    what = (
        "rate as if answers were equal in these, so that a model does not win by them; one or "
        f"several of {', '.join(COVARIATES)}, as length,lists"
    )
    add("--equal", type=_covariates, default=(), metavar="NAMES", help=what)
    what = (
        "also write the answers that people prefer as preference rows, chosen and rejected, which "
        "training reads with data.format: preference; votes of models only where no people vote"
    )
    add("--preferences", type=paths.argument, metavar="FILE", help=what)


def _covariates(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in COVARIATES]:
        listed = ", ".join(COVARIATES)
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} should be one of {listed}")
    return names


def main(arguments: argparse.Namespace) -> None:
    """Print ratings by people and by each judge, and how well they agree."""
    found = votes.read(arguments.files)
    kept = votes.latest(found)
    if again := len(found) - len(kept):
        what = "repeat an earlier one of the same rater; the last counts"
        print(f"note: {again:,} votes {what}", file=sys.stderr)
    # Others wrote these files: a terminal would obey control characters in their names.
    print(page.plain("\n".join(report(kept, arguments.equal))))
    if arguments.preferences:
        of_people = [vote for vote in kept if vote.by == PERSON]
        made = votes.write_preferences(
            Path(arguments.preferences), of_people or kept, "--preferences"
        )
        print(
            f"\n{arguments.preferences}: {len(made.rows):,} preference rows; without a majority "
            f"{made.num_ties:,}, of equal or empty answers {made.num_unfit:,}"
        )


def report(kept: Sequence[Vote], covariates: Sequence[str] = ()) -> list[str]:
    """Return the ratings by people, then those by each judge, and what both say together."""
    people = [vote for vote in kept if vote.by == PERSON]
    judges = sorted({vote.rater for vote in kept if vote.by == MODEL})
    lines = []
    if people:
        count = len({vote.rater for vote in people})
        by = "1 person" if count == 1 else f"{count:,} people"
        lines += _ratings(people, covariates, by)
        lines += [*_among_people(people), *_sides(people)]
    for rater in judges:
        of_judge = [vote for vote in kept if vote.by == MODEL and vote.rater == rater]
        lines += ["", *_ratings(of_judge, covariates, rater)]
        if people:
            lines += _together(people, of_judge)
    return lines[1:] if lines and not lines[0] else lines


# ---------------------------------------------------------------------------------------- parts


def _ratings(given: Sequence[Vote], covariates: Sequence[str], by: str) -> list[str]:
    found = ratings.rate(given, covariates)
    left = max([8, *(len(name) + 2 for name in found.models)])
    lines = [
        f"{len(given):,} votes by {by}, on {found.num_prompts:,} prompts that do not resemble "
        "each other",
        f"{'':<{left}} rating   95% interval       Elo{'won':>9}{'tied':>9}{'lost':>9}",
    ]
    for name, model in found.models.items():
        shown = "none" if model.rating.value is None else f"{model.rating.value:.0f}"
        within = _interval(model.rating, ".0f")
        counts = f"{model.elo:>6.0f}{model.wins:>9,}{model.ties:>9,}{model.losses:>9,}"
        lines.append(f"{name:<{left}}{shown:>7}   {within:<16}{counts}")
    if any(model.rating.value is None for model in found.models.values()):
        lines.append("a model without a rating has won, or lost, all its votes; collect more")
    for name, weight in found.covariates.items():
        lines.append(_weight(name, weight))
    return lines


def _interval(estimate: Estimate, form: str) -> str:
    if estimate.value is None:
        return ""
    low, high = (
        "open" if end is None else f"{end:{form}}" for end in (estimate.low, estimate.high)
    )
    return f"{low} to {high}"


def _weight(name: str, weight: Estimate) -> str:
    """Say what a covariate does, for an answer with twice as much of it as the other."""
    if weight.value is None:
        return f"{name}: the votes do not say what it does"
    share = 1 / (1 + np.exp(-weight.value / 3))  # (2 - 1) / (2 + 1)
    return (
        f"{name}: weight {weight.value:+.2f} ({_interval(weight, '+.2f')}); of two equal models, "
        f"an answer with twice as much gets {share:.0%} of the points"
    )


def _among_people(people: Sequence[Vote]) -> Iterator[str]:
    """Say how well people agree on the pairs that several have voted on."""
    given: dict[Pair, dict[str, float]] = defaultdict(dict)
    for vote in people:
        given[vote.pair][vote.rater] = _points(vote)
    found = agreement.alpha_of([[*each.values()] for each in given.values()], "ordinal")
    if found is not None:
        yield f"people agree by Krippendorff's alpha {found:.2f} (1: always; 0: as by chance)"


def _points(vote: Vote) -> float:
    """Return the points of the model whose name comes last, so that sides do not count."""
    return vote.points_of(vote.pair[2][0])


def _sides(people: Sequence[Vote]) -> Iterator[str]:
    counts = Counter(vote.better for vote in people)
    decided = counts["first"] + counts["second"]
    if decided:
        yield f"people prefer the answer on side A in {counts['first'] / decided:.0%} of choices"


def _together(people: Sequence[Vote], of_judge: Sequence[Vote]) -> Iterator[str]:
    """Say how well a judge agrees with people, and what its votes are worth, corrected by theirs.

    People voted on the first rows of a page, which are a random sample of all.
    """
    by_people: dict[Pair, list[float]] = defaultdict(list)
    for vote in people:
        by_people[vote.pair].append(_points(vote))
    both = [vote for vote in of_judge if vote.pair in by_people]
    if not both:
        yield "people and this judge have voted on no common pair"
        return
    choices = [float(np.sign(np.mean(by_people[vote.pair]) - 0.5)) for vote in both]
    found = agreement.kappa(choices, [float(np.sign(_points(vote) - 0.5)) for vote in both])
    same = np.mean([one == np.sign(_points(vote) - 0.5) for one, vote in zip(choices, both)])
    kappa = "" if found is None else f", Cohen's kappa {found:.2f}"
    yield f"agrees with people on {same:.0%} of {len(both):,} pairs{kappa}"
    models = sorted({name for vote in of_judge for name in vote.models})
    for pair in combinations(models, 2):
        compared = [vote for vote in of_judge if {*vote.models} == {*pair}]
        labels = [
            float(np.mean(by_people[vote.pair])) if vote.pair in by_people else None
            for vote in compared
        ]
        if any(label is not None for label in labels):
            yield _corrected(pair, compared, labels)


def _corrected(
    pair: tuple[str, str], compared: Sequence[Vote], labels: Sequence[float | None]
) -> str:
    clusters = ratings.clusters_of(compared).tolist()
    found = agreement.prediction_powered([_points(vote) for vote in compared], labels, clusters)
    within = "too few pairs with votes of people for an interval"
    if found.low is not None and found.high is not None:
        within = f"{max(found.low, 0):.1%} to {min(found.high, 1):.1%}"
    return (
        f"{pair[1]} gets {found.mean:.1%} of the points against {pair[0]} ({within}), by this "
        f"judge corrected by people; by it alone {found.by_judge:.1%}, by the "
        f"{found.num_labelled:,} pairs of people alone {found.by_people:.1%}"
    )
