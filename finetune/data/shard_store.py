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

from finetune import files
from finetune.data import examples as entries
from finetune.data import remote
from finetune.data.layout import INDEX
from finetune.errors import Outage

WAITS_SECONDS = (1, 5, 20)  # before the second and later attempts
AT_ONCE = 4  # shards that are fetched together


class ShardStore:
    """The shards of one stream in an object store, as far as a folder holds copies of them."""

    def __init__(self, url: str, folder: Path, most_bytes: int | None = None) -> None:
        """`folder`: of the stream on this machine. `most_bytes`: of all copies; None: any."""
        self.url, self.folder, self.most_bytes = (
            f"{url.rstrip('/')}/{folder.name}",
            folder,
            most_bytes,
        )
        self._threads = ThreadPoolExecutor(AT_ONCE, "shards")
        self._under_way: list[Future[None]] = []
        self._lock = threading.Lock()

    @functools.cached_property
    def _system(self) -> tuple[Any, str]:
        with remote.reached(self.url):  # without caches, as other machines write there, too
            return remote.system(self.url, use_listings_cache=False, skip_instance_cache=True)

    def holds(self, name: str, last: str = entries.META) -> bool:
        """Return whether an entry is whole in the store; `last`: the file that is put last."""
        system, path = self._system
        return bool(self._tried(lambda: system.exists(f"{path}/{name}/{last}")))

    def put(self, name: str, last: str = entries.META) -> None:
        """Copy an entry of the folder into the store."""
        _, path = self._system
        names = [each.name for each in (self.folder / name).iterdir() if each.is_file()]
        for each in sorted(names, key=lambda each: each == last):
            here = str(self.folder / name / each)
            self._tried(functools.partial(self._put_file, here, f"{path}/{name}/{each}"))

    def _put_file(self, here: str, there: str) -> None:
        system = self._system[0]
        if "file" in system.protocol:
            system.makedirs(os.path.dirname(there), exist_ok=True)
        system.put_file(here, there)

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
                self._get_all(name, build)
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

    def _get_all(self, name: str, build: Path) -> None:
        system, path = self._system
        listed = self._tried(lambda: system.ls(f"{path}/{name}", detail=False))
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
        """Call the store up to four times. Raise Outage, or DataError where that cannot help."""
        for wait in (*WAITS_SECONDS, None):
            try:
                with remote.reached(self.url):
                    return call()
            except Outage:
                if wait is None:
                    raise
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


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
