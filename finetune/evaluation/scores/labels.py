"""Answers as labels, and the report of a classifier: accuracy, precision, recall, F1, confusion."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from finetune.evaluation.scores.base import gap_of
from finetune.evaluation.scores.normalise import words
from finetune.generation.completions import Completion, Score

MOST_SHOWN = 20  # labels in a confusion matrix
NO_LABEL = "(none)"


class Label:
    """1 if the answer names the label of the reference, and no other.

    The labels are the references of all rows. A label inside another one, as "positive" in "not
    positive", counts only where it stands alone.
    """

    name, higher, is_share = "label", True, True
    line = "1 if the answer names the reference's label and no other; with a report of the labels"

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        labels = _Labels.of(completions)
        return [self._of(each, labels) for each in completions]

    def _of(self, completion: Completion, labels: "_Labels") -> Score:
        if (gap := gap_of(completion, needs_reference=True)) is not None:
            return gap
        wanted = labels.shown(completion.prompt.reference or "")
        named = labels.named(completion.text)
        if len(named) == 1:
            return Score(float(named[0] == wanted), f"says {named[0]}")
        return Score(0.0, f"names {', '.join(named)}" if named else "names no label")

    def details(self, completions: Sequence[Completion]) -> list[str]:
        """Return accuracy, a line for each label, and what labels were taken for what."""
        return report(self.counts(completions))

    def counts(self, completions: Sequence[Completion]) -> Counter[tuple[str, str]]:
        """Return (label of the reference, label that the answer names, or NO_LABEL) -> rows."""
        labels = _Labels.of(completions)
        found = Counter[tuple[str, str]]()
        for each in completions:
            if gap_of(each, needs_reference=True) is None:
                named = labels.named(each.text)
                given = named[0] if len(named) == 1 else NO_LABEL
                found[labels.shown(each.prompt.reference or ""), given] += 1
        return found


@dataclass(frozen=True)
class _Labels:
    by_words: dict[tuple[str, ...], str]
    """Words -> the label as it first stands in the rows."""

    @classmethod
    def of(cls, completions: Sequence[Completion]) -> "_Labels":
        by_words: dict[tuple[str, ...], str] = {}
        for each in completions:
            if each.prompt.reference is not None:
                by_words.setdefault(_words(each.prompt.reference), each.prompt.reference.strip())
        return cls(by_words)

    def shown(self, label: str) -> str:
        return self.by_words[_words(label)]

    def named(self, answer: str) -> list[str]:
        """Return the labels that an answer names; an answer that is a label names it alone."""
        given = _words(answer)
        if given in self.by_words:
            return [self.by_words[given]]
        # The longest label at each place; the search goes on after it.
        lengths = sorted({len(each) for each in self.by_words if each}, reverse=True)
        named, place = dict[str, None](), 0
        while place < len(given):
            runs = (given[place : place + length] for length in lengths)
            run = next((run for run in runs if run in self.by_words), None)
            if run is not None:
                named[self.by_words[run]] = None
            place += len(run) if run else 1
        return list(named)


def _words(text: str) -> tuple[str, ...]:
    return tuple(words(text)) or (text.strip(),)


class LabelCounts(NamedTuple):
    """A label of the references. rows: that have it; given: answers that name it; right: both."""

    label: str
    rows: int
    given: int
    right: int

    @property
    def precision(self) -> float | None:
        """Return the share of right ones of the answers that name it; None without any."""
        return self.right / self.given if self.given else None

    @property
    def recall(self) -> float:
        return self.right / self.rows

    @property
    def f1(self) -> float:
        return 2 * self.right / (self.rows + self.given)


def by_label(counts: Counter[tuple[str, str]]) -> list[LabelCounts]:
    """Return each label of (right label, given label) -> rows, the most frequent first."""
    rows, given = Counter[str](), Counter[str]()
    for (wanted, answer), count in counts.items():
        rows[wanted] += count
        given[answer] += count
    found = [LabelCounts(name, rows[name], given[name], counts[name, name]) for name in rows]
    return sorted(found, key=lambda each: (-each.rows, each.label))


def report(counts: Counter[tuple[str, str]]) -> list[str]:
    """Return the report of (right label, given label) -> rows."""
    total, labels = counts.total(), by_label(counts)
    if not total:
        return []
    width = max(
        len("label"), *(min(30, len(name)) for name in [*(e.label for e in labels), NO_LABEL])
    )
    right, f1 = sum(each.right for each in labels), sum(each.f1 for each in labels)
    lines = [
        f"accuracy {right / total:.1%}, macro F1 {f1 / len(labels):.1%}, "
        f"{total:,} rows, {len(labels)} labels",
        f"{'label':<{width}}  precision  recall      F1    rows",
    ]
    for each in labels:
        precision = "-" if each.precision is None else f"{each.precision:.1%}"
        lines.append(
            f"{each.label[:30]:<{width}}  {precision:>9}  {each.recall:>6.1%}  {each.f1:>6.1%}  "
            f"{each.rows:>6,}"
        )
    if len(labels) <= MOST_SHOWN:
        lines += _confusion(counts, sorted(each.label for each in labels), width)
    return lines


def _confusion(counts: Counter[tuple[str, str]], labels: list[str], width: int) -> list[str]:
    has_none = any(given == NO_LABEL for _, given in counts)
    columns = [*labels, *[NO_LABEL] * has_none]
    wide = [max(6, len(name[:12])) for name in columns]
    head = "  ".join(f"{name[:12]:>{size}}" for name, size in zip(columns, wide))
    lines = ["confusion (a row: the reference; a column: what the answer names)"]
    lines.append(f"{'':<{width}}  {head}")
    for label in labels:
        cells = (f"{counts[label, name]:>{size},}" for name, size in zip(columns, wide))
        lines.append(f"{label[:30]:<{width}}  {'  '.join(cells)}")
    return lines
