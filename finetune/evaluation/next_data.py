"""Write the request for more rows of the kinds that the tuned model answers wrongly.

`finetune data generate --from-report FILE` makes them; finetune/preparation/request.py has the
format. Each failure counts once: for the first weak slice that holds it, else for the first of its
types of error.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune import failures, files
from finetune.errors import UserError
from finetune.evaluation.error_types import DEFINITIONS, words
from finetune.evaluation.results_file import ResultsFile, RowFacts
from finetune.preparation.request import DataRequest, Example
from finetune.preparation.request import Slice as Wanted

ROWS_PER_FAILURE = 20
FEWEST_FAILURES = 3  # of a type of error that is asked for; fewer are an accident
EXAMPLES = 8
MOST_LABELS = 20


def request_of(found: ResultsFile) -> DataRequest:
    """Return the request. Raise UserError if nothing fails often enough to ask for."""
    wanted = []
    for name, description, rows in _groups(found):
        wanted.append(
            Wanted(
                name=name, description=description, count=ROWS_PER_FAILURE * len(rows),
                examples=[_example(found, row) for row in _spread(rows, EXAMPLES)],
                topics=[],
                constraints=_constraints(rows),
            )
        )  # fmt: skip
    if not wanted:
        raise UserError(
            f"--next-data: {len(found.failures):,} of {len(found.rows):,} rows are wrong, and none "
            f"of a weak slice, nor {FEWEST_FAILURES} of one type: more rows would be guesswork"
        )
    return DataRequest(
        version=1, model=_setting(found, "tuned"), data=_setting(found, "data"), slices=wanted
    )


def _setting(found: ResultsFile, name: str) -> str | None:
    value = found.settings.get(name)
    return ", ".join(value) if isinstance(value, list) else value


def write(path: Path, request: DataRequest) -> None:
    """Write the request, whole or not at all."""
    text = json.dumps(request.model_dump(exclude_none=True), indent=2, ensure_ascii=False)
    with failures.writing(path):
        files.write_whole(path, text + "\n")


def _groups(found: ResultsFile) -> Iterator[tuple[str, str, list[RowFacts]]]:
    """Yield (name, description, wrong rows) of what is asked for."""
    left = {number: row for number, row in enumerate(found.rows) if row.failed and _asked(row)}
    for one in found.slices:
        rows = {number: left[number] for number in one.rows if number in left}
        if one.is_weak and len(rows) >= FEWEST_FAILURES:
            left = {number: row for number, row in left.items() if number not in rows}
            types = Counter(name for row in rows.values() for name in row.errors)
            [(most, _)] = types.most_common(1)
            what = f"Rows whose {one.column} is {one.value}: of {len(one.rows):,} rows "
            what += f"{one.failures:,} are wrong. Most are of the type {most}: {DEFINITIONS[most]}."
            yield one.name, what, list(rows.values())
    by_type: dict[str, list[RowFacts]] = {name: [] for name in DEFINITIONS}
    for row in left.values():
        by_type[row.errors[0]].append(row)
    for name, some in by_type.items():
        if len(some) >= FEWEST_FAILURES:
            yield name, f"Rows that the model gets wrong like this: {DEFINITIONS[name]}.", some


def _asked(row: RowFacts) -> bool:
    return bool(row.messages and row.messages[-1].content.strip())


def _spread(rows: list[RowFacts], most: int) -> list[RowFacts]:
    """Return rows at even distances."""
    step = max(1, math.ceil(len(rows) / most))
    return rows[::step]


def _example(found: ResultsFile, row: RowFacts) -> Example:
    score = row.scores[found.decides.score].get(found.tuned) if found.decides else None
    reference = row.reference if row.reference and row.reference.strip() else None
    return Example(
        prompt=row.messages[-1].content, reference=reference,
        answer=row.answers[found.tuned].text, score=score,
    )  # fmt: skip


def _constraints(rows: Sequence[RowFacts]) -> list[str]:
    """Return what the right answers of these rows have in common."""
    right = [row.reference.strip() for row in rows if row.reference and row.reference.strip()]
    if not right:
        return []
    different = sorted(set(right))
    if len(different) <= min(MOST_LABELS, len(right) / 2):
        return [f"the answer is one of: {', '.join(different)}"]
    lengths = sorted(len(words(each)) for each in right)
    low, high = lengths[0], lengths[-1]
    return [
        f"answers have {low:,} words" if low == high else f"answers have {low:,} to {high:,} words"
    ]
