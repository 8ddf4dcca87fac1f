"""Where a row stands in the user's files, and how messages show names and values."""

import json
from dataclasses import dataclass
from typing import Any

from finetune.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a row stands: `row` of a .json file, `line` of any other, from 1; the other is 0."""

    source: str
    line: int
    row: int = 0

    def __str__(self) -> str:
        name = printable(self.source)
        return f"{name} row {self.row}" if self.row else f"{name}:{self.line}"


@dataclass(frozen=True)
class Row:
    """One record of a user's file."""

    place: Place
    values: dict[str, Any]


def wrong(where: str | Place, what: str) -> DataError:
    """Return an error about a source, or about a row of it."""
    return DataError(f"{printable(str(where))}: {what}")


def some(paths: list[str], most: int = 3) -> str:
    """Name a few of many files: a, b, c and 4 others."""
    listed = ", ".join(printable(path) for path in paths[:most])
    others = len(paths) - most
    return listed + (f" and {others:,} others" if others > 0 else "")


def printable(text: str) -> str:
    """Escape what streams cannot write: undecodable bytes of file names, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode()


def short(value: Any, most: int = 80) -> str:
    """Shorten a value for an error message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return printable(f"{text[:most]}..." if len(text) > most else text)


def counted(number: int, noun: str) -> str:
    """Return "1 row is", "2 rows are"."""
    return f"1 {noun} is" if number == 1 else f"{number:,} {noun}s are"


def list_columns(columns: Any, most: int = 20) -> str:
    """List columns for an error message."""
    listed = list(columns)
    shown = str([short(name) for name in listed[:most]])
    return shown if len(listed) <= most else f"{shown[:-1]}, and {len(listed) - most:,} more]"
