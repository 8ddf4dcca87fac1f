"""Note rows that repeat, that contradict each other, or that evaluation rows resemble."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from finetune.data.conversations import Sample
from finetune.data.examples import Examples
from finetune.data.overlap import Overlap, Text
from finetune.data.problems import Problems
from finetune.data.tokens import Options

# Rows of training that are compared with evaluation rows: reading and comparing takes 0.2 ms each.
MOST_COMPARED = 100_000
AT_ONCE = 1_000  # texts


def notes(train: Examples) -> Iterator[str]:
    """Note exact duplicates, and prompts with several answers, of what is trained on."""
    first: dict[bytes, int] = {}
    twice = [
        (first[digest], number)
        for number, digest in enumerate(train.digests())
        if first.setdefault(digest, number) != number
        and train.place(first[digest]) != train.place(number)  # else data.weights repeats it
    ]
    if twice:
        one, other = twice[0]
        yield (
            f"{_counted(len(twice), 'example')} the same as an earlier one, such as "
            f"{train.place(other)} and {train.place(one)}; finetune data dedup removes such rows"
        )
    answers = _answers(train)
    if several := [list(each.values()) for each in answers.values() if len(each) > 1]:
        one, other = several[0][:2]
        yield (
            f"{_counted(len(several), 'prompt')} followed by different answers, such as in "
            f"{train.place(one)} and {train.place(other)}: the model cannot learn which to give"
        )


def _answers(train: Examples) -> dict[bytes, dict[bytes, int]]:
    """Return prompt -> last answer -> the first example with both, by hashes of their tokens."""
    found: dict[bytes, dict[bytes, int]] = {}
    for example in range(len(train)):
        part = train.input.span(train.documents(example)[0])
        supervised = np.asarray(train.supervised[part])
        begins = np.flatnonzero(supervised[1:] & ~supervised[:-1])
        if not len(begins):  # all is learned: nothing asks
            continue
        start = int(begins[-1]) + 1
        ids = np.asarray(train.input.ids[part])
        found.setdefault(_hash(ids[:start]), {}).setdefault(_hash(ids[start:]), example)
    return found


def _hash(ids: np.ndarray) -> bytes:
    return blake2b(ids.tobytes(), digest_size=16).digest()


def overlap_notes(
    train: Examples, evals: Examples, eval_sources: Sequence[str], options: Options
) -> Iterator[str]:
    """Note training rows that resemble evaluation rows (finetune/data/overlap.py).

    `eval_sources`: the files of data.eval; empty if the rows are held out of data.train.
    """
    wanted = _rows_of(evals, most=None)
    known: list[tuple[str, Text]] = []
    for sample in options.samples(eval_sources or train.sources, Problems()):
        place = sample.conversations[0].place
        if (place.source, place.line, place.row) in wanted:
            known.append((str(place), _text(sample)))
    overlap = Overlap([text for _, text in known])
    trained, compared, found = _rows_of(train, most=MOST_COMPARED), 0, list[tuple[str, str]]()
    batch: list[tuple[str, Text]] = []
    stream = _texts_of(train, options, trained)  # (place, text)
    while batch := list(islice(stream, AT_ONCE)):
        compared += len(batch)
        for (here, _), match in zip(batch, overlap.matches([text for _, text in batch])):
            if match is not None:
                found.append((here, known[match.row][0]))
    if not found:
        return
    one, other = found[0]
    of = "" if compared < MOST_COMPARED else f" of the first {compared:,}"
    yield (
        f"{_counted(len(found), 'training row')} too much like evaluation rows{of}, such as {one} "
        f"and {other}: the evaluation may measure memorisation; finetune data decontaminate "
        "removes such rows"
    )


def _rows_of(examples: Examples, most: int | None) -> set[tuple[str, int, int]]:
    """Return where the rows of examples stand; of many, the first ones."""
    places = zip(examples.source.tolist(), examples.line.tolist(), examples.row.tolist())
    chosen = sorted(set(places))[:most]
    return {(examples.sources[source], line, row) for source, line, row in chosen}


def _texts_of(
    train: Examples, options: Options, wanted: set[tuple[str, int, int]]
) -> Iterator[tuple[str, Text]]:
    """Yield (place, text) of the rows that are wanted."""
    left = len(wanted)
    for sample in options.samples(train.sources, Problems()):
        place = sample.conversations[0].place
        if (place.source, place.line, place.row) in wanted:
            left -= 1
            yield str(place), _text(sample)
            if not left:
                return


def _text(sample: Sample) -> Text:
    """Return what a row asks, and what it answers; plain text asks."""
    asked: list[str] = []
    answered: list[str] = []
    for conversation in sample.conversations:
        for message in conversation.messages:
            is_answer = message.supervised and message.role != "text"
            (answered if is_answer else asked).extend([message.content, message.context])
    return "\n".join(filter(None, asked)), "\n".join(filter(None, answered))


def _counted(number: int, noun: str) -> str:
    return f"1 {noun} is" if number == 1 else f"{number:,} {noun}s are"
