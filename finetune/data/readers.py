"""Read the rows of files, saved data sets and Hub names, with file and line.

The standard library reads JSON Lines, JSON, CSV and text record by record, because an error must
name its line and "42" in a CSV must stay text. pyarrow reads Parquet and Arrow, openpyxl Excel;
`datasets` reads what `save_to_disk` wrote, and the Hub.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

from finetune import failures, places
from finetune.data import arrow_files, encodings, hub, remote, tables
from finetune.data.encodings import lines
from finetune.data.file_types import TABLES, TEXTS, has_lines, known_types, type_of
from finetune.data.places import Place, Row, printable, short, wrong
from finetune.errors import DataError

LIST_HINT = "; a file that holds one list is .json"
COMMA_HINT = "; the comma at its end belongs to a list, not to .jsonl"


def absent(name: str, key: str = "data.train") -> DataError:
    """Return the error for a name without a file, with what it may have meant."""
    takes = "data.train and data.eval take" if key.startswith("data.") else f"{key} takes"
    what = "files, folders, globs, URLs, or Hub names as owner/name[/subset][:split]"
    path = os.path.expanduser(name)
    folder, base = os.path.split(path)
    hint = ""
    if "\\" in name:
        hint = "; write / between folders"
    elif folder and not os.path.isdir(folder):
        hint = f"; the folder {printable(folder)} does not exist"
    elif near := places.nearest(folder, base):
        hint = f"; did you mean {printable(near)}?"
    elif hub.NAME.fullmatch(name):
        hint = f"; it was not searched on the Hub, because {printable(folder)} is a local folder"
    return DataError(
        f"{printable(name) or '(empty name)'}: no such file in "
        f"{printable(places.looked_in())}{hint}; {takes} {what}"
    )


def describe(source: str) -> str:
    """Return a file's name, and what is unusual about how it is read."""
    unusual = []
    if type_of(source) in (".csv", ".tsv"):
        usual = _usual_delimiter(source)
        delimiter, _, has_blanks = tables.dialect(source, usual)
        if delimiter != usual:
            unusual.append(f"separated by {tables.named(delimiter)}")
        if has_blanks:
            unusual.append("without the blanks after each separator")
    if type_of(source) == ".xlsx":
        first, *others = tables.sheets(source) or [""]
        more = f", not {', '.join(map(short, others))}" if others else ""
        unusual.append(f"sheet {short(first)}{more}")
    if has_lines(source) and not hub.is_name(source) and not os.path.isdir(source):
        encoding = encodings.encoding_of(source)
        if encoding != "utf-8":
            unusual.append(encoding.upper())
    return printable(source) + (f" ({', '.join(unusual)})" if unusual else "")


def read(source: str, text_unit: str = "line") -> Iterator[Row]:
    """Yield the rows of one source, in order. Raise DataError that names file and line."""
    for record in records(source, text_unit):
        if isinstance(record, DataError):
            raise record
        yield record


def records(source: str, text_unit: str = "line") -> Iterator[Row | DataError]:
    """Yield the rows of one source, in order, and a DataError in place of each wrong one.

    Raises DataError where a mistake hides where the next row begins.
    """
    with readable(source):
        empty = True
        for record in _records(source, text_unit):
            empty = False
            yield record
    if empty:
        raise wrong(source, "holds no rows; is it the right file?")


def _records(source: str, text_unit: str) -> Iterator[Row | DataError]:
    if hub.is_saved(source) or hub.is_name(source):
        return hub.read(source)
    if not remote.is_url(source) and not os.path.exists(source):
        raise absent(source)
    kind = type_of(source)
    if kind in TEXTS:
        return _read_text(source, text_unit)
    if kind not in READERS:
        raise wrong(source, f"unknown file type {kind!r}; use one of {known_types()}")
    return READERS[kind](source)


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    """Raise DataError, or Outage, for what opening and reading a source can raise."""
    try:
        with encodings.whole(source):
            yield
    except zlib.error as exc:
        raise wrong(source, f"damaged or incomplete: {exc}; create it again") from exc
    except OSError as exc:
        failures.reraise(exc, f"{printable(source)}: cannot be read now")
        raise wrong(source, f"cannot be read: {exc.strerror or exc}") from exc


