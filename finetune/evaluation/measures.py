"""Measures of several models on the same items, what changed, and the table that shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from finetune.evaluation import statistics
from finetune.evaluation.results_file import Change, Mean, MeasureFacts
from finetune.evaluation.statistics import Difference


@dataclass(frozen=True)
class Measure:
    """A number for each item of a task and each model; the first model is the one to compare with.

    values: model -> [items]. clusters: [items], of items that resemble each other. is_share: values
    are from 0 to 1, and shown in percent. chance: what guessing gives. higher: whether more is
    better.
    """

    task: str
    name: str
    values: Mapping[str, Sequence[float]]
    clusters: Sequence[int] | None = None
    is_share: bool = True
    chance: float | None = None
    higher: bool = True

    def mean(self, model: str) -> float:
        return sum(self.values[model]) / len(self.values[model])

    @property
    def others(self) -> list[str]:
        """Return the models that are compared with the first."""
        return list(self.values)[1:]

    def change(self, model: str) -> Difference:
        """Return how a model differs from the first on the same items."""
        first = next(iter(self.values.values()))
        return statistics.difference(first, self.values[model], self.clusters)

    def verdict(self, model: str) -> str:
        """Return "worse", "better" or "no change seen", or why the interval says nothing."""
        found = self.change(model)
        if found.low is None or found.high is None:
            return f"too few to tell, under {statistics.FEWEST_ROWS} apart"
        low, high = (found.low, found.high) if self.higher else (-found.high, -found.low)
        if high < 0:
            return "worse"
        return "better" if low > 0 else "no change seen"

    def facts(self, judged: "Callable[[Measure, str], str] | None" = None) -> MeasureFacts:
        """Return the means and differences, as results.json has them.

        judged: says what a change means; default: `verdict`.
        """
        judge = judged or Measure.verdict
        guessing = "" if self.chance is None else f"; guessing gives {100 * self.chance:.0f}%"
        return MeasureFacts(
            name=f"{self.task}, {self.name}",
            line=f"{len(next(iter(self.values.values()))):,} items{guessing}",
            higher=self.higher, is_share=self.is_share,
            means={
                model: Mean.of(values, self.clusters, self.is_share)
                for model, values in self.values.items()
            },
            changes={model: Change.of(self.change(model)) for model in self.others},
            missing={}, chance=self.chance,
            judged={model: judge(self, model) for model in self.others},
        )  # fmt: skip


def table(measures: Sequence[Measure]) -> str:
    """Return the measures as text: a line for each model that is compared with the first."""
    models = list(measures[0].values)
    heads = ["task", "score", "items", *models, "change, 95% interval"]
    rows = [heads]
    for measure in measures:
        for number, model in enumerate(measure.others or models[:1]):
            known = [
                measure.task, measure.name, f"{len(measure.values[model]):,}",
                *(_shown(measure, measure.mean(each)) for each in models),
            ]  # fmt: skip
            change = _change(measure, model) if measure.others else "one model only"
            named = f"{model}: {change}" if len(measure.others) > 1 else change
            rows.append([*(known if number == 0 else [""] * len(known)), named])
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads) - 1)]
    lines = []
    for row in rows:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths)]
        right = [cell.rjust(width) for cell, width in zip(row[2:-1], widths[2:])]
        lines.append("  ".join([*left, *right, row[-1]]))
    return "\n".join(lines)


def _shown(measure: Measure, value: float) -> str:
    return f"{100 * value:.1f}%" if measure.is_share else f"{value:.3f}"


def _change(measure: Measure, model: str) -> str:
    found = measure.change(model)
    factor, form = (100, "+.1f") if measure.is_share else (1, "+.3f")
    within = f"too few for an interval, {found.num_clusters:,} apart"
    if found.low is not None and found.high is not None:
        within = f"{factor * found.low:{form}} to {factor * found.high:{form}}"
    return f"{factor * found.mean:{form}} ({within})"
