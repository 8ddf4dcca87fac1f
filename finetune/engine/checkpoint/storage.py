"""Mirror a run directory in an object store, so that an empty disk can resume. No torch.

`<url>/<run name>/` has the same names as `runs/<run name>/`. Object stores have no rename, so order
takes its place: the file that marks the rest as complete (a checkpoint's manifest.json, the run's
config.yaml) is written last and removed first. Credentials come only from the environment, because
URLs end up in logs and receipts.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import yaml

from finetune import failures, files
from finetune.engine.checkpoint import folder
from finetune.engine.checkpoint.folder import MANIFEST
from finetune.errors import CheckpointError, ConfigError, DamagedCheckpoint, TakenOver

CONFIG, CLAIM = "config.yaml", "writer.json"
CHECK_SECONDS = 30.0
WAITS_SECONDS = (1.0, 3.0)  # before the second and the third attempt
# Errors after which another attempt cannot help.
CANNOT_HELP = (
    FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError,
)  # fmt: skip
# 4 files x 4 parts x 8 MiB at once take 256 MiB (s3fs keeps a part until its next one is sent). By
# default s3fs would send 128 files x 10 parts x 50 MiB.
FILES_AT_ONCE, PARTS_AT_ONCE, PART_BYTES = 4, 4, 8 * 2**20
# S3's limit for an object; s3fs respects it only if it chooses the size of parts itself.
MAX_PARTS = 10_000
S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss")
PACKAGES = {  # s3fs and gcsfs work only with the fsspec of the same release
    **dict.fromkeys(S3, f"s3fs=={fsspec.__version__}"),
    **dict.fromkeys(GCS, f"gcsfs=={fsspec.__version__}"),
    **dict.fromkeys(AZURE, "adlfs"),
}


class Storage:
    """`<url>/<run name>/`. Caches nothing; any thread may call it, but no forked process."""

    def __init__(self, url: str, run_name: str) -> None:
        self._fs, root = _opened(url)
        self._root = f"{root.rstrip('/')}/{run_name}"
        self._token = ""
        self.url = f"{url.rstrip('/')}/{run_name}"

    def check(self) -> None:
        """Write, list, read and remove one small object within CHECK_SECONDS.

        Raises ConfigError for a mistake of the user, CheckpointError if trying again may help.
        """
        path, content = f"{self._root}/.check-{secrets.token_hex(4)}", secrets.token_bytes(16)

        def list_it() -> None:
            if path not in [entry["name"] for entry in self._fs.ls(self._root, True)]:
                raise OSError("an object that was just written is not listed")

        def read() -> None:
            if self._fs.cat_file(path) != content:
                raise OSError("an object that was just written has other content")

        deadline = time.monotonic() + CHECK_SECONDS
        attempts = {
            "written to": lambda: self._fs.pipe_file(path, content),
            "listed": list_it,
            "read": read,
            "deleted from": lambda: self._fs.rm_file(path),
        }
        for verb, attempt in attempts.items():
            try:
                _within(deadline - time.monotonic(), attempt)
            except Exception as exc:
                kind = CheckpointError if _may_pass(exc) else ConfigError
                problem = f"{self.url} cannot be {verb} ({_plain(exc)}); {_advice(exc)}"
                raise kind(f"checkpoint.storage: {problem}") from exc

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
        """Upload the files at the top of a run directory, config.yaml last."""
        self.require_claim()
        names = {p.name for p in directory.iterdir() if p.is_file() and p.name[0] != "."}
        self._transfer("uploading", self._put, directory, "", sorted(names - {CONFIG, CLAIM}))
        self._transfer("uploading", self._put, directory, "", [CONFIG])

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
        parts = {}
        if "s3" in self._fs.protocol:
            largest = max(os.path.getsize(path) for path in here)
            parts["chunksize"] = max(PART_BYTES, math.ceil(largest / MAX_PARTS))
        self._fs.put(here, there, **parts)

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
                    raise CheckpointError(f"{self.url}: {doing} failed: {_plain(exc)}") from exc
                time.sleep(wait)
        raise AssertionError("the last attempt returns or raises")


def _refused(why: str) -> ConfigError:
    return ConfigError(f"checkpoint.storage: {why}")


def _require_url(url: str) -> str:
    """Return the protocol of a URL. Raises ConfigError for secrets in it, or a missing part."""
    protocol, separator, rest = url.partition("://")
    host = rest.split("/")[0]  # a bucket; for Azure it may be container@account
    in_host = ":" in host and protocol in PACKAGES and not host.startswith("arn:")
    is_account = protocol in AZURE and re.fullmatch(r"[\w-]+@[\w.-]+(/[^@]*)?", rest)
    if in_host or ("@" in url and not is_account):
        raise _refused(
            "the URL holds a user name, a password or a key (not repeated here); "
            "write protocol://bucket/folder, and give credentials through the environment"
        )
    if "?" in rest:
        raise _refused(
            "the URL has a query string (not repeated here); write protocol://bucket/folder"
        )
    if not separator:
        raise _refused(
            f"got {url!r}, which has no protocol such as s3:// or gs://; run.dir is for a folder"
        )
    if not rest.strip("/"):
        raise _refused(f"got {url!r}, which names no bucket or folder")
    if protocol == "memory":
        raise _refused("memory:// vanishes with the process; take a lasting store, such as s3://")
    if protocol in ("file", "local") and not rest.startswith("/"):
        raise _refused(
            f"got {url!r}; give the whole path, "
            "as file:///mnt/store, or the next start may look elsewhere"
        )
    return protocol


def _options(protocol: str) -> dict[str, Any]:
    """Return fsspec's options for a protocol."""
    # Without caches, as other processes write there, too.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if protocol in S3:
        network = {
            "connect_timeout": 5,
            "read_timeout": 60,
            "retries": {"total_max_attempts": 3, "mode": "standard"},
            "max_pool_connections": 16,
        }
        options |= {
            "max_concurrency": PARTS_AT_ONCE,
            "default_block_size": PART_BYTES,
            "config_kwargs": network,
        }
    elif protocol in ("file", "local"):
        options["auto_mkdir"] = True
    return options


