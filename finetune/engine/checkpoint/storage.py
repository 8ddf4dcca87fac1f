"""Mirror a run directory in an object store, so that an empty disk can resume. No torch.

`<url>/<run name>/` has the same names as `runs/<run name>/`. Object stores have no rename, so order
takes its place: the file that marks the rest as complete (a checkpoint's manifest.json, the run's
config.yaml) is written last and removed first. Credentials come only from the environment, because
URLs end up in logs and receipts.
"""

import contextlib
import functools
import json
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from finetune import files, object_store
from finetune.engine.checkpoint import folder
from finetune.engine.checkpoint.folder import MANIFEST
from finetune.errors import CheckpointError, DamagedCheckpoint, TakenOver

SETTING = "checkpoint.storage"
CONFIG, CLAIM = "config.yaml", "writer.json"
ARRAYS, HEADER_BYTES = ".safetensors", 1024
WAITS_SECONDS = (1.0, 3.0)  # before the second and the third attempt
# Errors after which another attempt cannot help.
CANNOT_HELP = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
)  # fmt: skip
FILES_AT_ONCE = 4  # each in as many parts as `object_store` sends at once


class Storage:
    """`<url>/<run name>/`. Caches nothing; any thread may call it, but no forked process."""

    def __init__(self, url: str, run_name: str) -> None:
        self._fs, root = object_store.opened(url, SETTING, "run.dir")
        self._root = f"{root.rstrip('/')}/{run_name}"
        self._token = ""
        self.url = f"{url.rstrip('/')}/{run_name}"

    def check(self) -> None:
        """Write, list, read and remove one small object.

        Raises ConfigError for a mistake of the user, CheckpointError if trying again may help.
        """
        object_store.check(self._fs, self._root, SETTING, self.url, CheckpointError)

    def restore(self, directory: Path, over: bool = False) -> bool:
        """Fetch everything but checkpoints into a run directory, config.yaml last.

        Returns False and changes nothing if the store has no run of this name, or if the directory
        has a config.yaml and `over` does not allow overwriting, as when the store is further ahead.
        """
        names = [n for n in self._listing("", below=False) if n[0] != "." and n != CLAIM]
        if ((directory / CONFIG).exists() and not over) or CONFIG not in names:
            return False
        names += [f"model/{name}" for name in self._listing("model")]
        for name in sorted(names, key=lambda name: name == CONFIG):
            final = directory / name
            arriving = final.with_name(f".restoring-{final.name}")
            final.parent.mkdir(parents=True, exist_ok=True)
            self._attempt(
                f"fetching {name}", self._fs.get, [f"{self._root}/{name}"], [str(arriving)]
            )
            files.flush(arriving)
            os.rename(arriving, final)
            files.flush(final.parent)
        return True

    def config(self) -> dict[str, Any] | None:
        """Return the resolved config of the stored run, None if none. Raises CheckpointError."""
        content = self._content(CONFIG)
        try:
            return dict(yaml.safe_load(content)) if content else None
        except (yaml.YAMLError, TypeError, ValueError) as exc:
            raise CheckpointError(f"{self.url}/{CONFIG} is damaged: {exc}") from exc

    def run_id(self, step: int) -> str | None:
        """Return the id of the run that a checkpoint belongs to."""
        return folder.run_id(self._content(f"checkpoints/{folder.step_name(step)}/{MANIFEST}"))

    def steps(self) -> list[int]:
        """Return the steps of committed checkpoints, newest first."""
        names = [PurePosixPath(name) for name in self._listing("checkpoints")]
        found = [folder.step_of(str(name.parent)) for name in names if name.name == MANIFEST]
        return sorted((step for step in found if step is not None), reverse=True)

    def fetch(self, step: int, root: Path) -> Path:
        """Fetch a checkpoint to `root/step-...`, verify it and return its path.

        Keeps a complete one that is already there; sets a damaged one aside. Raises
        DamagedCheckpoint that names the object and its problem, CheckpointError if the store does
        not answer; an error leaves nothing behind.
        """
        name = folder.step_name(step)
        remote, final, arriving = f"checkpoints/{name}", root / name, root / f".fetching-{name}"
        if final.exists():
            with contextlib.suppress(OSError, ValueError):
                folder.verified(final)
                return final
        shutil.rmtree(arriving, ignore_errors=True)
        try:
            manifest = self._content(f"{remote}/{MANIFEST}")
            sizes = _sizes(manifest)
            self._require_sizes(remote, sizes)  # before fetching anything large in vain
            arriving.mkdir(parents=True)
            folder.require_space(root, sum(sizes.values()))
            self._transfer("fetching", self._get, arriving, remote, sorted(sizes))
            (arriving / MANIFEST).write_bytes(manifest)
            folder.verified(arriving)
            for path in [*arriving.rglob("*"), arriving]:
                files.flush(path)
            folder.set_aside([final])
            os.rename(arriving, final)
            files.flush(root)
        except folder.OtherFormat:
            raise
        except ValueError as exc:
            raise DamagedCheckpoint(f"{self.url}/{remote}: {exc}") from exc
        except OSError as exc:
            raise CheckpointError(f"{self.url}/{remote}: {exc}") from exc
        finally:
            shutil.rmtree(arriving, ignore_errors=True)
        return final

    def upload_checkpoint(self, path: Path) -> None:
        """Upload all files of a committed checkpoint, then its manifest; overwrite older ones."""
        self.require_claim()
        remote = f"checkpoints/{path.name}"
        if not folder.looks_whole(path):
            raise CheckpointError(f"{path} is not complete, so it was not uploaded")
        sizes = _sizes((path / MANIFEST).read_bytes())
        self._remove(f"{remote}/{MANIFEST}")  # or a mixture of two would look complete
        self._transfer("uploading", self._put, path, remote, sorted(sizes))
        self._require_sizes(remote, sizes)
        self.require_claim()  # again, since the files may have taken minutes
        self._transfer("uploading", self._put, path, remote, [MANIFEST])

    def upload_notes(self, directory: Path) -> None:
        """Upload the files at the top of a run directory, config.yaml last.

        Arrays, which may be large and are written once, only if the store has others.
        """
        self.require_claim()
        names = {p.name for p in directory.iterdir() if p.is_file() and p.name[0] != "."}
        names -= {name for name in names if self._has_array(directory / name)}
        self._transfer("uploading", self._put, directory, "", sorted(names - {CONFIG, CLAIM}))
        self._transfer("uploading", self._put, directory, "", [CONFIG])

    def _has_array(self, path: Path) -> bool:
        """Return whether a file of arrays is there already.

        By its size and its first bytes: its header holds the hash of its content.
        """
        if path.suffix != ARRAYS:
            return False
        if self._listing("", below=False).get(path.name) != path.stat().st_size:
            return False
        read = functools.partial(self._fs.cat_file, start=0, end=HEADER_BYTES)
        there = self._attempt(f"reading {path.name}", read, f"{self._root}/{path.name}")
        with path.open("rb") as file:
            return bool(there == file.read(HEADER_BYTES))

    def upload_file(self, path: Path, name: str) -> None:
        """Upload one file under a name, as a phase of rollouts."""
        self.require_claim()
        self._attempt(f"uploading {name}", self._put, [str(path)], [f"{self._root}/{name}"])

    def fetch_file(self, name: str, path: Path) -> bool:
        """Fetch one file, whole or not at all; return False if the store has none of this name."""
        if not (content := self._content(name)):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(path) as file:
            file.write(content)
        files.flush(path.parent)
        return True

    def upload_model(self, model: Path) -> None:
        """Upload the exported model and remove what an older one left.

        Call it before uploading the outcome.json that marks the run complete.
        """
        self.require_claim()
        names = {p.relative_to(model).as_posix() for p in model.rglob("*") if p.is_file()}
        self._transfer("uploading", self._put, model, "model", sorted(names))
        for name in self._listing("model").keys() - names:
            self._remove(f"model/{name}")

    def prune(self, keep_last: int, protected: set[str]) -> None:
        """Remove all but the newest complete checkpoints and those `protected`, manifests first.

        Also removes partial uploads, except those newer than every complete checkpoint: another
        process may be uploading one right now. They go once a newer one is complete.
        """
        self.require_claim()
        found: dict[str, list[str]] = {}
        for name in self._listing("checkpoints"):
            if folder.step_of(name.split("/")[0]) is not None:
                found.setdefault(name.split("/")[0], []).append(name)
        whole = {name for name, objects in found.items() if f"{name}/{MANIFEST}" in objects}
        keep = {*sorted(whole, reverse=True)[:keep_last], *protected}
        if whole:
            for checkpoint in sorted(found.keys() - keep):
                if checkpoint in whole or checkpoint < max(whole):
                    names = found[checkpoint]
                    for name in sorted(names, key=lambda n: PurePosixPath(n).name != MANIFEST):
                        self._remove(f"checkpoints/{name}")

    def claim(self) -> None:
        """Make this process the run's writer; the previous one stops at its next write."""
        token, now = secrets.token_hex(16), datetime.now(UTC).isoformat(timespec="seconds")
        writer = {"host": socket.gethostname(), "pid": os.getpid(), "time": now, "token": token}
        path, content = f"{self._root}/{CLAIM}", json.dumps(writer).encode()
        self._attempt(f"writing {CLAIM}", self._fs.pipe_file, path, content)
        self._token = token

    def require_claim(self) -> None:
        """Raise TakenOver if another process has claimed the run since claim()."""
        assert self._token, "claim() comes before the first write"
        content = self._content(CLAIM)
        if not content:
            raise TakenOver(
                f"{self.url}/{CLAIM} is gone: someone has removed this run; this process stops"
            )
        try:
            writer = dict(json.loads(content))
        except (ValueError, TypeError):
            writer = {}
        if writer.get("token") != self._token:
            raise TakenOver(
                f"another machine, {writer.get('host')} (process {writer.get('pid')}), "
                f"has taken {self.url} over at {writer.get('time')}; this one stops"
            )

    def _listing(self, name: str, below: bool = True) -> dict[str, int]:
        """Return path -> bytes of the objects in `name` and, unless `below` is False, below it.

        Lists level by level: `find` is one request on S3, but other stores' `find` takes an error
        for an empty folder.
        """
        path, found = f"{self._root}/{name}".rstrip("/"), {}
        entries = self._attempt(f"listing {name}", self._fs.ls, path, True, missing_ok=True)
        for entry in entries or []:
            base = entry["name"].removeprefix(f"{path}/")
            # Consoles store a folder as an object with an empty name.
            if entry["type"] == "file" and base:
                found[base] = int(entry["size"])
            elif entry["type"] == "directory" and below and entry["name"].rstrip("/") != path:
                inside = self._listing(f"{name}/{base}".strip("/"))
                found |= {f"{base.rstrip('/')}/{inner}": size for inner, size in inside.items()}
        return found

    def _content(self, name: str) -> bytes:
        """Return a small object's content; empty if it does not exist."""
        path = f"{self._root}/{name}"
        return self._attempt(f"reading {name}", self._fs.cat_file, path, missing_ok=True) or b""

    def _remove(self, name: str) -> None:
        """Remove one object; when s3fs removes many at once, it hides those that it could not."""
        self._attempt(f"removing {name}", self._fs.rm_file, f"{self._root}/{name}", missing_ok=True)

    def _require_sizes(self, remote: str, sizes: dict[str, int]) -> None:
        """Raise DamagedCheckpoint that names an object that is missing or has another size."""
        there = self._listing(remote)
        for name, size in sizes.items():
            if there.get(name) != size:
                problem = "is missing"
                if name in there:
                    problem = f"has {there[name]} bytes instead of {size}"
                raise DamagedCheckpoint(f"{self.url}/{remote}: {name} {problem}")

    def _transfer(
        self, doing: str, call: Callable[[list[str], list[str]], None], local: Path, remote: str,
        names: list[str],
    ) -> None:  # fmt: skip
        for start in range(0, len(names), FILES_AT_ONCE):
            some = names[start : start + FILES_AT_ONCE]
            objects = [f"{remote}/{name}".lstrip("/") for name in some]
            here = [str(local / name) for name in some]
            there = [f"{self._root}/{name}" for name in objects]
            self._attempt(f"{doing} {', '.join(objects)}", call, here, there)

    def _put(self, here: list[str], there: list[str]) -> None:
        self._fs.put(here, there, **object_store.in_parts(self._fs, here))

    def _get(self, here: list[str], there: list[str]) -> None:
        self._fs.get(there, here)

    def _attempt(
        self, doing: str, call: Callable[..., Any], *arguments: Any, missing_ok: bool = False
    ) -> Any:
        """Call the store up to three times; raise CheckpointError if it fails.

        `missing_ok`: return None for an object that does not exist.
        """
        for wait in (*WAITS_SECONDS, None):
            try:
                return call(*arguments)
            except Exception as exc:
                if missing_ok and isinstance(exc, FileNotFoundError):
                    return None
                if wait is None or isinstance(exc, CANNOT_HELP):
                    why = f"{doing} failed: {object_store.plain(exc)}"
                    raise CheckpointError(f"{self.url}: {why}") from exc
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _sizes(manifest: bytes) -> dict[str, int]:
    """Return the bytes of each file of a checkpoint. Raises ValueError."""
    if not manifest:
        raise ValueError(f"{MANIFEST} is missing")
    return folder.sizes(folder.parsed(manifest))
