"""What the ending of a file's name says: how to read the file, and how it is compressed."""

import functools
import os
from pathlib import Path

# Ending -> the type that says how to read it.
TYPES = {
    **{each: each for each in (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".xlsx")},
    **{each: each for each in (".txt", ".md")},
    ".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".jl": ".jsonl", ".psv": ".csv",
    ".feather": ".arrow", ".xlsm": ".xlsx", ".markdown": ".md", ".text": ".txt",
}  # fmt: skip
TABLES = (".csv", ".tsv", ".xlsx")
TEXTS = (".txt", ".md")
LINES = (".jsonl", ".json", ".csv", ".tsv", *TEXTS)  # lines of text, which may be compressed
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
# Types that other tools read. A name with such an ending means a file, even a missing one.
OTHER_TYPES = (
    ".7z .avro .bin .db .doc .docx .epub .h5 .hdf5 .htm .html .log .lz4 .npy .npz .ods .orc .pdf "
    ".pkl .pt .rar .rtf .sql .sqlite .tar .tex .tgz .xls .xml .yaml .yml .zip"
).split()


@functools.lru_cache(10_000)
def type_of(source: str) -> str:
    """Return the type that decides how to read a file; the ending itself if none is known.

    Files of lines may be compressed: rows.jsonl.gz is read as .jsonl.
    """
    name = os.path.basename(_without_query(source)).lower()
    inner, ending = os.path.splitext(name)
    if ending not in COMPRESSIONS:
        return TYPES.get(ending, ending)
    suffix = Path(inner).suffix
    found = TYPES.get(suffix, suffix)
    return found if found in LINES else ending


def compression_of(source: str) -> str | None:
    """Return the ending that says how a file is compressed, or None."""
    ending = os.path.splitext(_without_query(source).lower())[1]
    return ending if ending in COMPRESSIONS else None


def _without_query(source: str) -> str:
    """Return a URL without what follows its path: https://host/rows.csv?download=true."""
    return source.partition("?")[0] if "://" in source else source


def is_text(source: str) -> bool:
    """Return whether data.text_unit applies to a source."""
    return type_of(source) in TEXTS


def has_lines(source: str) -> bool:
    """Return whether a source consists of lines of text."""
    return type_of(source) in LINES


def known_types() -> str:
    """List the types, for messages."""
    return " ".join(dict.fromkeys(TYPES.values()))
