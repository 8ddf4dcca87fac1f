"""Mix sources by weight: rows of each INPUT in its order, spread evenly over the output.

    finetune data mix chat.jsonl code.jsonl --weights 3,1 --output mixed.jsonl

takes three rows of the first for each row of the second, until one of them has no more. Of a source
that has more rows than needed, those that stay are drawn at random.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import chain, repeat

from finetune.data.places import Row
from finetune.errors import UserError
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    what = "weight of each INPUT, as 3,1 (default: by its rows, so that all are taken)"
    add("--weights", type=_weights, metavar="WEIGHTS", help=what)
    what = "rows of the output (default: as many as are there without taking one twice)"
    add("--rows", type=frames.positive, metavar="N", help=what)
    what = "take rows several times where a source has too few for --rows"
    add("--repeat", action="store_true", help=what)
    what = "add this column, with the name of the file that a row is from"
    add("--source-column", metavar="NAME", help=what)
    add("--seed", type=int, default=0, help="another seed draws other rows")


def _weights(text: str) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers above 0, as 3,1")
    return weights


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    groups = frame.groups
    counts = [sum(1 for _ in frame.rows(group, "counting")) for group in groups]
    weights = arguments.weights or [float(count) for count in counts]
    if len(weights) != len(groups):
        what = f"{len(weights)} weights for {len(groups)} inputs"
        raise UserError(f"--weights: {what}; give one for each")
    sizes = shares(weights, counts, arguments.rows)
    for group, size, count in zip(groups, sizes, counts):
        if size > count and not arguments.repeat:
            what = f"{size:,} rows are wanted of {frame.shown(group[0])}, which has {count:,}"
            raise UserError(f"{what}; take fewer --rows, change --weights, or add --repeat")
    streams = [
        _drawn(frame, group, size, count, f"{arguments.seed} {number}")
        for number, (group, size, count) in enumerate(zip(groups, sizes, counts))
    ]
    frame.read = sum(counts)
    with frame.writing() as write:
        for source in spread(sizes):
            row = next(streams[source])
            values = dict(row.values)
            if name := arguments.source_column:
                if name in values:
                    what = f"the row has a column {name!r} already; choose another name"
                    raise UserError(f"{row.place}: --source-column: {what}")
                values[name] = frame.shown(row.place.source)
            write(values, row.place)
            frame.changed[f"from {frame.shown(groups[source][0])}"] += 1


def shares(weights: Sequence[float], counts: Sequence[int], rows: int | None) -> list[int]:
    """Return how many rows each source gives: `rows` in all, or as many as none gives twice."""
    total = sum(weights)
    if rows is None:
        most = min(count / weight for count, weight in zip(counts, weights))
        return [round(weight * most) for weight in weights]
    exact = [rows * weight / total for weight in weights]
    sizes = [int(size) for size in exact]
    by_rest = sorted(range(len(sizes)), key=lambda source: sizes[source] - exact[source])
    for source in by_rest[: rows - sum(sizes)]:
        sizes[source] += 1
    return sizes


def spread(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the number of a source for each row: at each place the one that is furthest behind."""
    total, given = sum(sizes), [0] * len(sizes)
    for place in range(1, total + 1):
        behind = [size * place - done * total for size, done in zip(sizes, given)]
        source = behind.index(max(behind))
        given[source] += 1
        yield source


def _drawn(frame: Frame, group: list[str], size: int, count: int, seed: str) -> Iterator[Row]:
    """Yield `size` rows of a source in its order: all as often as they fit, then some at random."""
    whole, rest = divmod(size, count)
    chosen = set(random.Random(seed).sample(range(count), rest))
    yield from chain.from_iterable(frame.rows(group, "mixing") for _ in repeat(None, whole))
    if chosen:
        for number, row in enumerate(frame.rows(group, "mixing")):
            if number in chosen:
                yield row
