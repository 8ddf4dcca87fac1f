"""Find the files that data.train and data.eval name, and read their rows with file and line.

The standard library reads JSON Lines, JSON, CSV and text record by record, because an error must
name its line and "42" in a CSV must stay text. pyarrow reads Parquet; `datasets` reads what
`save_to_disk` wrote, and the Hub.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from finetune import failures, places
from finetune.errors import DataError

# Types that other tools read. A name with such an ending means a file, even a missing one.
OTHER_TYPES = (
    ".7z .arrow .avro .bin .bz2 .db .doc .docx .epub .feather .gz .h5 .hdf5 .htm .html .jl "
    ".jsonlines .log .lz4 .md .ndjson .npy .npz .ods .orc .pdf .pkl .psv .pt .rar .rtf .sql "
    ".sqlite .tar .tex .text .tgz .xls .xlsx .xml .xz .yaml .yml .zip .zst"
).split()
DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
SNIFFED_LINES = 100  # of a CSV, to find its delimiter
SNIFFED_CHARACTERS = 1 << 16  # of each of these lines
LIST_HINT = "; a file that holds one list is .json"
PARQUET_BYTES = 64 << 20  # read at once: a row may be a book
# The first bytes of files that are not text, whatever their name.
SIGNATURES = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"%PDF": "a PDF",
    b"SQLite format 3": "an SQLite database",
}
MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(:.+)?")
csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a book


@dataclass(frozen=True)
class Place:
    """Where a row stands: `row` of a .json file, `line` of any other, from 1; the other is 0."""

    source: str
    line: int
    row: int = 0

    def __str__(self) -> str:
        name = printable(self.source)
        return f"{name} row {self.row}" if self.row else f"{name}:{self.line}"


def wrong(where: str | Place, what: str) -> DataError:
    """Return an error about a source, or about a row of it."""
    return DataError(f"{printable(str(where))}: {what}")


@dataclass(frozen=True)
class Row:
    """One record of a user's file."""

    place: Place
    values: dict[str, Any]


def some(paths: list[str], most: int = 3) -> str:
    """Name a few of many files: a, b, c and 4 others."""
    listed = ", ".join(printable(path) for path in paths[:most])
    others = len(paths) - most
    return listed + (f" and {others:,} others" if others > 0 else "")


def is_hub_name(name: str) -> bool:
    """Return whether a name is owner/name[:split] of the Hub, and not that of a missing file."""
    if os.path.lexists(name) or not _HUB_NAME.fullmatch(name):
        return False
    owner, _, rest = name.partition(":")[0].partition("/")
    looks_like_file = Path(rest).suffix.lower() in (*READERS, *OTHER_TYPES)
    return not looks_like_file and not os.path.isdir(owner)


def absent(name: str, key: str = "data.train") -> DataError:
    takes = "data.train and data.eval take" if key.startswith("data.") else f"{key} takes"
    what = "files, folders, globs, or Hub names as owner/name[:split]"
    path = os.path.expanduser(name)
    folder, base = os.path.split(path)
    hint = ""
    if "://" in name:
        hint = "; URLs are not supported: download the file first"
    elif "\\" in name:
        hint = "; write / between folders"
    elif folder and not os.path.isdir(folder):
        hint = f"; the folder {printable(folder)} does not exist"
    elif near := places.nearest(folder, base):
        hint = f"; did you mean {printable(near)}?"
    elif _HUB_NAME.fullmatch(name):
        hint = f"; it was not searched on the Hub, because {printable(folder)} is a local folder"
    return DataError(
        f"{printable(name) or '(empty name)'}: no such file in "
        f"{printable(places.looked_in())}{hint}; {takes} {what}"
    )


def describe(source: str) -> str:
    """Return a file's name, and what is unusual about how it is read."""
    unusual = []
    if type_of(source) in (".csv", ".tsv"):
        delimiter, _, has_blanks = _dialect(source)
        if delimiter != ("\t" if type_of(source) == ".tsv" else ","):
            unusual.append(f"separated by {DELIMITERS.get(delimiter, repr(delimiter))}")
        if has_blanks:
            unusual.append("without the blanks after each separator")
    if os.path.isfile(source) and type_of(source) != ".parquet":
        with _opened(source) as file:
            encoding = _encoding_by_mark(file)
        if encoding:
            unusual.append(encoding.upper())
    return printable(source) + (f" ({', '.join(unusual)})" if unusual else "")


# ---------------------------------------------------------------------------------------- rows


