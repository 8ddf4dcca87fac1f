"""Write files whole or not at all, with the usual mode; hash them; read notes in JSON."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def follow_umask(*paths: Path) -> None:
    """Give files that a library made private (safetensors, tempfile) the mode of the umask.

    The mode of a new empty file shows the umask; os.umask would change it for every thread.
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
    """Raise the OSError that `write_whole` would raise, before the work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():  # opening a pipe would wait for its reader
        return
    if path.exists():
        path.open("ab").close()  # changes nothing
    descriptor, temporary = _beside(path)
    os.close(descriptor)
    temporary.unlink()


def probe_folder(folder: Path) -> None:
    """Raise the OSError of making a folder here; permissions alone miss /proc and quotas."""
    os.rmdir(tempfile.mkdtemp(prefix=".writing-", dir=folder))


def write_whole(path: Path, text: str, errors: str = "strict") -> None:
    """Replace a file at once: write a temporary file next to it, then rename. Links stay links.

    `errors`: as in `open`. An OSError names the file, which that of a full disk does not.
    """
    if path.exists() and not path.is_file():  # a pipe or a device, which must not be replaced
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` at the end of the block, unless it raises.

    An OSError names `path`. Links stay links.
    """
    descriptor, temporary = _beside(path)
    try:
        with open(descriptor, "wb") as file:
            yield file
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
    """Return an unused name beside a damaged file, to keep it."""
    endings = [".damaged", *(f".{number}.damaged" for number in range(1, 1000))]
    names = (path.with_name(path.name + ending) for ending in endings)
    return next(name for name in names if not os.path.lexists(name))


def _beside(path: Path) -> tuple[int, Path]:
    """Open a new file in the folder of `path`, or of what it links to."""
    real = Path(os.path.realpath(path))
    prefix = f".writing-{real.name[-100:]}-"
    descriptor, temporary = tempfile.mkstemp(prefix=prefix, dir=real.parent)
    return descriptor, Path(temporary)


def read_note(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return (the object that a JSON file holds, or {}; what is wrong with the file)."""
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
    """Sync a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hash a file without reading it into memory at once."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(values: Mapping[str, Any]) -> str:
    """Hash a JSON object; the order of its keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
