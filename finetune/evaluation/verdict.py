"""Say in one sentence whether the tuned model is better or worse than the base.

    found = verdict.of(results, smallest=5.0)
    found.kind      # "better"
    found.sentence  # "tuned is better than base: exact match 22.0% against 0.0% (...)"

Scores count that have a better and a worse end. A difference is found where its p-value, raised for
the number of scores (Holm), is below 5%. Without one, rows are too few if there are fewer than 30
(or 30 clusters), or if an effect of the smallest size that matters lies within an interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetune.evaluation import statistics
from finetune.evaluation.results import BASE, TUNED, Results
from finetune.evaluation.statistics import FEWEST_ROWS, Difference

Kind = Literal["better", "worse", "mixed", "no difference", "too few rows", "no scores"]
LEVEL = 1 - statistics.CONFIDENCE
SMALLEST = 5.0
"""Percent: points of scores in percent, and of the base's mean for others."""
MOST_NAMED = 3  # scores
Z = 1.96  # of the normal distribution, two-sided 5%


@dataclass(frozen=True)
class Finding:
    """What one score says of two models.

    before, after: means over the rows that have both. p: raised for the number of scores; None if
    unknown. smallest: the smallest effect that matters, in the unit of the score. is_share: shown
    in percent.
    """

    score: str
    before: float
    after: float
    difference: Difference
    p: float | None
    smallest: float
    higher: bool = True
    is_share: bool = True

    @property
    def kind(self) -> Kind:
        found = self.difference
        if found.num_clusters < FEWEST_ROWS or found.low is None or found.high is None:
            return "too few rows"
        if self.p is not None and self.p < LEVEL and found.mean:
            return "better" if (found.mean > 0) == self.higher else "worse"
        is_within = -self.smallest < found.low and found.high < self.smallest
        return "no difference" if is_within else "too few rows"

    @property
    def is_small(self) -> bool:
        """Whether the whole interval lies below the smallest effect that matters."""
        low, high = self.difference.low, self.difference.high
        return low is not None and high is not None and max(-low, high) < self.smallest

    @property
    def rows_needed(self) -> int | None:
        """Return how many rows like these would tell; None if that is unknown.

        Enough to find `effect`; and where less was seen, enough for an interval within the
        smallest effect: n (z standard error / (smallest - |mean|))^2.
        """
        found = self.difference
        needed = found.rows_for(self.effect)
        if needed is None or abs(found.mean) >= self.smallest:
            return needed
        left = max(self.smallest - abs(found.mean), self.smallest / 4)
        return max(needed, round(found.num_rows * (Z * found.standard_error / left) ** 2))

    @property
    def effect(self) -> float:
        """The difference that was seen, or the smallest that matters if that is larger."""
        return max(abs(self.difference.mean), self.smallest)

    def shown(self, value: float, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{100 * value:{sign}.1f}" if self.is_share else f"{value:{sign}.4g}"

    @property
    def text(self) -> str:
        """Return such as `exact match 22.0% against 0.0% (+22.0, 95% interval +15.0 to +31.1)`."""
        unit = "%" if self.is_share else ""
        found = self.difference
        within = ""
        if found.low is not None and found.high is not None:
            low, high = (self.shown(value, signed=True) for value in (found.low, found.high))
            within = f", 95% interval {low} to {high}"
        means = f"{self.shown(self.after)}{unit} against {self.shown(self.before)}{unit}"
        return f"{self.score} {means} ({self.shown(found.mean, signed=True)}{within})"


@dataclass(frozen=True)
class Verdict:
    """kind: see `of`. findings: of each score that counts, in the order of the scores."""

    kind: Kind
    sentence: str
    findings: tuple[Finding, ...] = ()


def findings(
    results: Results, before: str = BASE, after: str = TUNED, smallest: float = SMALLEST
) -> list[Finding]:
    """Return what each score says that has a better and a worse end, and rows of both models."""
    found: list[tuple[str, float, Difference]] = []
    for score, scorer in results.scorers.items():
        ones, others, clusters = results.paired(score, before, after)
        if scorer.higher is not None and ones:
            difference = statistics.difference(ones, others, clusters)
            found.append((score, sum(ones) / len(ones), difference))
    raised = iter(statistics.holm([each.p for *_, each in found if each.p is not None]))
    made = []
    for score, mean, difference in found:
        scorer = results.scorers[score]
        unit = 1.0 if scorer.is_share else abs(mean)
        p = None if difference.p is None else next(raised)
        made.append(
            Finding(
                score, mean, mean + difference.mean, difference, p, smallest / 100 * unit,
                bool(scorer.higher), scorer.is_share,
            )
        )  # fmt: skip
    return made


def of(
    results: Results, before: str = BASE, after: str = TUNED, smallest: float = SMALLEST
) -> Verdict:
    """Return the verdict on `after` against `before`; smallest: in percent."""
    return conclude(findings(results, before, after, smallest), before, after)


def conclude(found: Sequence[Finding], before: str = BASE, after: str = TUNED) -> Verdict:
    """Return the verdict that follows from what each score says."""
    if not found:
        return Verdict("no scores", f"no score says whether {after} is better than {before}")
    better, worse, same = (
        [each for each in found if each.kind == kind]
        for kind in ("better", "worse", "no difference")
    )
    kind: Kind
    if better and worse:
        kind = "mixed"
        sentence = (
            f"{after} is better than {before} in {_listed(better)}, and worse in {_listed(worse)}"
        )
    elif better or worse:
        kind = "better" if better else "worse"
        sentence = f"{after} is {kind} than {before}: {_listed(better or worse)}"
        if all(each.is_small for each in better or worse):
            sentence += "; the difference is below --smallest-effect"
    elif len(same) == len(found):
        kind = "no difference"
        sentence = f"no difference found between {after} and {before}: {_listed(same)}"
    else:
        kind, sentence = "too few rows", _too_few(found, before, after)
    return Verdict(kind, sentence, tuple(found))


def _listed(found: Sequence[Finding]) -> str:
    texts = [each.text for each in found[:MOST_NAMED]]
    others = len(found) - len(texts)
    return "; ".join(texts) + (f"; and {others} more" if others else "")


def _too_few(found: Sequence[Finding], before: str, after: str) -> str:
    """Say how many rows there are, and how many would do for the score that needs the fewest."""
    unclear = [each for each in found if each.kind == "too few rows"]
    first = unclear[0].difference
    rows = f"{first.num_rows:,} {'row' if first.num_rows == 1 else 'rows'}"
    if first.num_clusters < first.num_rows:
        noun = "cluster" if first.num_clusters == 1 else "clusters"
        rows += f" in {first.num_clusters:,} {noun}"
    sentence = f"too few rows to tell whether {after} is better than {before}: {rows}"
    known = [(each.rows_needed, each) for each in unclear]
    needed = [(count, each) for count, each in known if count is not None]
    count, each = min(needed, key=lambda pair: pair[0], default=(FEWEST_ROWS, unclear[0]))
    if count <= FEWEST_ROWS:
        return f"{sentence}; at least {FEWEST_ROWS} are needed"
    effect = each.shown(each.effect) + (" points" if each.is_share else "")
    return f"{sentence}; about {count:,} would show whether {each.score} differs by {effect}"
