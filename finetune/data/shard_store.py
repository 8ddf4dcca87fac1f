"""Shards in an object store: put there once, and fetched into a bounded folder of this machine.

An entry is whole in the store once its META is there, which is put last; what arrives is compared
with the hash of META that the layout has, and META has those of the arrays.
"""

import functools
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune import failures, files, object_store
from finetune.data import examples as entries
from finetune.data.layout import INDEX
from finetune.errors import ConfigError, FinetuneError, Outage

SETTING = "data.shards"
WAITS_SECONDS = (1, 5, 20)  # before the second and later attempts
AT_ONCE = 4  # shards that are fetched together


class ShardStore:
    """The shards of one stream in an object store, as far as a folder holds copies of them."""

    def __init__(self, url: str, folder: Path, most_bytes: int | None = None) -> None:
        """`folder`: of the stream on this machine. `most_bytes`: of all copies; None: any."""
        self._root_url, self.url = url, f"{url.rstrip('/')}/{folder.name}"
        self.folder, self.most_bytes = folder, most_bytes
        self._threads = ThreadPoolExecutor(AT_ONCE, "shards")
        self._under_way: list[Future[None]] = []
        self._lock = threading.Lock()

    @functools.cached_property
    def _system(self) -> tuple[Any, str]:
        system, root = object_store.opened(self._root_url, SETTING, "data.cache_dir")
        return system, f"{root.rstrip('/')}/{self.folder.name}"

    def check(self) -> None:
        """Write, list, read and remove a small object. Raise ConfigError, or Outage."""
        object_store.check(*self._system, SETTING, self.url, Outage)

    def holds(self, name: str, last: str = entries.META) -> bool:
        """Return whether an entry is whole in the store; `last`: the file that is put last."""
        system, path = self._system
        return bool(self._tried(lambda: system.exists(f"{path}/{name}/{last}")))

    def holds_all(self, names: Iterable[str]) -> bool:
        """Return whether these entries are whole in the store: a request for a hundred of them."""
        system, path = self._system
        found = set(self._tried(lambda: _paths(system.find, path)))
        return all(f"{path}/{name}/{entries.META}" in found for name in names)

    def put(self, name: str, last: str = entries.META) -> None:
        """Copy an entry of the folder into the store."""
        _, path = self._system
        names = [each.name for each in (self.folder / name).iterdir() if each.is_file()]
        for each in sorted(names, key=lambda each: each == last):
            here = str(self.folder / name / each)
            self._tried(functools.partial(self._put_file, here, f"{path}/{name}/{each}"))

    def _put_file(self, here: str, there: str) -> None:
        system = self._system[0]
        system.put_file(here, there, **object_store.in_parts(system, [here]))

    def fetch(self, name: str, sha256: str | None = None, last: str = entries.META) -> None:
        """Copy an entry into the folder, unless it is there.

        `sha256`: of its file `last`. Raises Outage if it arrives with another one.
        """
        if (self.folder / name / last).is_file():
            return
        with FileLock(f"{self.folder}/.fetching-{name}.lock"):
            if (self.folder / name / last).is_file():
                return
            # Not as half-built entries are named, which a build of other sequences removes.
            build = self.folder / f".fetching-{name}"
            shutil.rmtree(build, ignore_errors=True)  # of a process that was killed
            build.mkdir(parents=True)
            try:
                self._get_all(name, build, last)
                if sha256 is not None and files.sha256(build / last) != sha256:
                    raise Outage(
                        f"data.shards: {self.url}/{name} is not what was put there; remove it, "
                        "and run the same command again"
                    )
                shutil.rmtree(self.folder / name, ignore_errors=True)
                os.rename(build, self.folder / name)
            finally:
                shutil.rmtree(build, ignore_errors=True)

    def fetch_file(self, path: Path) -> Path:
        """Copy one file of an entry, which need not be here, and return the copy: `trim` keeps it.

        `path`: where the file stands if its entry is here.
        """
        system, there = self._system
        name = path.parent.name
        copy = self.folder / f"{name}-{path.name}"
        if not copy.is_file():
            build = self.folder / f".fetching-{copy.name}-{secrets.token_hex(4)}"
            self._tried(
                functools.partial(system.get_file, f"{there}/{name}/{path.name}", str(build))
            )
            os.replace(build, copy)
        return copy

    def _get_all(self, name: str, build: Path, last: str) -> None:
        system, path = self._system
        listed = self._tried(lambda: _paths(system.ls, f"{path}/{name}"))
        if f"{path}/{name}/{last}" not in listed:
            raise Outage(
                f"{SETTING}: {self.url}/{name} is gone; run the same command again: it will be "
                "made anew"
            )
        for there in listed:
            here = str(build / os.path.basename(there))
            self._tried(functools.partial(system.get_file, there, here))

    def prefetch(self, wanted: Iterable[tuple[str, str]]) -> None:
        """Fetch (entry, hash of its META) in the background, and what waits of earlier calls not.

        Errors come when an entry is needed.
        """
        with self._lock:
            for future in self._under_way:
                future.cancel()
            self._under_way = [self._threads.submit(self.fetch, *each) for each in wanted]

    def wait(self) -> None:
        """Wait until all that was asked for is fetched. Raise what went wrong."""
        for future in self._under_way:
            future.result()

    def trim(self, kept: Mapping[str, int]) -> None:
        """Remove copies, the least recently used first, until all fit with those that are `kept`.

        `kept`: entry -> bytes, whether it is there or will be.
        """
        if self.most_bytes is None:
            return
        sizes = {
            path: _size(path) for path in self.folder.iterdir()
            # What begins with a dot is on its way here, perhaps for another process.
            if path.name not in kept and path.name[0] != "." and (path / entries.META).is_file()
        }  # fmt: skip
        total = sum(sizes.values()) + sum(kept.values())
        for path in sorted(sizes, key=_last_used):
            if total <= self.most_bytes:
                return
            entries.remove(path)
            total -= sizes[path]

    def _tried(self, call: Callable[[], Any]) -> Any:
        """Call the store up to four times. Raise Outage, or ConfigError where that cannot help."""
        for wait in (*WAITS_SECONDS, None):
            try:
                return call()
            except Exception as exc:
                error = self._error(exc)
                if wait is None or not isinstance(error, Outage):
                    raise error from exc
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    def _error(self, exc: Exception) -> FinetuneError:
        """Return our error for what a store, or the disk beside it, raises."""
        known, passes = failures.translate(exc), object_store.may_pass(exc)
        if known is not None and not passes:
            return type(known)(f"{SETTING}: {self.url}: {known}")
        problem = f"{self.url}: {object_store.plain(exc)}; {object_store.advice(exc)}"
        return (Outage if passes else ConfigError)(f"{SETTING}: {problem}")


def _paths(list_them: Callable[..., list[str]], path: str) -> list[str]:
    """Return the paths that a file system lists in a folder; none if it does not exist."""
    with suppress(FileNotFoundError):
        return list_them(path, detail=False)
    return []


def _size(entry: Path) -> int:
    """Return the bytes of an entry; 0 if another process has just removed it."""
    with suppress(FileNotFoundError):
        return sum(each.stat().st_size for each in entry.iterdir())
    return 0


def _last_used(entry: Path) -> int:
    with suppress(FileNotFoundError):
        return entry.stat().st_mtime_ns
    return 0


def fetch_layout(store: ShardStore, name: str) -> None:
    """Copy a whole layout from the store, if it has one; it needs no shard to be there."""
    if store.holds(name, INDEX):
        store.fetch(name, last=INDEX)
