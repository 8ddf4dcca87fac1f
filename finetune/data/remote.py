"""Files in object stores, on the web and on the Hub: URLs that fsspec opens, copied once."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune import failures
from finetune.data.places import printable, wrong
from finetune.errors import DataError

_folder: list[Path] = []


def keep_in(cache_dir: str) -> None:
    """Copy files into this folder from now on; by default into the folder of data.cache_dir."""
    _folder[:] = [Path(cache_dir)]


def is_url(name: str) -> bool:
    """Return whether a name is a URL, as s3://bucket/rows.jsonl."""
    return "://" in name


def expand(url: str) -> list[str]:
    """Return the URLs of the files that a URL names: a file, a folder or a glob."""
    scheme = url.partition("://")[0]
    if scheme in ("http", "https"):  # a page that links to files looks like a folder
        return [url]
    with reached(url):
        files, path = system(url)
        if any(letter in path for letter in "*?["):
            found = sorted(p for p in files.glob(path) if not files.isdir(p))
        elif files.isdir(path):
            found = sorted(files.find(path))
        else:
            return [url]
        return [_with_scheme(scheme, each) for each in found]


def local(source: str) -> str:
    """Return the path of a file; a URL is copied unless this version of it was copied before."""
    if not is_url(source):
        return source
    with reached(source):
        files, path = system(source)
        version = f"{source} {files.ukey(path)}"
        name = hashlib.sha256(version.encode("utf-8", "replace")).hexdigest()[:24]
        folder = _cache() / "files"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{name}-{os.path.basename(path)[-100:]}"
        with FileLock(f"{folder / name}.lock"):
            if not target.exists():
                descriptor, temporary = tempfile.mkstemp(prefix=".copying-", dir=folder)
                os.close(descriptor)
                try:
                    files.get_file(path, temporary)
                    os.replace(temporary, target)
                finally:
                    Path(temporary).unlink(missing_ok=True)
        return str(target)


def _cache() -> Path:
    if _folder:
        return _folder[0].expanduser()
    home = Path(os.path.expanduser("~")) / ".cache" / "finetune"
    is_usable = os.access(next(p for p in (home, *home.parents) if p.exists()), os.W_OK)
    return home if is_usable else Path(tempfile.gettempdir()) / f"finetune-{os.getuid()}"


def _with_scheme(scheme: str, path: str) -> str:
    if scheme == "file":
        return path
    return path if "://" in path else f"{scheme}://{path.removeprefix('/')}"


def system(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it."""
    import fsspec

    found, path = fsspec.core.url_to_fs(url)
    return found, str(path)


@contextlib.contextmanager
def reached(url: str) -> Iterator[None]:
    """Translate what fsspec and its libraries raise into DataError, or Outage for a network."""
    try:
        yield
    except DataError:
        raise
    except ImportError as exc:  # fsspec's own, which names the package
        raise wrong(url, f"needs a package that is not installed: {exc}") from exc
    except FileNotFoundError as exc:
        raise wrong(url, "no such file; correct the name, or check that you may read it") from exc
    except Exception as exc:  # of as many kinds as there are protocols
        failures.reraise(exc, f"{printable(url)}: cannot be read now")
        what = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        raise wrong(url, f"fsspec cannot read it: {what}") from exc
