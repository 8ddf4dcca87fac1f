"""Read tables: a header that names the columns, and cells that are text."""

import contextlib
import csv
import datetime
import re
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from finetune import extras, failures
from finetune.data import encodings, remote
from finetune.data.places import Place, Row, list_columns, short, wrong
from finetune.errors import DataError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
# Tried where the header holds none of these: they are also in the names of columns.
RARE = {
    "^": "a caret", "~": "a tilde", ":": "a colon", "\x1f": "a unit separator", "\x01": "Ctrl-A",
    "§": "a section sign", "¦": "a broken bar",
}  # fmt: skip
SNIFFED_LINES = 100  # of a CSV, to find its delimiter
SNIFFED_CHARACTERS = 1 << 16  # of each of these lines
csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a book


class Dialect(NamedTuple):
    """How a CSV is written, judged by its first lines."""

    delimiter: str
    skipped: int
    """Lines before the header."""
    has_blanks: bool
    """Whether a blank follows each delimiter and belongs to it, as in `question, answer`."""


def named(delimiter: str) -> str:
    """Name a delimiter for messages."""
    return (DELIMITERS | RARE).get(delimiter, repr(delimiter))


def dialect(source: str, usual: str) -> Dialect:
    """Return how a CSV is written. `usual`: its delimiter where several fit."""
    first_lines = islice(encodings.lines(source), SNIFFED_LINES)
    lines = [line[:SNIFFED_CHARACTERS] for _, line in first_lines]
    delimiter, skipped = _delimiter(lines, usual)
    first = [line for line in lines[skipped:] if line.strip()][:1]
    header: list[str] = []
    with contextlib.suppress(csv.Error):  # reported with its line by `read_csv`
        header = next(csv.reader(first, delimiter=delimiter), [])
    names = [name for name in header[1:] if name.strip()]
    return Dialect(delimiter, skipped, bool(names) and all(name.startswith(" ") for name in names))


def _delimiter(lines: list[str], usual: str) -> tuple[str, int]:
    """Return what separates the cells of a CSV, and how many lines stand before its header.

    The delimiter is one that the header holds outside of quotes; of several, the one by which most
    rows have as many cells as the header. Excel's `sep=;` in the first line decides alone.
    """
    if lines and (named := re.fullmatch(r'"?sep=([^"\s\0])"?\s*', lines[0])):
        return named[1], 1

    def fit(delimiter: str) -> tuple[bool, bool, float, bool]:
        reader, is_broken = csv.reader(lines, delimiter=delimiter, strict=True), False
        rows: list[list[str]] = []
        try:
            rows.extend(cells for cells in reader if any(map(str.strip, cells)))
        except csv.Error:
            # A quote next to anything but this delimiter; or one that ends after these lines.
            is_broken = reader.line_num < SNIFFED_LINES
        header, rest = (rows[0], rows[1:]) if rows else ([], [])
        same = sum(len(cells) == len(header) for cells in rest) / max(1, len(rest))
        return len(header) > 1, not is_broken, same if len(header) > 1 else 0, delimiter == usual

    best = max(DELIMITERS, key=fit)
    if not fit(best)[0]:
        rare = max(RARE, key=fit)
        if fit(rare)[:3] == (True, True, 1.0):
            return rare, 0
    return best, 0


def read_csv(source: str, usual: str) -> Iterator[Row | DataError]:
    """Yield the rows of a CSV; a DataError for one with too few or too many cells."""
    delimiter, skipped, has_blanks = dialect(source, usual)
    lines = islice((line for _, line in encodings.lines(source)), skipped, None)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=has_blanks, strict=True)

    def records() -> Iterator[tuple[int, list[str]]]:
        """Yield each record with the line that it begins in."""
        start = skipped + 1
        try:
            for cells in reader:
                yield start, cells
                start = reader.line_num + skipped + 1
        except csv.Error as exc:
            what = f"broken CSV: {exc}; check the quotes of the row that begins here"
            raise wrong(Place(source, start), what) from exc

    yield from _rows(source, records(), delimiter)


def _rows(
    source: str, records: Iterator[tuple[int, list[str]]], delimiter: str | None
) -> Iterator[Row | DataError]:
    """Yield the rows below a header. `delimiter`: of a CSV, for messages."""
    # Excel exports empty rows, too.
    first = next((each for each in records if any(map(str.strip, each[1]))), None)
    if first is None:
        return
    header = _header(Place(source, first[0]), first[1])
    names = list(map(str.strip, first[1]))
    for start, cells in records:
        if cells and not any(map(str.strip, cells)):
            cells = [""] * len(header)  # spreadsheets write any number of separators
        place = Place(source, start)
        if list(map(str.strip, cells)) == names:
            what = "repeats the header; were files joined? Remove this line"
            yield wrong(place, what)
        elif cells and len(cells) != len(header):
            hint = f"put quotes around cells that hold {named(delimiter or ',')}"
            if any(cell.startswith(' "') for cell in cells):
                hint = "put the quote right after the separator, without a space"
            names_columns = f"the header names {len(header)} columns {list_columns(header)}"
            shown = short((delimiter or ",").join(cells))
            yield wrong(place, f"{len(cells)} cells, but {names_columns}; {hint}: {shown}")
        elif cells:
            yield Row(place, dict(zip(header, cells)))


def _header(place: Place, cells: list[str]) -> list[str]:
    """Return the names of the columns, stripped; columns without a name get their number."""
    header = [cell.strip() for cell in cells]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        listed = f"{list_columns(header)}; rename one"
        raise wrong(place, f"the header names the column {short(twice)!r} twice: {listed}")
    return [name or f"(column {number})" for number, name in enumerate(header, 1)]


# --------------------------------------------------------------------------------------- Excel


def read_excel(source: str) -> Iterator[Row | DataError]:
    """Yield the rows of the first sheet that holds any; cells become text, as in a CSV."""
    filled = _filled(_workbook(source))
    if filled:
        yield from _rows(source, _records(filled[0]), None)


def sheets(source: str) -> list[str]:
    """Return the sheets of a workbook that hold cells; the first of them is read."""
    return [sheet.title for sheet in _filled(_workbook(source))]


def _filled(book: Any) -> list[Any]:
    return [
        sheet for sheet in book.worksheets
        if any(value is not None for row in sheet.iter_rows(values_only=True) for value in row)
    ]  # fmt: skip


def _records(sheet: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the lines of a sheet, without empty cells behind the last column of its header.

    A format, or a comment far to the right, makes a sheet wider than its table.
    """
    width = 0
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        cells = [_as_text(value) for value in values]
        width = width or max((n for n, cell in enumerate(cells, 1) if cell.strip()), default=0)
        yield number, cells if any(cells[width:]) else cells[:width]


def _workbook(source: str) -> Any:
    """Load a workbook; translate what openpyxl raises for a damaged one into DataError."""
    extras.require("openpyxl", source)
    from openpyxl import load_workbook

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats and validation that it leaves out
            # Not read_only: that trusts the size that a sheet claims, which may be wrong.
            return load_workbook(remote.local(source), data_only=True)
    except Exception as exc:  # zipfile's, XML's, KeyError, ValueError: any, if damaged
        failures.reraise(exc, f"{source}: cannot be read now")
        what = f"not a whole Excel file: {short(str(exc))}; save it again, or as CSV"
        raise wrong(source, what) from exc


def _as_text(value: Any) -> str:
    """Return a cell as Excel shows it in its usual format: 42, not 42.0."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value)
