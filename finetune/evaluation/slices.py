"""Slices of the rows: where the tuned model is weak.

Rows are taken together by the columns that they bring beside question and answer, such as a source
or a label, by lengths, by the file they stand in, and by clusters of near-duplicates.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune import extras
from finetune.data.clusters import words
from finetune.evaluation import statistics
from finetune.evaluation.results import Results

MOST_VALUES = 20  # different values of a column that makes slices
MOST_CLUSTERS, SMALLEST_CLUSTER = 10, 5
PARTS = 4  # of equal numbers of rows, by a length
WEAK = 0.05


@dataclass(frozen=True)
class Slice:
    """Rows with the same value of a column."""

    column: str
    value: str
    rows: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.column}: {self.value}"


def of_results(results: Results) -> list[Slice]:
    """Return all slices that parts of the rows make, column by column."""
    if not results.prompts:
        return []
    asked = [len(words(each.question)) for each in results.prompts]
    right = [len(words(each.reference or "")) for each in results.prompts]
    turns = [len(each.messages) for each in results.prompts]
    sources = [str(each.conversation.place.source) for each in results.prompts]
    columns: dict[str, Sequence[Any]] = {
        **_columns(results), "words of the question": _binned(asked),
        "words of the right answer": _binned(right), "messages": turns, "file": sources,
    }  # fmt: skip
    found: dict[tuple[int, ...], Slice] = {}
    for name, values in columns.items():
        for each in _of_column(name, values):  # of two columns that say the same, the first
            found.setdefault(each.rows, each)
    for each in _of_clusters(results):
        found.setdefault(each.rows, each)
    return list(found.values())


def _columns(results: Results) -> dict[str, list[Any]]:
    """Return the columns whose values are short and few, in the order in which rows have them."""
    names = dict.fromkeys(name for each in results.prompts for name in each.fields)
    found = {}
    for name in names:
        values = [each.fields.get(name) for each in results.prompts]
        if all(isinstance(value, str | bool | int | None) for value in values):
            found[name] = values
    return found


def _of_column(name: str, values: Sequence[Any]) -> Iterator[Slice]:
    groups = defaultdict(list)
    for row, value in enumerate(values):
        groups["none" if value is None else str(value)].append(row)
    if 1 < len(groups) <= MOST_VALUES and len(groups) < len(values):
        for value, rows in groups.items():
            yield Slice(name, value, tuple(rows))


def _of_clusters(results: Results) -> Iterator[Slice]:
    groups = defaultdict(list)
    for row, cluster in enumerate(results.clusters):
        groups[cluster].append(row)
    large = sorted(groups.values(), key=len, reverse=True)[:MOST_CLUSTERS]
    for rows in large:
        if SMALLEST_CLUSTER <= len(rows) < len(results.prompts):
            shown = " ".join(results.prompts[rows[0]].question.split())[:60]
            yield Slice("near-duplicates of", shown, tuple(rows))


def _binned(lengths: Sequence[int]) -> list[str]:
    """Return for each length the range it is in: about as many rows in each."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, PARTS + 1), method="lower"))
    ranges = [(int(low), int(high) - 1) for low, high in zip(edges, edges[1:])]
    if ranges:
        ranges[-1] = (ranges[-1][0], int(edges[-1]))
    names = [f"{low:,}" if low >= high else f"{low:,} to {high:,}" for low, high in ranges]
    places = np.searchsorted(edges[1:-1], lengths, side="right")
    return [names[place] if names else "all" for place in places]


def failing_more(
    slices: Sequence[Slice], failed: Mapping[int, bool]
) -> list[tuple[float | None, bool]]:
    """Return for each slice (p of failing more often than other rows, whether it is weak).

    failed: whether each row that could be decided is wrong. p: one-sided, Fisher's exact test,
    after Holm over the slices; None where a slice holds all such rows, or none.
    """
    extras.require("scipy", "evaluate")
    from scipy.stats import fisher_exact

    wrong, count = sum(failed.values()), len(failed)
    found: dict[int, float] = {}
    for number, one in enumerate(slices):
        inside = [failed[row] for row in one.rows if row in failed]
        if 0 < len(inside) < count:
            rest = wrong - sum(inside)
            table = [
                [sum(inside), len(inside) - sum(inside)],
                [rest, count - len(inside) - rest],
            ]
            found[number] = float(fisher_exact(table, alternative="greater").pvalue)
    raised = dict(zip(found, statistics.holm(list(found.values()))))
    return [(raised.get(n), raised.get(n, 1.0) < WEAK) for n in range(len(slices))]