def read(source: str, text_unit: str = "line") -> Iterator[Row]:
    """Yield the rows of one source, in order. Raise DataError that names file and line."""
    if is_saved(source) or is_hub_name(source):
        rows = _read_with_datasets(source)
    elif not os.path.exists(source):
        raise absent(source)
    elif type_of(source) not in READERS:
        raise wrong(source, f"unknown file type {type_of(source)!r}; use one of {known_types()}")
    elif type_of(source) == ".txt":
        rows = _read_text(source, text_unit)
    else:
        rows = READERS[type_of(source)](source)
    empty = True
    with readable(source):
        for row in rows:
            empty = False
            yield row
    if empty:
        raise wrong(source, "holds no rows; is it the right file?")


@contextlib.contextmanager
def readable(source: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as exc:
        raise wrong(source, f"damaged or incomplete: {exc}; create it again") from exc
    except OSError as exc:
        failures.reraise(exc, f"{printable(source)}: cannot be read now")
        raise wrong(source, f"cannot be read: {exc.strerror or exc}") from exc


def type_of(source: str) -> str:
    """Return the ending that decides how to read a file; .gz is looked through for lines."""
    name = os.path.basename(source).lower()
    inner = name.removesuffix(".gz")
    suffix = Path(inner).suffix
    is_readable = inner == name or suffix in (".jsonl", ".json", ".csv", ".tsv", ".txt")
    return suffix if is_readable else ".gz"


def is_text(source: str) -> bool:
    """Return whether data.text_unit applies to a source."""
    return type_of(source) == ".txt"


def known_types() -> str:
    return " ".join(READERS)


def _opened(source: str) -> Any:
    return gzip.open(source, "rb") if source.lower().endswith(".gz") else open(source, "rb")


def _encoding_by_mark(file: Any) -> str | None:
    """Return utf-16 or utf-32 where a file begins with its byte order mark, else None."""
    start = file.peek(4)[:4]
    return next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), None)


