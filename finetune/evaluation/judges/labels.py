"""Scores that people gave to answers, beside those of a judge.

The file is the one of `finetune evaluate --output`, where a person has added the score of answers
to some lines, drawn at random:

    {"row": "rows.jsonl:3", ..., "base": "...", "tuned": "...", "base_label": 2, "tuned_label": 5}
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import failures
from finetune.data.places import printable, short
from finetune.data.problems import Problems
from finetune.errors import DataError
from finetune.evaluation import agreement
from finetune.evaluation.agreement import Corrected
from finetune.evaluation.results import BASE, TUNED, Results

ENDING = "_label"
Labels = dict[str, list[float | None]]
"""Model -> the label of its answer to each prompt; None without one."""


@dataclass(frozen=True)
class Label:
    """A score that a person gave to a model's answer. row: where the prompt stands."""

    model: str
    row: str
    answer: str
    score: float


def read(path: str) -> list[Label]:
    """Return the labels of a file. Raise DataError that lists every wrong line."""
    problems, found = Problems(), list[Label]()
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        problems.num_rows += 1
        with problems.noted():
            found += _labels(f"{printable(path)}:{number}", line)
    problems.raise_if_any()
    if not found:
        what = f"no line has a column such as tuned{ENDING}"
        raise DataError(f"{printable(path)}: {what}; add scores to lines of the file of --output")
    return found


def aligned(labels: Sequence[Label], results: Results) -> tuple[Labels, int]:
    """Return the labels of each model's answers, and how many are of answers that it no longer
    gives.
    """
    known = {(each.model, each.row, each.answer): each.score for each in labels}
    found: Labels = {
        name: [known.get((name, each.prompt.place, each.text)) for each in answers]
        for name, answers in results.answers.items()
    }
    used = sum(label is not None for given in found.values() for label in given)
    return found, len(known) - used


def _lines(path: str) -> list[bytes]:
    shown = printable(path)
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError) as exc:
        failures.reraise(exc, f"{shown}: cannot be read now")
        why = getattr(exc, "strerror", None) or exc
        raise DataError(f"{shown}: cannot be read ({why}); is it the right file?") from exc


def _labels(place: str, line: bytes) -> Iterator[Label]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as exc:
        shown = short(line.decode("utf-8", "replace"))
        raise DataError(f"{place}: should be an object in JSON, got {shown}") from exc
    if not isinstance(values, dict):
        raise DataError(f"{place}: should be an object in JSON, got {short(values)}")
    for column, label in values.items():
        if not column.endswith(ENDING) or label is None:
            continue
        if isinstance(label, bool) or not isinstance(label, int | float):
            what = f"column {short(column)!r} should be a number"
            raise DataError(f"{place}: {what}, got {short(label)}")
        if not math.isfinite(label):
            raise DataError(f"{place}: column {short(column)!r} should be finite, got {label}")
        row, name = values.get("row"), column.removesuffix(ENDING)
        answer = values.get(name)
        if not isinstance(row, str) or not isinstance(answer, str):
            what = f"a label needs the columns 'row' and {short(name)!r} of --output"
            raise DataError(f"{place}: {what}; the row: {short(values)}")
        yield Label(name, row, answer, float(label))


# ------------------------------------------------------------------------------------- reports


def report(results: Results, score: str, of_people: Sequence[Label]) -> Iterator[str]:
    """Say how well a judge agrees with people, and correct its means and its difference."""
    given = results.scores[score]
    labelled, num_other = aligned(of_people, results)
    if num_other:
        yield f"{num_other:,} labels are of other answers than these, and do not count"
    pairs = [
        (each.value, label)
        for name, labels in labelled.items()
        for each, label in zip(given[name], labels)
        if each.value is not None and label is not None
    ]
    if not pairs:
        yield f"{score}: no labelled answer has a score of the judge"
        return
    judged, people = zip(*pairs)
    alpha = agreement.alpha([judged, people], "interval")
    kappa = agreement.kappa([round(value) for value in judged], [round(each) for each in people])
    found = {"alpha (interval)": alpha, "Cohen's kappa (rounded)": kappa}
    shown = [f"{name} {value:.2f}" for name, value in found.items() if value is not None]
    yield (
        f"{score} beside {len(pairs):,} labels of people: "
        f"{', '.join(shown) or 'all are equal, so agreement has no measure'}"
    )
    for name, labels in labelled.items():
        values = [each.value for each in given[name]]
        yield from _line(f"{score} of {name}", values, labels, results.clusters, "")
    if {BASE, TUNED} <= given.keys():
        yield from _difference(results, score, labelled)


def _difference(results: Results, score: str, labels: Labels) -> Iterator[str]:
    given = results.scores[score]
    values = [_minus(a.value, b.value) for a, b in zip(given[TUNED], given[BASE])]
    of_people = [_minus(a, b) for a, b in zip(labels[TUNED], labels[BASE])]
    name = f"{score}, tuned against base"
    yield from _line(name, values, of_people, results.clusters, "+")


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _line(
    name: str, values: Sequence[float | None], labels: Sequence[float | None],
    clusters: Sequence[int], sign: str,
) -> Iterator[str]:  # fmt: skip
    rows = [
        (value, label, cluster)
        for value, label, cluster in zip(values, labels, clusters)
        if value is not None
    ]
    if not any(label is not None for _, label, _ in rows):
        return
    scores, given, groups = zip(*rows)
    found = agreement.prediction_powered(scores, given, groups)
    yield f"{name}, corrected by people: {_shown(found, sign)}"


def _shown(found: Corrected, sign: str) -> str:
    within = "too few labels for an interval"
    if found.low is not None and found.high is not None:
        within = f"{found.low:{sign}.2f} to {found.high:{sign}.2f}"
    return (
        f"{found.mean:{sign}.2f} ({within}); the judge alone {found.by_judge:{sign}.2f}, "
        f"{found.num_labelled:,} labels alone {found.by_people:{sign}.2f}"
    )