def is_empty(row: Row) -> bool:
    """Return whether a row of a table is empty, as spreadsheets export them.

    In formats that name the columns in each row, an empty row is a mistake.
    """
    is_table = type_of(row.place.source) in TABLES
    return is_table and not any(map(str.strip, row.values.values()))


# ----------------------------------------------------------------------------------- file types


def _record(place: Place, value: Any) -> Row | DataError:
    if not isinstance(value, dict):
        hint = LIST_HINT if isinstance(value, list) and place.row == 0 else ""
        return wrong(place, f"a row should be an object like {{...}}, got {short(value)}{hint}")
    return Row(place, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raise ValueError for a key that is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{short(twice)!r} is given twice")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _read_jsonl(source: str) -> Iterator[Row | DataError]:
    for number, line in encodings.lines_or_errors(source):
        if isinstance(line, DataError):
            yield line
        elif line.strip():
            try:
                # `loads` makes a decoder for each line; it refuses a byte order mark by name.
                has_mark = line.startswith("\ufeff")
                value = json.loads(line) if has_mark else _DECODER.decode(line)
            except (ValueError, RecursionError) as exc:
                why = failures.parsing_reason(exc)
                if isinstance(exc, json.JSONDecodeError):
                    why = f"{exc.msg} at character {exc.pos + 1}"
                hint = COMMA_HINT if line.rstrip().endswith(",") else ""
                hint = LIST_HINT if line.lstrip().startswith("[") else hint
                what = f"broken JSON: {why}: {short(line.strip())}; correct or remove it{hint}"
                yield wrong(Place(source, number), what)
            else:
                yield _record(Place(source, number), value)


def _read_json(source: str) -> Iterator[Row | DataError]:
    """Yield the objects of a list; their places are row numbers."""
    text = "".join(line for _, line in lines(source))
    if not text.lstrip().startswith("["):
        what = "a .json file should hold a list of rows, [ {...}, ... ]"
        raise wrong(source, f"{what}; {_hint_of_object(text)}")
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as exc:
        line, why = "", failures.parsing_reason(exc)
        if isinstance(exc, json.JSONDecodeError):
            near = short(text[exc.pos : exc.pos + 81].strip())
            line, why = f":{exc.lineno}", f"{exc.msg} at column {exc.colno}: {near}"
        raise DataError(f"{printable(source)}{line}: broken JSON: {why}; correct it") from exc
    for number, value in enumerate(values, 1):
        yield _record(Place(source, 0, number), value)


def _hint_of_object(text: str) -> str:
    """Say how a .json file that holds no list becomes one."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text)
        inside = [key for key, each in value.items() if isinstance(each, list)]
        if inside:
            return f"this is an object: write the list under {short(inside[0])!r} alone"
    return "one object per line is .jsonl"


def _read_text(source: str, unit: str) -> Iterator[Row | DataError]:
    start, block = 1, []
    for number, line in chain(lines(source), [(0, "")]):  # the last ends any unit
        is_end = number == 0 or unit == "line" or (unit == "paragraph" and not line.strip())
        if unit != "paragraph" or line.strip():
            block.append(line)
        if is_end:
            if (text := "".join(block).strip("\r\n")).strip():
                yield Row(Place(source, start), {"text": text})
            start, block = number + 1, []


def _usual_delimiter(source: str) -> str:
    return "\t" if type_of(source) == ".tsv" else ","


def _read_csv(source: str) -> Iterator[Row | DataError]:
    return tables.read_csv(source, _usual_delimiter(source))


READERS: dict[str, Callable[[str], Iterator[Row | DataError]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".xlsx": tables.read_excel,
    ".parquet": arrow_files.read_parquet,
    ".arrow": arrow_files.read_arrow,
}
