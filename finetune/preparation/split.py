"""Split rows into train, dev and test, so that near-duplicates never part.

Writes train.jsonl, dev.jsonl and test.jsonl into a folder, in the order of the inputs. Rows of one
near-duplicate cluster go to the same file, and so do rows with the same value of --group; by --time
the latest rows are the test, those before them dev. --stratify keeps the share of each value.
"""

import argparse
import os
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from finetune.data import clusters
from finetune.data.places import Row, short
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation import texts
from finetune.preparation.dedup import fingerprints
from finetune.preparation.frame import Frame

HELD_OUT = ("test", "dev")
SPLITS = ("train", "dev", "test")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_folder(parser, "train.jsonl, dev.jsonl and test.jsonl")
    for name in HELD_OUT:
        what = f"rows of {name}: a share below 1, or a number; 0 for no {name}.jsonl"
        add(f"--{name}", type=_size, default=0.1, metavar="SIZE", help=what)
    what = "column whose values have the same share in each file"
    add("--stratify", metavar="COLUMN", help=what)
    what = "column whose equal values never part, such as a customer or a document"
    add("--group", metavar="COLUMN", help=what)
    what = "column of times, as numbers or as 2026-01-31: the latest rows are held out"
    add("--time", metavar="COLUMN", help=what)
    frames.add_columns(parser, "compare")
    what = "similarity from which two rows are near-duplicates; 1 for the same words only"
    add("--threshold", type=frames.fraction, default=clusters.THRESHOLD, help=what)
    add("--seed", type=int, default=0, help="another seed is another split")
    frames.add_workers(parser)


def _size(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = -1
    if not (0 <= size < 1 or (size >= 1 and size == int(size))):
        raise argparse.ArgumentTypeError(f"{text!r} should be a share below 1, or a number of rows")
    return size


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.stratify and arguments.time:
        raise UserError("--stratify and --time exclude each other: the latest rows are held out")
    files = {name: os.path.join(arguments.folder, f"{name}.jsonl") for name in SPLITS}
    for name, path in files.items():
        if name == "train" or getattr(arguments, name):
            frame.require_free(path, "--output")
    known = _Known(frame, arguments)
    prints = fingerprints(known.texts(), arguments.threshold, arguments.workers)
    if prints is None:
        raise DataError("all rows are empty; is it the right file?")
    labels = clusters.clusters(prints, arguments.threshold)
    parts = together(labels, known.groups)
    sizes = {name: _rows(getattr(arguments, name), len(labels), name) for name in HELD_OUT}
    if known.times:
        assigned = latest(parts, known.times, sizes)
    else:
        assigned = drawn(parts, known.strata, sizes, arguments.seed)
    _write(frame, files, assigned, sizes)


def _write(
    frame: Frame, files: dict[str, str], assigned: Sequence[str], sizes: dict[str, int]
) -> None:
    counts = Counter(assigned)
    for name, size in sizes.items():
        if size and not counts[name]:
            what = "near-duplicates and groups are larger than what is left"
            raise DataError(f"no rows are left for {name}: {what}; hold out more rows")
    if not counts["train"]:
        raise DataError("no rows are left for train; hold out fewer rows")
    with ExitStack() as stack:
        write = {
            name: stack.enter_context(frame.writing(path))
            for name, path in files.items()
            if counts[name]
        }
        for name, row in zip(assigned, frame.rows(title="writing")):
            write[name](row.values, row.place)
            frame.changed[f"in {name}"] += 1


def _rows(size: float, count: int, name: str) -> int:
    """Return how many rows to hold out."""
    rows = round(size * count) if size < 1 else int(size)
    if rows >= count:
        raise UserError(f"--{name}: {rows:,} of {count:,} rows leave none to train on; take fewer")
    return max(1, rows) if size else 0


class _Known:
    """What a first reading of the rows notes of each: its group, its stratum, its time."""

    def __init__(self, frame: Frame, arguments: argparse.Namespace) -> None:
        self._frame, self._arguments = frame, arguments
        self.groups: list[Any] = []
        self.strata: list[Any] = []
        self.times: list[Any] = []

    def texts(self) -> Iterator[str]:
        """Yield the text of each row."""
        columns = (
            (self.groups, "group"), (self.strata, "stratify"), (self.times, "time"),
        )  # fmt: skip
        for row in self._frame.rows(title="comparing"):
            for values, option in columns:
                if column := getattr(self._arguments, option):
                    values.append(self._value(row, option, column))
            yield texts.text_of(row.values, self._frame.columns)

    def _value(self, row: Row, option: str, column: str) -> Any:
        value = row.values.get(column)
        if value is None or value == "":
            what = f"this row has no value in column {short(column)!r}"
            raise DataError(f"{row.place}: --{option}: {what}; it has {list(row.values)[:20]}")
        if option != "time":
            return value if isinstance(value, str | int | float) else short(value, 1_000)
        is_number = isinstance(value, int | float)
        time = value if is_number else str(value)  # dates of pyarrow become ISO, which sorts
        if self.times and isinstance(self.times[-1], str) == is_number:
            what = f"{short(str(value))!r} and {short(str(self.times[-1]))!r} cannot be compared"
            raise DataError(f"{row.place}: --time: {what}; write all times alike")
        return time


def together(labels: np.ndarray, groups: Sequence[Any]) -> list[list[int]]:
    """Return sets of rows that never part: connected by near-duplicates and groups."""
    labels = labels.copy()
    first: dict[Any, int] = {}
    pairs = [(first.setdefault(group, row), row) for row, group in enumerate(groups)]
    if pairs:
        clusters.unite(labels, *np.array(pairs, np.int64).T)
    parts: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels.tolist()):
        parts[label].append(row)
    return list(parts.values())


def drawn(
    parts: list[list[int]], strata: Sequence[Any], sizes: dict[str, int], seed: int
) -> list[str]:
    """Assign parts at random, of each stratum its share; a part has its most common stratum."""
    by_stratum: dict[Any, list[list[int]]] = defaultdict(list)
    for part in parts:
        stratum = Counter(strata[row] for row in part).most_common(1)[0][0] if strata else None
        by_stratum[stratum].append(part)
    total = sum(map(len, parts))
    assigned = ["train"] * total
    owed = dict.fromkeys(sizes, 0.0)  # by the strata before: shares are rarely whole
    for stratum in sorted(by_stratum, key=lambda value: (str(type(value)), value)):
        own = by_stratum[stratum]
        random.Random(f"{seed} {stratum}").shuffle(own)
        rows = sum(map(len, own))
        for name, size in sizes.items():
            owed[name] += size * rows / total
        _fill(own, owed, assigned)
    return assigned


def _fill(parts: list[list[int]], owed: dict[str, float], assigned: list[str]) -> None:
    """Give each split the parts that fit into what it is owed, in order; count it down."""
    for part in parts:
        for name in owed:
            if owed[name] - len(part) > -0.5:
                owed[name] -= len(part)
                for row in part:
                    assigned[row] = name
                break


def latest(parts: list[list[int]], times: Sequence[Any], sizes: dict[str, int]) -> list[str]:
    """Assign the latest parts to test, those before to dev; a part is as late as its last row."""
    assigned = ["train"] * sum(map(len, parts))
    order = sorted(parts, key=lambda part: max(times[row] for row in part), reverse=True)
    names = iter([(name, size) for name, size in sizes.items() if size])
    name, left = next(names, ("train", 0))
    for part in order:
        if left <= 0:
            name, left = next(names, ("train", len(times)))
        left -= len(part)
        for row in part:
            assigned[row] = name
    return assigned
