"""Object stores that a config names by URL: opened, checked before use, their errors in words.

Credentials come only from the environment, because URLs end up in logs and receipts.
"""

import errno
import math
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

from finetune import failures
from finetune.errors import ConfigError, FinetuneError

CHECK_SECONDS = 30.0
# 4 files x 4 parts x 8 MiB at once take 256 MiB (s3fs keeps a part until its next one is sent). By
# default s3fs would send 128 files x 10 parts x 50 MiB.
PARTS_AT_ONCE, PART_BYTES = 4, 8 * 2**20
# S3's limit for an object; s3fs respects it only if it chooses the size of parts itself.
MAX_PARTS = 10_000
S3, GCS, AZURE = ("s3", "s3a"), ("gs", "gcs"), ("az", "abfs", "abfss")
# s3fs and gcsfs work only with the fsspec of the same release.
PACKAGES = {
    **dict.fromkeys(S3, "s3fs=={fsspec}"),
    **dict.fromkeys(GCS, "gcsfs=={fsspec}"),
    **dict.fromkeys(AZURE, "adlfs"),
}


def opened(url: str, setting: str, for_folders: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it. Raises ConfigError.

    `setting`: which names the URL; `for_folders`: the one that takes a folder of this machine.
    """
    import fsspec

    try:
        protocol = _require_url(url, for_folders)
        fs, root = fsspec.url_to_fs(url, **_options(protocol))
    except _Refused as exc:
        raise ConfigError(f"{setting}: {exc}") from None
    except Exception as exc:  # some file systems look for credentials here
        failures.reraise(exc, f"{setting}: {url} cannot be opened now")
        why = f"{url} cannot be opened ({plain(exc)}); {advice(exc)}"
        raise ConfigError(f"{setting}: {why}") from exc
    if protocol in S3:
        fs.retries = 1  # s3fs's multiply with botocore's: a dead endpoint would take minutes
    return fs, str(root)


def check(fs: Any, root: str, setting: str, url: str, outage: type[FinetuneError]) -> None:
    """Write, list, read and remove one small object in `root` within CHECK_SECONDS.

    Raises ConfigError for a mistake of the user, `outage` if trying again may help.
    """
    path, content = f"{root}/.check-{secrets.token_hex(4)}", secrets.token_bytes(16)

    def list_it() -> None:
        if path not in [entry["name"] for entry in fs.ls(root, True)]:
            raise OSError("an object that was just written is not listed")

    def read() -> None:
        if fs.cat_file(path) != content:
            raise OSError("an object that was just written has other content")

    deadline = time.monotonic() + CHECK_SECONDS
    attempts: dict[str, Callable[[], None]] = {
        "written to": lambda: fs.pipe_file(path, content),
        "listed": list_it,
        "read": read,
        "deleted from": lambda: fs.rm_file(path),
    }
    for verb, attempt in attempts.items():
        try:
            _within(deadline - time.monotonic(), attempt)
        except Exception as exc:
            kind = outage if may_pass(exc) else ConfigError
            problem = f"{url} cannot be {verb} ({plain(exc)}); {advice(exc)}"
            raise kind(f"{setting}: {problem}") from exc


class _Refused(Exception):
    """What is wrong with a URL."""


def _require_url(url: str, for_folders: str) -> str:
    """Return the protocol of a URL. Raises _Refused for secrets in it, or a missing part."""
    import fsspec

    protocol, separator, rest = url.partition("://")
    host = rest.split("/")[0]  # a bucket; for Azure it may be container@account
    in_host = ":" in host and protocol in PACKAGES and not host.startswith("arn:")
    is_account = protocol in AZURE and re.fullmatch(r"[\w-]+@[\w.-]+(/[^@]*)?", rest)
    if in_host or ("@" in url and not is_account):
        raise _Refused(
            "the URL holds a user name, a password or a key (not repeated here); "
            "write protocol://bucket/folder, and give credentials through the environment"
        )
    if "?" in rest:
        raise _Refused(
            "the URL has a query string (not repeated here); write protocol://bucket/folder"
        )
    if not separator:
        raise _Refused(
            f"got {url!r}, which has no protocol such as s3:// or gs://; {for_folders} is for a "
            "folder"
        )
    if not rest.strip("/"):
        raise _Refused(f"got {url!r}, which names no bucket or folder")
    if protocol == "memory":
        raise _Refused("memory:// vanishes with the process; take a lasting store, such as s3://")
    if protocol in ("file", "local") and not rest.startswith("/"):
        raise _Refused(
            f"got {url!r}; give the whole path, "
            "as file:///mnt/store, or the next start may look elsewhere"
        )
    try:
        fsspec.get_filesystem_class(protocol)
    except ValueError:
        raise _Refused(
            f"got {url!r}, whose protocol is not known; try s3://, gs:// or az://"
        ) from None
    except ImportError as exc:
        package = PACKAGES.get(protocol, "").format(fsspec=fsspec.__version__)
        install = f"pip install {package}" if package else str(exc)
        raise _Refused(f"{protocol}:// needs a package that is missing: {install}") from exc
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


def in_parts(fs: Any, here: Sequence[str]) -> dict[str, int]:
    """Return the options for `fs.put` and `fs.put_file` of these local files."""
    if "s3" not in fs.protocol:
        return {}
    largest = max(os.path.getsize(path) for path in here)
    return {"chunksize": max(PART_BYTES, math.ceil(largest / MAX_PARTS))}


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


def plain(exc: Exception) -> str:
    """Return an exception in one line."""
    return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"


def may_pass(exc: Exception) -> bool:
    """Return whether an error may pass by itself: the network is down or the server is busy."""
    name, busy = type(exc).__name__, (errno.EBUSY, errno.EIO, errno.EAGAIN)
    if isinstance(exc, (ConnectionError, TimeoutError)) or "Connect" in name or "Timeout" in name:
        return True
    return isinstance(exc, OSError) and exc.errno in busy


def advice(exc: Exception) -> str:
    """Return what to do about an exception of a store."""
    name = type(exc).__name__
    if isinstance(exc, FileNotFoundError):
        return "create the bucket, or correct its name or the endpoint"
    if "Credential" in name:
        return (
            "give credentials through the environment (S3: "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
        )
    if may_pass(exc):
        return (
            "check that the network and the server are up and, "
            "for S3, that AWS_ENDPOINT_URL is right; trying again may help"
        )
    return "check the credentials, and that they may list, read, write and delete there"
