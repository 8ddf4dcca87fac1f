"""Write the rows that are held out of training, as they were given."""

import json
from itertools import groupby
from pathlib import Path

from finetune import failures, files
from finetune.data import readers
from finetune.data.examples import Examples
from finetune.data.places import Row
from finetune.data.stream import StreamedExamples


def write(path: Path, held_out: Examples | StreamedExamples, text_unit: str) -> None:
    """Write the rows of these examples as JSON lines, in their order; whole or not at all.

    `evaluate --data` reads them as training would have. The examples stand in the order of their
    rows, so that any number takes no memory. Raises Outage if the disk fails.
    """
    wanted = (place for place, _ in groupby(held_out.places()))
    following = next(wanted, None)
    with failures.writing(path), files.replacing(path) as file:
        for number, source in enumerate(held_out.sources):
            if following is None or following[0] != number:
                continue
            for given in readers.read(source, text_unit):
                if following == (number, given.place.line, given.place.row):
                    file.write(_line(given))
                    following = next(wanted, None)


def _line(row: Row) -> bytes:
    # Columns that are not read may hold dates and the like, which become text.
    text = json.dumps(row.values, ensure_ascii=False, default=str) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character in such a column, which JSON can only escape
        return (json.dumps(row.values, default=str) + "\n").encode()
