"""Turn the bytes of a file into lines of text: compression, byte order marks, encodings."""

import bz2
import codecs
import contextlib
import functools
import gzip
import io
import lzma
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune.data import remote
from finetune.data.file_types import compression_of, known_types, type_of
from finetune.data.places import Place, printable, short, wrong
from finetune.errors import DataError

# The first bytes of files that are not text, whatever their name.
SIGNATURES = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
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
# Encodings of spreadsheets, exports and old web pages. Others are not guessed: in a short sample
# almost any bytes are valid in some of the hundred that exist.
GUESSED = (
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r cp932 gb18030 big5 cp949 euc_jp "
    "mac_roman cp850"
).split()
SAMPLE = 1 << 16  # bytes from which an encoding is guessed
CHUNK = 1 << 20


def opened(source: str) -> Any:
    """Open a file for its uncompressed bytes; `peek` shows the first of them."""
    path, compression = remote.local(source), compression_of(source)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    openers: dict[str | None, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(compression, open)(path, "rb")


def lines(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers, from 1. Raise DataError by line."""
    for number, line in lines_or_errors(source):
        if isinstance(line, DataError):
            raise line
        yield number, line


def lines_or_errors(source: str) -> Iterator[tuple[int, str | DataError]]:
    """Yield the lines of a text file, with a DataError in place of one that is not UTF-8."""
    encoding, number = encoding_of(source), 0
    with opened(source) as file:
        if encoding == "utf-8":
            _require_text(source, file.peek(1 << 13))
            saw_utf8 = False
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(codecs.BOM_UTF8)  # files that were joined have it anywhere
                try:
                    line = raw.decode("utf-8")
                    saw_utf8 = saw_utf8 or not line.isascii()
                    yield number, line
                except UnicodeDecodeError as exc:
                    yield number, wrong(Place(source, number), _not_utf8(raw, exc, saw_utf8))
            return
        try:
            with io.TextIOWrapper(file, encoding, newline="\n") as text:
                for number, line in enumerate(text, 1):
                    yield number, line
        except UnicodeError as exc:
            what = f"broken {encoding.upper()}: {exc.args[-1]}; is the file whole? Save it as UTF-8"
            raise wrong(Place(source, number + 1), what) from exc


def encoding_of(source: str) -> str:
    """Return the encoding of a text file: of its byte order mark, UTF-8, or a guess."""
    facts = os.stat(remote.local(source))
    return _encoding(source, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(10_000)
def _encoding(source: str, size: int, changed: int) -> str:
    """`size`, `changed`: of the file, so that one that is written anew is read again."""
    with opened(source) as file:
        start = file.peek(1 << 13)
        marked = next((encoding for mark, encoding in MARKS.items() if start.startswith(mark)), "")
        if marked:
            return marked
        guesses = [wide] if (wide := _of_two_bytes(start)) else []
        sample = None if guesses or b"\0" in start else _sample(file)
    if sample is not None:
        guesses = [guess for guess in (_guess(sample),) if guess]
    return next((guess for guess in guesses if _fits(source, guess)), "utf-8")


def _of_two_bytes(start: bytes) -> str | None:
    """Return UTF-16 without a byte order mark, where every other byte of a text is often 0."""
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) <= 0.3 * len(start) / 2:
        return None
    return "utf-16-le" if odd > even else "utf-16-be"


def _sample(file: Any) -> bytes | None:
    """Return bytes to guess the encoding from; None if the text is UTF-8, or was at first.

    If a file is UTF-8 up to a wrong byte, that byte is a mistake, not another encoding.
    """
    decoder, start = codecs.getincrementaldecoder("utf-8")(), b""
    while True:
        chunk = file.read(CHUNK)
        start = start or chunk[:SAMPLE]
        try:
            if chunk.isascii() and not decoder.getstate()[0]:
                text = ""
            else:
                text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as exc:
            raw = exc.object
            is_cut = exc.reason == "unexpected end of data" and not chunk
            if is_cut or not raw[: exc.start].isascii():
                return None
            return start + raw[max(0, exc.start - SAMPLE) : exc.start + SAMPLE]
        if not chunk or (text and not text.isascii()):
            return None


def _guess(sample: bytes) -> str | None:
    """Guess an encoding from how letters follow each other; among equals the Western one."""
    from charset_normalizer import from_bytes

    matches = from_bytes(sample, cp_isolation=list(GUESSED))
    best = matches.best()
    if best is None:
        return None
    equal = {name for each in matches if each.chaos <= best.chaos
             for name in (each.encoding, *each.could_be_from_charset)}  # fmt: skip
    return "cp1252" if "cp1252" in equal else str(best.encoding)


def _fits(source: str, encoding: str) -> bool:
    """Return whether all of a file can be decoded."""
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with opened(source) as file:
            while chunk := file.read(CHUNK):
                decoder.decode(chunk)
        decoder.decode(b"", final=True)
    except UnicodeError:
        return False
    return True


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
        raise wrong(Place(source, 1), "holds zero bytes: not text; save it as UTF-8")


def _not_utf8(raw: bytes, exc: UnicodeDecodeError, saw_utf8: bool) -> str:
    """Say what is wrong with a line, and what to do. `_encoding` has tried other encodings."""
    what = f"byte {raw[exc.start]:#04x} at position {exc.start + 1} is not UTF-8"
    if exc.reason == "unexpected end of data" and exc.end == len(raw):
        return f"{what}; the file ends inside a character; create it again"
    if saw_utf8 or any(byte >= 0x80 for byte in raw[: exc.start]):
        what = f"{what}; everything before it is UTF-8"
    shown = short(raw.decode("utf-8", "backslashreplace").strip())
    return f"{what}; correct this character, or save the file as UTF-8: {shown}"


def _converted(source: str) -> str:
    compression = compression_of(source)
    target = Path(source.removesuffix(compression) if compression else source)
    return printable(str(target.with_name(f"converted-{target.name}")))


@contextlib.contextmanager
def whole(source: str) -> Iterator[None]:
    """Raise DataError for a compressed file that ends too early or is damaged."""
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, lzma.LZMAError)
    try:
        yield
    except damaged as exc:
        raise wrong(source, f"damaged or incomplete: {exc}; create it again") from exc
    except OSError as exc:
        if compression_of(source) and exc.errno is None:  # bz2's and pyarrow's own
            raise wrong(source, f"damaged or incomplete: {exc}; create it again") from exc
        raise
