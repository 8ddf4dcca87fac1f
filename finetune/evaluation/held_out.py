"""Rows that models are asked, with what is known of the right answer."""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from finetune import own_code
from finetune.console import visible
from finetune.data import clusters, rows, source_files, verdicts
from finetune.data.conversations import Conversation, Sample, without_thoughts
from finetune.data.places import list_columns, short
from finetune.data.problems import Problems
from finetune.errors import DataError, UserError
from finetune.generation.answers import share_of_process
from finetune.generation.completions import Prompt


def note(text: str) -> None:
    """Print a note; of several processes only the first does."""
    if share_of_process()[0] == 0:
        print(visible(f"note: {text}"), file=sys.stderr)


@dataclass(frozen=True)
class Reading:
    """How rows are read: settings of the section data of a run."""

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    text_unit: str = "line"
    repair_turns: bool = False
    thinking: str = "keep"


def read(
    source: str | Sequence[str], reading: Reading = Reading(), limit: int | None = None
) -> list[Prompt]:
    """Return the rows of files, folders, globs or Hub names. Raise DataError that lists wrong ones.

    Each row ends with an answer, its reference; of rated ones the good one, and none without it.
    """
    found = samples(source, reading, limit)
    if reading.format in ("preference", "unpaired"):
        good = [each for each in found if 1.0 in each.fields["label"]]
        if found and not good:
            first = found[0].conversations[0].place
            raise DataError(f"{first}: neither this row nor another has a good answer")
        if left_out := len(found) - len(good):
            note(f"{left_out:,} of {len(found):,} rows left out, as their answers are not good")
        found = [replace(each, conversations=(representative(each),)) for each in good]
    return [prompt_of(sample) for sample in _with_one_answer(found)]


def samples(
    source: str | Sequence[str], reading: Reading = Reading(), limit: int | None = None
) -> list[Sample]:
    """Return the same rows with all their conversations."""
    found: list[str] = []
    for name in [source] if isinstance(source, str) else source:
        sources, notes = source_files.expand(name, "--data")
        found += sources
        for each in notes:
            note(each)
    problems, unread = Problems(), Counter[str]()
    if reading.columns and own_code.is_own(reading.format):
        raise UserError(
            "--columns: would be ignored: the function of --format reads the columns itself; "
            "remove it"
        )
    try:
        made = _samples(found, reading, limit, problems, unread)
    except UserError as exc:  # its message names settings of the run config
        message = str(exc).replace("data.columns", "--columns").replace("data.format", "--format")
        raise type(exc)(message) from exc
    if problems.num_empty:
        skipped = "1 empty row" if problems.num_empty == 1 else f"{problems.num_empty:,} empty rows"
        note(f"{skipped} skipped")
    if problems.num_skipped:
        note(f"--format skips {problems.num_skipped:,} of {problems.num_rows:,} rows")
    if unread:
        listed = list_columns(sorted(unread))
        rates = ", and every answer counts as right" if _any_rates(tuple(sorted(unread))) else ""
        note(f"columns {listed} are not part of a prompt; --group and scores can use them{rates}")
    return made


def _any_rates(columns: tuple[str, ...]) -> bool:
    """Return whether a column says how good an answer is."""
    rejects = verdicts.preference_columns(columns, verdicts.REJECTED)
    return bool(rejects or verdicts.verdict_columns(columns))


def _samples(
    sources: list[str], reading: Reading, limit: int | None, problems: Problems,
    unread: Counter[str],
) -> list[Sample]:  # fmt: skip
    format, columns, unit = reading.format, reading.columns, reading.text_unit
    if format == "auto":
        format = rows.detect_format(sources, unit, columns, for_training=False)
    stream = rows.samples(
        sources, format, columns, unit, None, problems, unread, for_training=False,
        repair_turns=reading.repair_turns,
    )  # fmt: skip
    samples = list(islice(stream, limit))
    if reading.thinking == "drop":
        for number, sample in enumerate(samples):
            with problems.noted(sample.row):
                kept = tuple(map(without_thoughts, sample.conversations))
                samples[number] = replace(sample, conversations=kept)
    problems.raise_if_any()
    return samples


def representative(sample: Sample) -> Conversation:
    """Return the conversation that stands for a row: of rated answers the first good one."""
    labels = sample.fields.get("label", ())
    return sample.conversations[labels.index(1.0) if 1.0 in labels else 0]


def _with_one_answer(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return the samples. Raise DataError for one that does not end with one answer in text."""
    read = [conversation for sample in samples for conversation in sample.conversations]
    if len(read) > len(samples):
        several = next(each.conversations[0] for each in samples if len(each.conversations) > 1)
        raise DataError(
            f"{several.place}: --format gives several documents, of which evaluate cannot compare "
            "one answer; write a function for it that returns the one to compare with"
        )
    if without := next((c for c in read if c.messages[-1].role != "assistant"), None):
        raise DataError(
            f"{without.place}: has no answer to compare with; name its column with --columns, for "
            "example {question: prompt, answer: chosen}, or read pairs with --format preference"
        )
    if calling := next((c for c in read if c.messages[-1].has_calls), None):
        raise DataError(
            f"{calling.place}: ends with tool calls, and evaluate compares the text of answers; "
            "leave out rows that end so"
        )
    return samples


def prompt_of(sample: Sample) -> Prompt:
    """Return what a row asks, with the answer of the conversation that stands for it."""
    conversation = representative(sample)
    *asked, answer = conversation.messages
    values = sample.row.values if sample.row else {}
    return Prompt(replace(conversation, messages=tuple(asked)), answer.content, values)


def grouped(prompts: Sequence[Prompt], column: str | None = None) -> list[int]:
    """Return the cluster of each prompt: its near-duplicates, or its value of `column`.

    Raises DataError for a prompt without a value.
    """
    if column is None:
        return clusters.of_texts(map(_text, prompts)).tolist()
    numbers: dict[str, int] = {}
    found = []
    for prompt in prompts:
        value: Any = prompt.fields.get(column)
        if value is None:
            listed = list_columns(prompt.fields)
            raise DataError(
                f"--group: {prompt.place} has no column {short(column)}; it has {listed}"
            )
        found.append(numbers.setdefault(str(value), len(numbers)))
    return found


def _text(prompt: Prompt) -> str:
    asked = "".join(f"{m.content}\n{m.context}\n" for m in prompt.messages)
    return f"{asked}{prompt.reference or ''}\n"
