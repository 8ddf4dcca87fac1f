"""Exceptions of libraries -> errors of finetune, in one table.

A library reports a full disk, a GPU that fell off its bus and a wrong argument in exceptions of
many families, and often only in words. `translate` tells the machine's failures, which end a run
with exit code 1, from everything else.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import (
    DeviceError,
    FinetuneError,
    Outage,
    OutOfMemory,
    TopologyError,
    UserError,
)

MOST_LETTERS = 300  # of a library's words; CUDA's allocator writes a paragraph

# How libraries report it without an OutOfMemoryError: PyTorch on a CPU, cuBLAS, and CUDA's driver,
# also to NCCL.
NO_MEMORY = re.compile(
    "DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory|CUDA out of memory"
    r"|(Cuda failure|cudaError:?) 2\b"  # cudaErrorMemoryAllocation; 201 is an invalid context
)
# What gloo says when a connection breaks. It names its own source first; another library's
# connection does not belong to our processes.
BROKEN = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
)
# What the store says, by which processes find each other, and NCCL.
NO_ANSWER = ("NCCL error", "recvValue failed", "sendBytes failed")
DEVICE = re.compile(
    r"CUDA|\bcuda[A-Z]\w+|Cuda failure|\bcuInit\b|CUBLAS|CUDNN|cuDNN|CUSOLVER|CUSPARSE|NCCL|NVML|\bHIP\b"
    r"|\bECC\b|devices? (is |are )?busy"
)
# A device that this machine does not have: the next attempt would not find it either. Nor is a
# library without code for this GPU found by trying again, or a tensor that is on another device
# than it must be.
NO_DEVICE = re.compile(
    r"requires?\b|required|not compiled|is_available\(\) is False|capability|only (be )?supported"
    r"|no kernel image|binary not found|expected \w+ tensor|with arguments from the"
)
DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EROFS,
}  # EROFS: what ext4 is after EIO
FULL = {errno.ENOSPC, errno.EDQUOT}
# Classes go by name, as their modules need not be imported: httpx, requests, aiohttp, urllib3,
# Python's own.
NETWORK = {
    "TransportError",
    "ConnectionError",
    "Timeout",
    "TimeoutError",
    "ClientConnectionError",
    "NewConnectionError",
}
SERVER = {429, 500, 502, 503, 504}
# What libraries that do not raise OSError write of a disk: safetensors and tokenizers (Rust),
# torch.save.
NO_SPACE = re.compile(r"No space left|Disk quota exceeded|os error (28|122)\b")
NO_DISK = re.compile(
    NO_SPACE.pattern + r"|Input/output error|Read-only file system|os error (5|30|116)\b"
)
NO_NETWORK = (
    "without a network give a folder, or HF_HUB_OFFLINE=1 to take what is in the cache; with a "
    "mirror of the Hub, its address "
    "in HF_ENDPOINT"
)
PROCESSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # torch.distributed


def translate(exc: BaseException, what: str = "") -> FinetuneError | None:
    """The error of ours for an exception, or for what led to it; None if the machine did not fail.

    `what`: begins the message, such as "model 'a/b' cannot be loaded now". An error that is ours
    already comes back as it is.
    """
    if isinstance(exc, FinetuneError):
        return exc
    chain = list(_chain(exc))
    for error, applies in TABLE:
        if any(applies(each) for each in chain):
            hint = f"; {NO_NETWORK}" if what and applies is _network else ""
            hint = "; choose a shorter one" if applies is _too_long else hint
            return error((f"{what}: {_reason(exc)}" if what else _reason(exc)) + hint)
    return None


def reraise(exc: Exception, what: str = "") -> None:
    """Raise what `translate` makes of an exception; return if that is nothing."""
    if isinstance(exc, FinetuneError):
        raise exc
    if error := translate(exc, what):
        raise error from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise Outage that names `path` where the disk fails under what the block writes there: many
    libraries name no file.
    """
    try:
        yield
    except Exception as exc:
        failed = [each for each in _chain(exc) if _disk(each)]
        if isinstance(exc, FinetuneError) or not failed:
            raise
        is_full = any(
            getattr(each, "errno", 0) in FULL or NO_SPACE.search(str(each)) for each in failed
        )
        why = (
            "the disk is full; free space, or choose another place" if is_full else "the disk fails"
        )
        raise Outage(f"{path} cannot be written now: {why} ({_reason(exc)})") from exc


def parsing_reason(exc: Exception) -> str:
    """Why text cannot be read as JSON or YAML, without Python's advice to its own programmers."""
    if isinstance(exc, RecursionError):
        return "brackets are nested too deeply"
    return "a number has too many digits" if "set_int_max_str_digits" in str(exc) else str(exc)


def _no_memory(exc: BaseException) -> bool:
    return (
        isinstance(exc, MemoryError)
        or _is(exc, {"OutOfMemoryError"})
        or (isinstance(exc, RuntimeError) and NO_MEMORY.search(str(exc)) is not None)
    )


def _lost_process(exc: BaseException) -> bool:
    broken = "gloo/transport" in str(exc) and _says(exc, BROKEN)
    return _is(exc, PROCESSES) or broken or _says(exc, NO_ANSWER)


def _device(exc: BaseException) -> bool:
    said = str(exc)
    words = isinstance(exc, RuntimeError) and DEVICE.search(said) and not NO_DEVICE.search(said)
    return _is(exc, {"AcceleratorError"}) or bool(words)


def _disk(exc: BaseException) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in DISK
    # tokenizers raises Exception itself
    in_words = (
        isinstance(exc, RuntimeError) or type(exc) is Exception or _is(exc, {"SafetensorError"})
    )
    return in_words and bool(NO_DISK.search(str(exc)))


def _too_long(exc: BaseException) -> bool:
    return isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG


def _network(exc: BaseException) -> bool:
    status = getattr(getattr(exc, "response", None), "status_code", None)
    return _is(exc, NETWORK) or status in SERVER


# The most specific first: NCCL reports a lack of memory, too, and CUDA errors of its own.
TABLE: tuple[tuple[type[FinetuneError], Callable[[BaseException], bool]], ...] = (
    (OutOfMemory, _no_memory),
    (TopologyError, _lost_process),
    (DeviceError, _device),
    (Outage, _disk),
    (UserError, _too_long),
    (Outage, _network),
)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """The exception and what led to it; nothing where no network is wanted (HF_HUB_OFFLINE): what
    is missing stays missing.
    """
    chain: dict[int, BaseException] = {}
    while exc is not None and id(exc) not in chain:
        chain[id(exc)] = exc
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    offline = any(
        "OfflineModeIsEnabled" in f"{type(each).__name__}: {each}" for each in chain.values()
    )
    yield from () if offline else chain.values()


def _is(exc: BaseException, names: set[str]) -> bool:
    return bool({family.__name__ for family in type(exc).__mro__} & names)


def _says(exc: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in signs)


def _reason(exc: BaseException) -> str:
    """Its first line; of NCCL also the last error, which is further below."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]
    if "Last error:" in lines[:-1]:
        lines[0] += f" {lines[lines.index('Last error:') + 1]}"
    return lines[0][:MOST_LETTERS]
