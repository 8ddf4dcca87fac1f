"""A file of JSON lines that one process appends to, and that a later start reads again.

file = LinesFile(path, "answer of a judge", "another folder", log)
known = dict(value for _, value in file.read(parsed))
file.append({"key": ...})
file.close()
"""

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

from finetune import failures
from finetune.data.places import printable, short
from finetune.errors import DataError, DirectoryInUse, UserError

Parsed = TypeVar("Parsed")
# What a function that parses a line may raise of a wrong one.
WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class LinesFile:
    """An open file, locked against other processes; any thread may read and append."""

    def __init__(
        self, path: Path, holds: str, elsewhere: str, log: Callable[[str], None],
        elsewhere_in_use: str = "",
    ) -> None:  # fmt: skip
        """`holds`: what a line is, and `elsewhere`: what to choose instead, in messages.

        Raises UserError if the file cannot be written, DirectoryInUse if another process writes it.
        """
        self._path, self._holds, self._log = path, holds, log
        self._shown, self._lock = printable(str(path)), threading.Lock()
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as exc:
            failures.reraise(exc, f"{self._shown}: cannot be written now")
            what = f"{self._shown}: cannot be written: {exc.strerror}"
            raise UserError(f"{what}; choose {elsewhere}") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            self._file.close()
            instead = elsewhere_in_use or elsewhere
            raise DirectoryInUse(
                f"{self._shown}: another process writes it; wait for it, or choose {instead}"
            ) from exc

    def read(self, parsed: Callable[[Any], Parsed]) -> Iterator[tuple[int, Parsed]]:
        """Yield (place, what `parsed` makes of its value) of each line.

        Cuts off a last line that a kill left unfinished. Closes the file and raises DataError for a
        line that `parsed` does not take.
        """
        self._file.seek(0)
        start = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                self._log(f"{self._shown}: the last line was not finished; it goes")
                self._file.truncate(start)
                break
            try:
                found = _value(line, parsed, f"{self._shown}:{number}", self._holds)
            except DataError:
                self._file.close()
                raise
            yield start, found
            start += len(line)

    def at(self, place: int) -> Any:
        """Return the value of the line at a place."""
        with self._lock:
            self._file.seek(place)
            return json.loads(self._file.readline())

    def append(self, values: Mapping[str, Any]) -> int:
        """Append a line, on the disk when this returns; return its place. Raises Outage."""
        data = json.dumps(values).encode() + b"\n"
        with self._lock, failures.writing(self._path):
            place = self._file.seek(0, os.SEEK_END)
            self._file.write(data)
            self._file.flush()
            os.fsync(self._file.fileno())
            return place

    def close(self) -> None:
        """Close the file, and remove it if it has no line. Raises Outage if the disk fails."""
        with failures.writing(self._path):  # what a full disk did not take is tried again
            try:
                if not self._file.closed and not self._file.seek(0, os.SEEK_END):
                    self._path.unlink(missing_ok=True)
            finally:
                self._file.close()


class LinesOfOthers(Generic[Parsed]):
    """What other processes append to files of theirs, as it comes.

    paths: returns the files; some may not exist yet. holds, parsed: as of LinesFile.
    """

    def __init__(
        self, paths: Callable[[], Iterable[Path]], holds: str, parsed: Callable[[Any], Parsed]
    ) -> None:
        self._paths, self._holds, self._parsed = paths, holds, parsed
        self._read: dict[Path, tuple[int, int]] = {}
        """Bytes and lines of each file."""

    def new(self) -> Iterator[Parsed]:
        """Yield the values of lines that were not there before. Raises DataError, Outage."""
        for path in self._paths():
            start, number = self._read.get(path, (0, 0))
            for line in _lines_from(path, start):
                start, number = start + len(line), number + 1
                where = f"{printable(str(path))}:{number}"
                yield _value(line, self._parsed, where, self._holds)
            self._read[path] = start, number


def _lines_from(path: Path, start: int) -> list[bytes]:
    """Return the whole lines of a file from a place on."""
    try:
        if path.stat().st_size <= start:
            return []
        with path.open("rb") as file:
            file.seek(start)
            return [line for line in file if line.endswith(b"\n")]
    except FileNotFoundError:
        return []
    except OSError as exc:
        failures.reraise(exc, f"{printable(str(path))}: cannot be read now")
        raise


def _value(line: bytes, parsed: Callable[[Any], Parsed], where: str, holds: str) -> Parsed:
    """Return what `parsed` makes of a line. Raises DataError for one that it does not take."""
    try:
        return parsed(json.loads(line))
    except WRONG as exc:
        row = short(line.decode("utf-8", "replace").rstrip())
        raise DataError(f"{where}: holds no {holds}: {row}; move the file away") from exc
