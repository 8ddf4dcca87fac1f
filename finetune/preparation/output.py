"""Write rows to a file of any type that training reads, whole or not at all, or to a pipe."""

import contextlib
import csv
import datetime
import decimal
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from finetune import failures, files
from finetune.data.places import printable, short
from finetune.errors import DataError, UserError

PIPE = "-"
TYPES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
GROUP = 10_000  # rows of a Parquet file written at once
Write = Callable[[Mapping[str, Any], Any], None]
"""Writes a row; the second argument says in errors where the row comes from."""


def type_of(path: str) -> str:
    """Return the type of an output. Raise UserError for one that cannot be written."""
    name = path.lower()
    if path == PIPE:
        return ".jsonl"
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in TYPES or name.endswith(".parquet.gz"):
        known = ", ".join([*TYPES, "any but .parquet with .gz"])
        raise UserError(f"--output: {printable(path)}: name a file that ends in {known}, or - ")
    return suffix


@contextlib.contextmanager
def writing(path: str) -> Iterator[Write]:
    """Yield a function that writes rows; after the block the file is there, whole."""
    kind = type_of(path)
    with contextlib.ExitStack() as stack:
        if path == PIPE:
            file: Any = sys.stdout.buffer
        else:
            stack.enter_context(failures.writing(Path(path)))
            file = stack.enter_context(files.replacing(Path(path)))
            if path.lower().endswith(".gz"):  # without the time, so that equal rows are equal files
                file = stack.enter_context(gzip.GzipFile("", "wb", 6, file, mtime=0))
        yield stack.enter_context(WRITERS[kind](file))
        file.flush()


def dumped(values: Mapping[str, Any], where: Any) -> bytes:
    """Return a row as JSON. Raise DataError that names the column JSON cannot hold."""
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False, default=_plain)
    except (TypeError, ValueError, RecursionError) as exc:
        raise DataError(f"{where}: this row cannot be written as JSON: {_column(values)}") from exc
    try:
        return text.encode()
    except UnicodeEncodeError:  # half a character, which JSON can only escape
        return json.dumps(values, default=_plain).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise TypeError


def _column(values: Mapping[str, Any]) -> str:
    for name, value in values.items():
        try:
            json.dumps(value, allow_nan=False, default=_plain)
        except (TypeError, ValueError, RecursionError):
            kind = type(value).__name__
            return f"column {short(name)!r} holds {value!r:.80} ({kind}); remove or change it"
    return "it is nested too deeply"


@contextlib.contextmanager
def _json_lines(file: BinaryIO) -> Iterator[Write]:
    yield lambda values, where: _put(file, dumped(values, where) + b"\n")


@contextlib.contextmanager
def _json_list(file: BinaryIO) -> Iterator[Write]:
    count = 0

    def write(values: Mapping[str, Any], where: Any) -> None:
        nonlocal count
        _put(file, (b",\n" if count else b"[\n") + dumped(values, where))
        count += 1

    yield write
    file.write(b"\n]\n" if count else b"[]\n")


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _table(delimiter: str) -> Any:
    @contextlib.contextmanager
    def table(file: BinaryIO) -> Iterator[Write]:
        header: list[str] = []
        text = io.TextIOWrapper(file, "utf-8", newline="", write_through=True)
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")

        def write(values: Mapping[str, Any], where: Any) -> None:
            if not header:
                header.extend(values)
                writer.writerow(header)
            if list(values) != header and set(values) != set(header):
                own, first = short(list(values), 300), short(header, 300)
                what = f"has the columns {own}, the first row {first}"
                raise DataError(f"{where}: a table has one header, but this row {what}; use .jsonl")
            writer.writerow([_cell(name, values[name], where) for name in header])

        yield write
        text.flush()
        text.detach()

    return table


def _cell(name: str, value: Any, where: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int | float | datetime.date | decimal.Decimal):
        return str(value)
    what = f"column {short(name)!r} holds {short(value)}, which no cell of a table can hold"
    raise DataError(f"{where}: {what}; write .jsonl or .parquet")


@contextlib.contextmanager
def _parquet(file: BinaryIO) -> Iterator[Write]:
    import pyarrow
    from pyarrow import parquet

    waiting: list[Mapping[str, Any]] = []
    places: list[Any] = []
    writer: Any = None

    def flush() -> None:
        nonlocal writer
        try:
            schema = writer.schema if writer else None
            table = pyarrow.Table.from_pylist(waiting, schema=schema)
        except (pyarrow.ArrowException, TypeError, OverflowError) as exc:
            what = f"rows from {places[0]} to {places[-1]} do not fit one table"
            raise DataError(f"{what}: {exc}; write .jsonl") from exc
        columns = {name for values in waiting for name in values}
        if unknown := columns - set(table.schema.names):
            what = f"rows from {places[0]} to {places[-1]} have columns that the first row lacks"
            raise DataError(f"{what}: {short(sorted(unknown), 300)}; write .jsonl")
        writer = writer or parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
        waiting.clear()
        places.clear()

    def write(values: Mapping[str, Any], where: Any) -> None:
        waiting.append(dict(values))
        places.append(where)
        if len(waiting) == GROUP:
            flush()

    yield write
    if waiting or writer is None:
        flush()
    writer.close()


WRITERS: dict[str, Any] = {
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
}
