"""Files written whole or not at all, with the mode that any other program would give them; their
hashes; notes in JSON.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def follow_umask(*paths: Path) -> None:
    """Give files that a library has made for their owner alone (safetensors, tempfile) the mode
    that the umask says.

    An empty file shows it: asking the umask itself means to change it, for every thread of the
    process.
    """
    modes: dict[Path, int] = {}
    for path in paths:
        if path.parent not in modes:
            probe = path.with_name(f".mode-{path.name}")
            probe.unlink(missing_ok=True)
            probe.touch()
            modes[path.parent] = probe.stat().st_mode & 0o777
            probe.unlink()
        path.chmod(modes[path.parent])


def require_writable(path: Path) -> None:
    """Raise the OSError now that `write_whole` would raise after the work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # opening a pipe would wait for its reader
        return
    if path.exists():
        path.open("ab").close()  # which changes nothing
    descriptor, temporary = _beside(path)
    os.close(descriptor)
    temporary.unlink()


def probe_folder(folder: Path) -> None:
    """Raise the OSError now that a new folder in this one would raise later: permissions do not
    tell of /proc, or of a quota.
    """
    os.rmdir(tempfile.mkdtemp(prefix=".writing-", dir=folder))


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Write a file next to its place and rename it, so that what was there stays until then. A link
    stays a link.

    `errors`: as in `open`. An OSError names a file: a full disk is found by a write, which names
    none.
    """
    if path.exists() and not path.is_file():  # a pipe or a device, which no file can replace
        path.write_text(text, encoding="utf-8")
        return
    descriptor, temporary = _beside(path)
    try:
        with open(descriptor, "w", encoding="utf-8", errors=errors) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        else:
            follow_umask(temporary)
        os.replace(temporary, os.path.realpath(path))
    except OSError as exc:
        exc.filename = exc.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, text: str) -> None:
    """Leave the whole new file or the whole old one, even after a crash."""
    write_whole(path, text, errors="surrogateescape")
    flush(path.parent)


def free_name(path: Path) -> Path:
    """Where a damaged file is kept: beside its place, and over no other."""
    ends = [".damaged", *(f".{number}.damaged" for number in range(1, 1000))]
    names = (path.with_name(path.name + end) for end in ends)
    return next(name for name in names if not os.path.lexists(name))


def _beside(path: Path) -> tuple[int, Path]:
    """A new file in the folder where `path`, or what it links to, lies."""
    real = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".writing-{real.name[-100:]}-", dir=real.parent
    )
    return descriptor, Path(temporary)


def read_note(path: Path) -> tuple[dict[str, Any], str | None]:
    """(the object that a JSON file holds, what is wrong with the file); an empty one where it
    cannot be read.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, "is missing"
    except OSError as exc:
        return {}, f"cannot be read ({exc.strerror})"
    except (ValueError, RecursionError):
        return {}, "is damaged: it is not JSON"
    return (values, None) if isinstance(values, dict) else ({}, "is damaged: it holds no object")


def flush(path: Path) -> None:
    """Send what was written to a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash a file without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(values: Mapping[str, Any]) -> str:
    """Hash what a JSON object holds, in any order of its keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
