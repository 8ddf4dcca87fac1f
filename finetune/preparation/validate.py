"""Check every row as training does, without a model; list what is wrong, with file and line.

Ends with exit code 2 if a row is wrong. With --output it writes the rows that are right instead,
and --rejects takes the wrong ones.
"""

import argparse
from collections.abc import Callable

from finetune.config import paths
from finetune.data.formats import detect, to_conversation
from finetune.data.places import Row
from finetune.data.problems import Problems
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame
from finetune.preparation.output import Write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    frames.add_inputs(parser)
    what = "write the rows that are right to this file, and end with 0; - for a pipe"
    parser.add_argument("--output", type=paths.argument, metavar="FILE", help=what)
    frames.add_counts(parser)
    frames.add_rejects(parser)
    frames.add_format(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    if arguments.rejects and not arguments.output:
        raise UserError("--rejects needs --output: without it, a wrong row ends the check")
    problems = Problems()
    if arguments.output:
        with frame.writing() as write:
            _check(frame, arguments, problems, write, frame.drop)
        return
    _check(frame, arguments, problems, lambda values, place: None, None)
    problems.num_rows = frame.read
    problems.raise_if_any()


def _check(
    frame: Frame, arguments: argparse.Namespace, problems: Problems, write: Write,
    drop: Callable[..., None] | None,
) -> None:  # fmt: skip
    """Write the rows that are right; note the others, or drop them."""
    formats: dict[str, str] = {}

    def broken(exc: DataError) -> None:
        problems.note(str(exc))
        frame.dropped["broken line"] += drop is not None

    for row in frame.rows(title="checking", broken=broken):
        try:
            format = _format(row, arguments, formats)
            to_conversation(row, format, arguments.columns)
        except DataError as exc:
            problems.note(str(exc))
            if drop:
                drop(row, "wrong", why=str(exc).partition(": ")[2])
            continue
        frame.changed[f"of format {format}"] += 1
        write(row.values, row.place)


def _format(row: Row, arguments: argparse.Namespace, formats: dict[str, str]) -> str:
    """Return the format that the first row of a source decides."""
    if arguments.format != "auto":
        return str(arguments.format)
    if row.place.source not in formats:
        formats[row.place.source] = detect(row, arguments.columns)
    return formats[row.place.source]
