"""Which errors of what lies below are nobody's input: a hub that does not answer, a disk that is full or has gone."""

import errno
from collections.abc import Iterator

from finetune.errors import Outage

DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EROFS,
}  # EROFS: what ext4 is after EIO
# By name, as their modules need not be imported: httpx, requests, aiohttp, urllib3, Python's own.
NETWORK = {
    "TransportError",
    "ConnectionError",
    "Timeout",
    "TimeoutError",
    "ClientConnectionError",
    "NewConnectionError",
}
SERVER = {429, 500, 502, 503, 504}


def reraise(what: str, exc: BaseException) -> None:
    """Raise Outage if `exc`, or what has led to it, is one; else return."""
    chain = list(_chain(exc))
    # Somebody wants no network (HF_HUB_OFFLINE): what is not here will not be here next time.
    if not any("OfflineModeIsEnabled" in f"{type(each).__name__}: {each}" for each in chain) and any(
        map(_is_outage, chain)
    ):
        reason = next(line.strip() for line in (*str(exc).splitlines(), type(exc).__name__) if line.strip())
        raise Outage(f"{what}: {reason}") from exc


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = exc.__cause__ or exc.__context__


def _is_outage(exc: BaseException) -> bool:
    families = {family.__name__ for family in type(exc).__mro__}
    status = getattr(getattr(exc, "response", None), "status_code", None)
    return bool(families & NETWORK) or status in SERVER or (isinstance(exc, OSError) and exc.errno in DISK)
