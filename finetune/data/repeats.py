"""Note rows that repeat, that contradict each other, or that evaluation rows resemble."""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from finetune.data import spans
from finetune.data.conversations import Sample
from finetune.data.examples import Examples
from finetune.data.overlap import Overlap, Text
from finetune.data.places import counted
from finetune.data.problems import Problems
from finetune.data.tokenised import Options

# Rows of training that are compared with evaluation rows: reading and comparing takes 0.2 ms each.
MOST_COMPARED = 100_000
AT_ONCE = 1_000  # texts


def notes(train: Examples) -> Iterator[str]:
    """Note exact duplicates, and prompts with several answers, of what is trained on."""
    first: dict[bytes, int] = {}
    chosen = _repeated(train).tolist()
    twice = [
        (first[digest], number)
        for number, digest in zip(chosen, train.digests(chosen))
        if first.setdefault(digest, number) != number
        and train.place(first[digest]) != train.place(number)  # else data.weights repeats it
    ]
    if twice:
        one, other = twice[0]
        yield (
            f"{counted(len(twice), 'example')} the same as an earlier one, such as "
            f"{train.place(other)} and {train.place(one)}; finetune data dedup removes such rows"
        )
    answers = _answers(train)
    if several := [list(each.values()) for each in answers.values() if len(each) > 1]:
        one, other = several[0][:2]
        yield (
            f"{counted(len(several), 'prompt')} followed by different answers, such as in "
            f"{train.place(one)} and {train.place(other)}: the model cannot learn which to give"
        )


def _repeated(train: Examples) -> np.ndarray:
    """Return the examples that may be the same as another."""
    stream, documents = train.input, _first_documents(train)
    return spans.repeated(stream.ids, stream.starts[documents], stream.ends[documents])


def _first_documents(train: Examples) -> np.ndarray:
    if train.example_ends is None:
        return np.arange(len(train))
    return np.concatenate([[0], train.example_ends[:-1]])


def _answers(train: Examples) -> dict[bytes, dict[bytes, int]]:
    """Return prompt -> last answer -> the first example with both, by hashes of their tokens.

    Only of prompts that more than one example may have, of the first document of each.
    """
    found: dict[bytes, dict[bytes, int]] = {}
    documents = _first_documents(train)
    starts, ends = train.input.starts[documents], train.input.ends[documents]
    answers = _last_answers(train.supervised, starts, ends)
    asking = np.flatnonzero(answers > starts)  # where all is learned, nothing asks
    chosen = asking[spans.repeated(train.input.ids, starts[asking], answers[asking])]
    for example in chosen.tolist():
        prompt = _hash(train.input.ids[starts[example] : answers[example]])
        answer = _hash(train.input.ids[answers[example] : ends[example]])
        found.setdefault(prompt, {}).setdefault(answer, example)
    return found


def _last_answers(supervised: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return where the last supervised part of each document begins; its start if nowhere else."""
    found = np.array(starts)
    for part, places, bounds in spans.parts(starts, ends):
        flags = supervised[places]
        begins = flags[1:] & ~flags[:-1]
        begins[bounds[1:-1] - 1] = False  # what follows is another document
        begun = np.concatenate([[-1], np.flatnonzero(begins) + 1])
        last = begun[np.searchsorted(begun, bounds[1:]) - 1]
        found[part] += np.maximum(last - bounds[:-1], 0)
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
    known = list(_texts_of(eval_sources or train.sources, options, wanted))
    overlap = Overlap([text for _, text in known])
    trained, compared, found = _rows_of(train, most=MOST_COMPARED), 0, list[tuple[str, str]]()
    batch: list[tuple[str, Text]] = []
    stream = _texts_of(train.sources, options, trained)  # (place, text)
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
        f"{counted(len(found), 'training row')} too much like evaluation rows{of}, such as {one} "
        f"and {other}: the evaluation may measure memorisation; finetune data decontaminate "
        "removes such rows"
    )


def _rows_of(examples: Examples, most: int | None) -> set[tuple[str, int, int]]:
    """Return where the rows of examples stand; of many, the first ones."""
    places = zip(examples.source.tolist(), examples.line.tolist(), examples.row.tolist())
    chosen = sorted(set(places))[:most]
    return {(examples.sources[source], line, row) for source, line, row in chosen}


def _texts_of(
    sources: Sequence[str], options: Options, wanted: set[tuple[str, int, int]]
) -> Iterator[tuple[str, Text]]:
    """Yield (place, text) of the rows that are wanted."""
    left = len(wanted)
    for sample in options.samples(sources, Problems()):
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
