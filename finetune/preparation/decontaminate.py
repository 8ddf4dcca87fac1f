"""Remove rows that overlap with evaluation rows, which a model must not have seen.

A row goes if, without the markers of its template, case and punctuation, it has

- the same words as an evaluation row, or as its question;
- nearly the same: at least 0.8 of all runs of three words that either has are shared;
- one run of 13 words of an evaluation row;
- runs of 8 words that cover half of an evaluation row, or half of its question.

Runs in more than 1% of the evaluation rows (at least 10), or in half of a few, count as a template.
"""

import argparse
from collections.abc import Callable

from finetune.data.overlap import Match, Overlap, Text
from finetune.data.places import Place
from finetune.errors import DataError
from finetune.preparation import frame as frames
from finetune.preparation import texts, workers
from finetune.preparation.frame import Frame

SHOWN = 10  # overlaps listed on stderr


def add_arguments(parser: argparse.ArgumentParser) -> None:
    frames.add_inputs(parser)
    what = "evaluation rows: files, folders or globs; may be given several times"
    parser.add_argument("--against", required=True, action="append", metavar="ROWS", help=what)
    frames.add_output(parser)
    frames.add_rejects(parser)
    frames.add_columns(parser, "compare")
    frames.add_workers(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    known: list[Place] = []
    against: list[Text] = []
    for row in frame.rows(frame.expanded(arguments.against, "--against"), "indexing"):
        known.append(row.place)
        against.append(texts.parts_of(row.values))
    if not any(asked.strip() or answered.strip() for asked, answered in against):
        raise DataError("--against: none of its rows holds text; is it the right file?")
    overlap = Overlap(against)
    frame.details["against"] = len(against)
    with frame.writing() as write:
        for rows, matches in workers.mapped_rows(
            frame.rows(title="comparing"), lambda row: texts.parts_of(row.values, frame.columns),
            _matcher, arguments.workers, overlap,
        ):  # fmt: skip
            for row, match in zip(rows, matches):
                if match is None:
                    write(row.values, row.place)
                    continue
                place = frame.shown(known[match.row])
                if frame.dropped.total() < SHOWN:
                    what = f"{match.rule} ({match.shared[:80]!r})"
                    frame.note(f"{frame.shown(row.place)} overlaps with {place}: {what}")
                frame.drop(row, match.rule, overlaps=place, shared=match.shared)


def _matcher(overlap: Overlap) -> Callable[[list[Text]], list[Match | None]]:
    return overlap.matches
