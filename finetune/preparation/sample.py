"""Draw rows at random, the same ones for the same seed; they keep their order."""

import argparse
import random
from collections import defaultdict
from typing import Any

from finetune.data.places import short
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rows", type=frames.positive, metavar="N", help="how many rows")
    size.add_argument("--share", type=frames.fraction, help="which share of all rows, up to 1")
    what = "column whose values keep their share"
    add("--stratify", metavar="COLUMN", help=what)
    add("--seed", type=int, default=0, help="another seed draws other rows")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    groups: dict[Any, list[int]] = defaultdict(list)
    count = 0
    for count, row in enumerate(frame.rows(title="counting"), 1):
        value = None
        if arguments.stratify:
            value = row.values.get(arguments.stratify)
            if value is None:
                what = f"this row has no value in column {short(arguments.stratify)!r}"
                raise DataError(f"{row.place}: --stratify: {what}; it has {list(row.values)[:20]}")
        groups[short(value, 1_000)].append(count - 1)
    wanted = arguments.rows or max(1, round(arguments.share * count))
    if wanted > count:
        raise UserError(f"--rows: {wanted:,} of {count:,} rows; take fewer")
    drawn: set[int] = set()
    done = 0
    for name in sorted(groups):  # of what is left, each group its share: no rounding adds up
        own = groups[name]
        size = round((wanted - len(drawn)) * len(own) / (count - done))
        done += len(own)
        drawn.update(random.Random(f"{arguments.seed} {name}").sample(own, min(size, len(own))))
    with frame.writing() as write:
        for number, row in enumerate(frame.rows(title="writing")):
            if number in drawn:
                write(row.values, row.place)