def _opened(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. Raises ConfigError."""
    protocol = _require_url(url)
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise _refused(
            f"got {url!r}, whose protocol is not known; try s3://, gs:// or az://"
        ) from None
    except ImportError as exc:
        install = f"pip install {PACKAGES[protocol]}" if protocol in PACKAGES else str(exc)
        raise _refused(f"{protocol}:// needs a package that is missing: {install}") from exc
    try:
        fs, root = fsspec.url_to_fs(url, **_options(protocol))
    except Exception as exc:  # some file systems look for credentials here
        failures.reraise(exc, f"checkpoint.storage: {url} cannot be opened now")
        raise _refused(f"{url} cannot be opened ({_plain(exc)}); {_advice(exc)}") from exc
    if protocol in S3:
        fs.retries = 1  # s3fs's multiply with botocore's: a dead endpoint would take minutes
    return fs, root


def _sizes(manifest: bytes) -> dict[str, int]:
    """Return the bytes of each file of a checkpoint. Raises ValueError."""
    if not manifest:
        raise ValueError(f"{MANIFEST} is missing")
    return folder.sizes(folder.parsed(manifest))


def _within(seconds: float, call: Callable[[], None]) -> None:
    """Call in a thread, and abandon it after `seconds`: libraries retry without a common limit."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
            outcome.set_result(None)
        except BaseException as exc:
            outcome.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    try:
        outcome.result(max(0.0, seconds))
    except TimeoutError:
        if outcome.done():
            raise
        raise TimeoutError(f"no answer within {CHECK_SECONDS:g} s") from None


def _plain(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"


def _may_pass(exc: Exception) -> bool:
    """Return whether an error may pass by itself: the network is down or the server is busy."""
    name, busy = type(exc).__name__, (errno.EBUSY, errno.EIO, errno.EAGAIN)
    if isinstance(exc, (ConnectionError, TimeoutError)) or "Connect" in name or "Timeout" in name:
        return True
    return isinstance(exc, OSError) and exc.errno in busy


def _advice(exc: Exception) -> str:
    name = type(exc).__name__
    if isinstance(exc, FileNotFoundError):
        return "create the bucket, or correct its name or the endpoint"
    if "Credential" in name:
        return (
            "give credentials through the environment (S3: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
        )
    if _may_pass(exc):
        return (
            "check that the network and the server are up and, "
            "for S3, that AWS_ENDPOINT_URL is right; trying again may help"
        )
    return "check the credentials, and that they may list, read, write and delete there"
