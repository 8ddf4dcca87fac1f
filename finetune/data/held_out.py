"""Write the rows that are held out of training, as they were given."""

import json
from pathlib import Path

from finetune import failures, files
from finetune.data import readers
from finetune.data.examples import Examples
from finetune.data.places import Row


def write(path: Path, held_out: Examples, text_unit: str) -> None:
    """Write the rows of these examples as JSON lines, in their order; whole or not at all.

    `evaluate --data` reads them as training would have. Raises Outage if the disk fails.
    """
    wanted: dict[int, set[tuple[int, int]]] = {}
    for source, line, row in zip(held_out.source, held_out.line, held_out.row):
        wanted.setdefault(int(source), set()).add((int(line), int(row)))
    with failures.writing(path), files.replacing(path) as file:
        for source, places in sorted(wanted.items()):
            for given in readers.read(held_out.sources[source], text_unit):
                if (given.place.line, given.place.row) in places:
                    file.write(_line(given))


def _line(row: Row) -> bytes:
    # Columns that are not read may hold dates and the like, which become text.
    text = json.dumps(row.values, ensure_ascii=False, default=str) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character in such a column, which JSON can only escape
        return (json.dumps(row.values, default=str) + "\n").encode()
