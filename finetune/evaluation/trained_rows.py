"""Find evaluation rows that a run was trained on: the same text, or nearly the same.

    found = trained_rows.find(prompts, run)
    found[3].place  # the training row that prompts[3] repeats

A row counts if what it asks, or all of it, has the same words as a training row, or nearly the same
(finetune/data/overlap.py): a score of such rows measures memory. What the run held out does not
count as trained on, although it stands in the same files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from finetune.data import rows, source_files
from finetune.data.conversations import Message, Sample
from finetune.data.overlap import EXACT, NEAR, Overlap, Text
from finetune.data.places import short
from finetune.data.problems import Problems, Skipping
from finetune.errors import DataError, FinetuneError
from finetune.evaluation.held_out import note, representative
from finetune.evaluation.trained_run import TrainedRun
from finetune.generation.completions import Prompt

MOST_ROWS = 100_000  # of training: reading and comparing takes 0.2 ms each
AT_ONCE = 1_000
SHOWN = 10
SKIPPED = Skipping(skips=True, max_fraction=1.0)


@dataclass(frozen=True)
class Trained:
    """The training row that an evaluation row repeats. rule: the same text, or nearly."""

    place: str
    rule: str


class Unread(Exception):
    """The rows of the training cannot be read any more."""


def find(prompts: Sequence[Prompt], run: TrainedRun) -> dict[int, Trained]:
    """Return which prompts the run was trained on, by their numbers.

    Raises Unread if the rows of the training cannot be read.
    """
    texts = [
        _text((*each.messages, Message("assistant", each.reference or ""))) for each in prompts
    ]
    found: dict[int, Trained] = {}
    again = _passed(texts, list(range(len(texts))), training(run), found)
    # A training row is said to match one evaluation row; it may match others, too.
    while again:
        left = [number for number in range(len(texts)) if number not in found]
        again = _passed(texts, left, iter(again), found)
    return found


def known(prompts: Sequence[Prompt], run: TrainedRun | None) -> dict[int, Trained]:
    """Return the same; without a run nothing, and where its rows are gone nothing with a note."""
    if run is None:
        return {}
    try:
        return find(prompts, run)
    except Unread as exc:
        note(f"the rows that {run.path} was trained on cannot be compared with these: {exc}")
        return {}


def _passed(
    texts: Sequence[Text], left: Sequence[int], training: Iterator[tuple[str, Text]],
    found: dict[int, Trained],
) -> list[tuple[str, Text]]:  # fmt: skip
    """Compare training rows with the texts that are left; return the rows that match one."""
    overlap = Overlap([texts[number] for number in left])
    matched = []
    while left and (batch := list(islice(training, AT_ONCE))):
        for (place, text), match in zip(batch, overlap.matches([text for _, text in batch])):
            if match is not None and match.rule in (EXACT, NEAR):
                found.setdefault(left[match.row], Trained(place, match.rule))
                matched.append((place, text))
    return matched


def training(run: TrainedRun) -> Iterator[tuple[str, Text]]:
    """Yield (place, text) of the rows that a run was trained on. Raises Unread."""
    for count, sample in enumerate(_samples(run)):
        if count == MOST_ROWS:
            note(f"rows are compared with the first {MOST_ROWS:,} that {run.path} was trained on")
            return
        yield str(sample.conversations[0].place), _of_sample(sample)


def _samples(run: TrainedRun) -> Iterator[Sample]:
    """Yield the rows of data.train without those that were held out."""
    held_out = Counter(_of_sample(sample) for sample in _read(run, run.held_out_file))
    for sample in _read(run, run.trained_on):
        text = _of_sample(sample)
        if held_out[text]:
            held_out[text] -= 1
        else:
            yield sample


def prompts_of(run: TrainedRun) -> list[Prompt]:
    """Return the rows that a run was trained on, as prompts with references.

    Only of the first MOST_ROWS those that end with an answer. Raises DataError if the rows cannot
    be read any more.
    """
    try:
        conversations = [
            each
            for sample in islice(_samples(run), MOST_ROWS)
            for each in sample.conversations[:1]
            if each.messages[-1].role == "assistant"
        ]
    except Unread as exc:
        raise DataError(f"the rows that {run.path} was trained on cannot be read: {exc}") from exc
    return [
        Prompt(replace(each, messages=each.messages[:-1]), each.messages[-1].content)
        for each in conversations
    ]


def _read(run: TrainedRun, names: Sequence[str]) -> Iterator[Sample]:
    reading, problems = run.reading, Problems(SKIPPED)
    try:
        sources = [each for name in names for each in source_files.expand(name, "data.train")[0]]
        if sources:
            yield from rows.samples(
                sources, reading.format, reading.columns, reading.text_unit, None, problems,
                for_training=False, repair_turns=reading.repair_turns,
            )  # fmt: skip
    except (FinetuneError, OSError) as exc:
        raise Unread(str(exc)) from exc


def _of_sample(sample: Sample) -> Text:
    return _text(representative(sample).messages)


def _text(messages: Sequence[Message]) -> Text:
    """Return what is asked, and what is answered."""
    asked: list[str] = []
    answered: list[str] = []
    for message in messages:
        of = answered if message.role == "assistant" else asked
        of += [text for text in (message.content, message.context) if text]
    return "\n".join(asked), "\n".join(answered)


def listing(prompts: Sequence[Prompt], found: Mapping[int, Trained]) -> str:
    """Name both places of rows that were trained on, at most ten."""
    lines = [
        f"{prompts[number].place} repeats {trained.place} ({trained.rule}): "
        f"{short(prompts[number].question)}"
        for number, trained in islice(sorted(found.items()), SHOWN)
    ]
    if len(found) > SHOWN:
        lines.append(f"and {len(found) - SHOWN:,} more")
    return "".join(f"\n  {line}" for line in lines)


def refuse(prompts: Sequence[Prompt], found: Mapping[int, Trained]) -> list[Prompt]:
    """Return the prompts that were not trained on, with a note. Raise DataError without any."""
    if not found:
        return list(prompts)
    count = f"{len(found):,} of {len(prompts):,} rows"
    if len(found) == len(prompts):
        raise DataError(
            f"{count} were trained on, so they cannot show what was learned; give others with "
            f"--data, or score them with --trained-rows score:{listing(prompts, found)}"
        )
    note(f"{count} were trained on, and are left out; {HINT}:{listing(prompts, found)}")
    return [prompt for number, prompt in enumerate(prompts) if number not in found]


HINT = "--trained-rows score scores with and without them"