def _lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield lines with their numbers; UTF-8, or the encoding of the byte order mark."""
    with _opened(source) as file:
        if encoding := _encoding_by_mark(file):
            yield from _marked_lines(source, file, encoding)
            return
        _require_text(source, file.peek(1 << 13))
        saw_utf8 = False
        for number, raw in enumerate(file, 1):
            try:
                line = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
            except UnicodeDecodeError as exc:
                what = f"byte {raw[exc.start]:#04x} at position {exc.start + 1} is not UTF-8"
                remedy = _remedy(source, raw, exc, saw_utf8)
                raise wrong(Place(source, number), f"{what}; {remedy}") from exc
            saw_utf8 = saw_utf8 or not line.isascii()
            yield number, line


def _marked_lines(source: str, file: IO[bytes], encoding: str) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with io.TextIOWrapper(file, encoding, newline="\n") as text:
            for number, line in enumerate(text, 1):
                yield number, line
    except UnicodeError as exc:
        what = f"broken {encoding.upper()}: {exc.args[-1]}; is the file whole? Save it as UTF-8"
        raise wrong(Place(source, number + 1), what) from exc


def _require_text(source: str, start: bytes) -> None:
    """Raise DataError for a file whose first bytes are not of the type that its name says."""
    for signature, what in SIGNATURES.items():
        if start.startswith(signature):
            remedy = f"export it as one of {known_types()}"
            raise wrong(source, f"this file is {what}, not {type_of(source)}; {remedy}")
    if b"\r" in start[:-1] and b"\n" not in start:
        what = "lines end in CR alone, as on an old Macintosh; convert them, for example with"
        command = f"tr '\\r' '\\n' < {printable(source)} > {_converted(source)}"
        raise wrong(Place(source, 1), f"{what} {command}")
    if b"\0" in start:
        even, odd = start[::2].count(0), start[1::2].count(0)
        probable = "not text"
        if max(even, odd) > 0.3 * len(start) / 2:
            command = _iconv(source, "UTF-16LE" if odd > even else "UTF-16BE")
            what = "probably UTF-16 without a byte order mark; save it as UTF-8"
            probable = f"{what}, for example with {command}"
        raise wrong(Place(source, 1), f"holds zero bytes: {probable}")


def _remedy(source: str, raw: bytes, exc: UnicodeDecodeError, saw_utf8: bool) -> str:
    if exc.reason == "unexpected end of data" and exc.end == len(raw):
        return "the file ends inside a character; create it again"
    if saw_utf8 or any(byte >= 0x80 for byte in raw[: exc.start]):
        return "everything before it is UTF-8; correct this character, or save the file as UTF-8"
    around = raw[max(0, exc.start - 1000) : exc.start + 1000]
    with _opened(source) as file:
        guess = _probable_encoding(file.read(1 << 16) + around)
    if guess is None:
        return "save the file as UTF-8"
    command = _iconv(source, guess)
    return f"the file is probably {guess}; save the file as UTF-8, for example with {command}"


def _iconv(source: str, encoding: str) -> str:
    return f"iconv -f {encoding.upper()} -t UTF-8 {printable(source)} > {_converted(source)}"


def _converted(source: str) -> str:
    target = Path(source.removesuffix(".gz"))
    return printable(str(target.with_name(f"converted-{target.name}")))


def _probable_encoding(sample: bytes) -> str | None:
    """Guess an encoding: cp1252 where few letters are outside ASCII, else by byte statistics.

    Latin-1 is a part of cp1252.
    """
    letters = [byte for byte in sample if byte >= 0x80 or chr(byte).isalpha()]
    if sum(byte >= 0x80 for byte in letters) < 0.4 * len(letters):
        return "cp1252"
    with contextlib.suppress(ImportError):
        from charset_normalizer import from_bytes

        best = from_bytes(sample).best()
        return best.encoding if best else None
    return None


def _record(place: Place, value: Any) -> Row:
    if not isinstance(value, dict):
        hint = LIST_HINT if isinstance(value, list) and place.row == 0 else ""
        raise wrong(place, f"a row should be an object like {{...}}, got {short(value)}{hint}")
    return Row(place, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object. Raise ValueError for a key that is given twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{short(twice)!r} is given twice")
    return values


def _read_jsonl(source: str) -> Iterator[Row]:
    for number, line in _lines(source):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as exc:
                why = failures.parsing_reason(exc)
                if isinstance(exc, json.JSONDecodeError):
                    why = f"{exc.msg} at character {exc.pos + 1}"
                hint = LIST_HINT if line.lstrip().startswith("[") else ""
                what = f"broken JSON: {why}: {short(line.strip())}; correct or remove it{hint}"
                raise wrong(Place(source, number), what) from exc
            yield _record(Place(source, number), value)


def _read_json(source: str) -> Iterator[Row]:
    """Yield the objects of a list; their places are row numbers."""
    text = "".join(line for _, line in _lines(source))
    if not text.lstrip().startswith("["):
        what = "a .json file should hold a list of rows, [ {...}, ... ]"
        raise wrong(source, f"{what}; one object per line is .jsonl")
    try:
        values = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as exc:
        line, why = "", failures.parsing_reason(exc)
        if isinstance(exc, json.JSONDecodeError):
            line, why = f":{exc.lineno}", f"{exc.msg} at column {exc.colno}"
        raise DataError(f"{printable(source)}{line}: broken JSON: {why}; correct it") from exc
    for number, value in enumerate(values, 1):
        yield _record(Place(source, 0, number), value)


class _Dialect(NamedTuple):
    """How a CSV is written, judged by its first lines."""

    delimiter: str
    skipped: int
    """Lines before the header."""
    has_blanks: bool
    """Whether a blank follows each delimiter and belongs to it, as in `question, answer`."""


def _dialect(source: str) -> _Dialect:
    lines = [line[:SNIFFED_CHARACTERS] for _, line in islice(_lines(source), SNIFFED_LINES)]
    delimiter, skipped = _delimiter(lines, "\t" if type_of(source) == ".tsv" else ",")
    first = [line for line in lines[skipped:] if line.strip()][:1]
    header = next(csv.reader(first, delimiter=delimiter), [])
    names = [name for name in header[1:] if name.strip()]
    return _Dialect(delimiter, skipped, bool(names) and all(name.startswith(" ") for name in names))


def _delimiter(lines: list[str], usual: str) -> tuple[str, int]:
    """Return what separates the cells of a CSV, and how many lines stand before its header.

    The delimiter is one that the header holds outside of quotes; of several, the one by which most
    rows have as many cells as the header. Excel's `sep=;` in the first line decides alone.
    """
    if lines and (named := re.fullmatch(r'"?sep=(.)"?\s*', lines[0])):
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

    return max(DELIMITERS, key=fit), 0


def _read_csv(source: str) -> Iterator[Row]:
    delimiter, skipped, has_blanks = _dialect(source)
    lines = islice((line for _, line in _lines(source)), skipped, None)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=has_blanks, strict=True)
    start = skipped + 1
    try:
        # Excel exports empty rows, too.
        cells = next((cells for cells in reader if any(map(str.strip, cells))), None)
        if not cells:
            return
        header = _header(Place(source, reader.line_num + skipped), cells)
        names = list(map(str.strip, cells))
        start = reader.line_num + skipped + 1
        for cells in reader:
            if cells and not any(map(str.strip, cells)):
                cells = [""] * len(header)  # spreadsheets write any number of separators
            if list(map(str.strip, cells)) == names:
                what = "repeats the header; were files joined? Remove this line"
                raise wrong(Place(source, start), what)
            if cells and len(cells) != len(header):
                name = DELIMITERS.get(delimiter, repr(delimiter))
                hint = f"put quotes around cells that hold {name}"
                if any(cell.startswith(' "') for cell in cells):
                    hint = "put the quote right after the separator, without a space"
                names_columns = f"the header names {len(header)} columns {list_columns(header)}"
                what = f"{len(cells)} cells, but {names_columns}; {hint}"
                raise wrong(Place(source, start), what)
            if cells:
                yield Row(Place(source, start), dict(zip(header, cells)))
            start = reader.line_num + skipped + 1
    except csv.Error as exc:
        what = f"broken CSV: {exc}; check the quotes of the row that begins here"
        raise wrong(Place(source, start), what) from exc


def is_empty(row: Row) -> bool:
    """Return whether a row of a table is empty, as spreadsheets export them.

    In formats that name the columns in each row, an empty row is a mistake.
    """
    is_table = type_of(row.place.source) in (".csv", ".tsv")
    return is_table and not any(map(str.strip, row.values.values()))


def _header(place: Place, cells: list[str]) -> list[str]:
    """Return the names of the columns, stripped; columns without a name get their number."""
    header = [cell.strip() for cell in cells]
    twice = next((name for name in header if name and header.count(name) > 1), None)
    if twice:
        listed = f"{list_columns(header)}; rename one"
        raise wrong(place, f"the header names the column {short(twice)!r} twice: {listed}")
    return [name or f"(column {number})" for number, name in enumerate(header, 1)]


def _read_text(source: str, unit: str) -> Iterator[Row]:
    start, block = 1, []
    for number, line in chain(_lines(source), [(0, "")]):  # the last ends any unit
        is_end = number == 0 or unit == "line" or (unit == "paragraph" and not line.strip())
        if unit != "paragraph" or line.strip():
            block.append(line)
        if is_end:
            if (text := "".join(block).strip("\r\n")).strip():
                yield Row(Place(source, start), {"text": text})
            start, block = number + 1, []


def _read_parquet(source: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(source)
        columns = file.schema_arrow.names
        if len(set(columns)) < len(columns):
            raise wrong(source, f"names a column twice: {list_columns(columns)}; rename one")
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        size = sum(group.total_byte_size for group in groups) // max(1, file.metadata.num_rows)
        number = 0
        at_once = min(1_000, max(1, PARQUET_BYTES // max(1, size)))
        for batch in file.iter_batches(batch_size=at_once):
            for values in batch.to_pylist():
                number += 1
                yield Row(Place(source, number), values)
    except ArrowException as exc:
        raise wrong(source, f"not a whole Parquet file: {exc}; create it again") from exc


READERS: dict[str, Callable[[str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".txt": lambda source: _read_text(source, "line"),
}


def is_saved(path: str) -> bool:
    """Return whether datasets.Dataset.save_to_disk wrote a folder."""
    files = (os.path.join(path, name) for name in ("state.json", "dataset_info.json"))
    return all(map(os.path.isfile, files))


def _read_with_datasets(source: str) -> Iterator[Row]:
    for number, values in enumerate(_load_dataset(source), 1):
        yield Row(Place(source, number), values)


def hub_fingerprint(source: str) -> str:
    """Return a hash of what a Hub name holds."""
    return str(_load_dataset(source)._fingerprint)


def _load_dataset(source: str) -> Any:
    """Load a data set of save_to_disk, or a Hub name with an optional :split."""
    import datasets

    datasets.disable_progress_bars()
    name, _, split = source.partition(":")
    try:
        if is_saved(source):
            return datasets.load_from_disk(source)
        return datasets.load_dataset(name, split=split or "train")
    except Exception as exc:  # of a dozen kinds, many of them plain ValueError and OSError
        if is_saved(source):
            raise wrong(source, f"damaged: {type(exc).__name__}: {short(str(exc))}") from exc
        failures.reraise(exc, f"{source}: datasets cannot load it now, {NO_HUB}")
        raise DataError(
            f"{source}: datasets cannot load it: {type(exc).__name__}: {exc}; {NO_HUB}"
        ) from exc


NO_HUB = (
    "without the Hub give a file or a folder, set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1 to "
    "use what was downloaded before"
)


# --------------------------------------------------------------------------------------- words


def printable(text: str) -> str:
    """Escape what streams cannot write: undecodable bytes of file names, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: Any, most: int = 80) -> str:
    """Shorten a value for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(f"{text[:most]}..." if len(text) > most else text)


def list_columns(columns: Any, most: int = 20) -> str:
    """List columns for an error message."""
    listed = list(columns)
    shown = str([short(name) for name in listed[:most]])
    return shown if len(listed) <= most else f"{shown[:-1]}, and {len(listed) - most:,} more]"
