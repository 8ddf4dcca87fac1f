"""Translate exceptions of libraries into errors of finetune, in one table.

Libraries report a full disk, a lost GPU and a wrong argument in exceptions of many families, often
only in their text. `translate` separates failures of the machine, which end a run with exit code 1,
from everything else.
"""

import errno
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune.errors import (
    DeviceError,
    FinetuneError,
    ModelError,
    Outage,
    OutOfMemory,
    TopologyError,
    UserError,
)

MOST_LETTERS = 300  # of a library's message; CUDA's allocator writes a paragraph

# Too little memory without an OutOfMemoryError: PyTorch on a CPU, cuBLAS, and CUDA's driver, also
# through NCCL.
NO_MEMORY = re.compile(
    "DefaultCPUAllocator|CUBLAS_STATUS_ALLOC_FAILED|CUDA error: out of memory|CUDA out of memory"
    r"|(Cuda failure|cudaError:?) 2\b"  # cudaErrorMemoryAllocation; 201 is an invalid context
)
# What gloo writes when a connection breaks, after the name of its own source file; a connection of
# another library does not belong to our processes.
BROKEN = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
)
# What NCCL writes, and the store through which processes find each other.
NO_ANSWER = ("NCCL error", "recvValue failed", "sendBytes failed")
DEVICE = re.compile(
    r"CUDA|\bcuda[A-Z]\w+|Cuda failure|\bcuInit\b|CUBLAS|CUDNN|cuDNN|CUSOLVER|CUSPARSE|NCCL|NVML"
    r"|\bHIP\b|\bECC\b|devices? (is |are )?busy"
)
# Trying again does not help: this machine has no such device, a library has no code for this GPU,
# or a tensor is on the wrong device.
NO_DEVICE = re.compile(
    r"requires?\b|required|not compiled|is_available\(\) is False|capability|only (be )?supported"
    r"|no kernel image|binary not found|expected \w+ tensor|with arguments from the"
)
FULL = {errno.ENOSPC, errno.EDQUOT}
# EROFS: after EIO ext4 is read-only.
DISK = FULL | {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EROFS}
# Names of classes, so that their modules need not be imported: httpx, requests, aiohttp, urllib3,
# Python's own.
NETWORK = {
    "TransportError", "ConnectionError", "Timeout", "TimeoutError", "ClientConnectionError",
    "NewConnectionError",
}  # fmt: skip
SERVER = {429, 500, 502, 503, 504}
# Messages of libraries that raise no OSError: safetensors and tokenizers (Rust), torch.save.
NO_SPACE = re.compile(r"No space left|Disk quota exceeded|os error (28|122)\b")
NO_DISK = re.compile(
    NO_SPACE.pattern + r"|Input/output error|Read-only file system|os error (5|30|116)\b"
)
NO_NETWORK = (
    "without a network give a folder, or set HF_HUB_OFFLINE=1 to use the cache; with a mirror of "
    "the Hub, set HF_ENDPOINT to its address"
)
PROCESSES = {"DistBackendError", "DistNetworkError", "DistStoreError"}  # torch.distributed


def translate(exc: BaseException, what: str = "") -> FinetuneError | None:
    """Return our error for an exception or for its causes; None if the machine did not fail.

    `what`: begins the message, such as "model 'a/b' cannot be loaded now". An error of ours is
    returned unchanged.
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
    """Raise our error for an exception; return if it has none."""
    if isinstance(exc, FinetuneError):
        raise exc
    if error := translate(exc, what):
        raise error from exc


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise Outage that names `path` if the disk fails in this block; libraries may not name it."""
    try:
        yield
    except Exception as exc:
        failed = [each for each in _chain(exc) if _disk(each)]
        if isinstance(exc, FinetuneError) or not failed:
            raise
        why = "the disk fails"
        if any(getattr(each, "errno", 0) in FULL or NO_SPACE.search(str(each)) for each in failed):
            why = "the disk is full; free space, or choose another place"
        raise Outage(f"{path} cannot be written now: {why} ({_reason(exc)})") from exc


def parsing_reason(exc: Exception) -> str:
    """Return why text cannot be read as JSON or YAML, without Python's advice to programmers."""
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
    broken = "gloo/transport" in str(exc) and _mentions(exc, BROKEN)
    return _is(exc, PROCESSES) or broken or _mentions(exc, NO_ANSWER)


def _device(exc: BaseException) -> bool:
    text = str(exc)
    words = isinstance(exc, RuntimeError) and DEVICE.search(text) and not NO_DEVICE.search(text)
    return _is(exc, {"AcceleratorError"}) or bool(words)


def _disk(exc: BaseException) -> bool:
    if isinstance(exc, OSError):
        return exc.errno in DISK
    # tokenizers raises Exception itself.
    has_text = type(exc) is Exception or _is(exc, {"RuntimeError", "SafetensorError"})
    return has_text and bool(NO_DISK.search(str(exc)))


def _too_long(exc: BaseException) -> bool:
    return isinstance(exc, OSError) and exc.errno == errno.ENAMETOOLONG


def _network(exc: BaseException) -> bool:
    status = getattr(getattr(exc, "response", None), "status_code", None)
    return _is(exc, NETWORK) or status in SERVER


# The most specific first: NCCL also reports a lack of memory, and CUDA errors.
def _no_probabilities(exc: BaseException) -> bool:
    """Return whether PyTorch cannot draw a token, as the model's numbers have overflowed."""
    return _mentions(exc, ("probability tensor contains",))


TABLE: tuple[tuple[type[FinetuneError], Callable[[BaseException], bool]], ...] = (
    (OutOfMemory, _no_memory),
    (TopologyError, _lost_process),
    (DeviceError, _device),
    (Outage, _disk),
    (UserError, _too_long),
    (Outage, _network),
    (ModelError, _no_probabilities),
)


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes; nothing with HF_HUB_OFFLINE: trying again cannot help."""
    chain: dict[int, BaseException] = {}
    while exc is not None and id(exc) not in chain:
        chain[id(exc)] = exc
        exc = exc.__cause__ or (None if exc.__suppress_context__ else exc.__context__)
    texts = (f"{type(each).__name__}: {each}" for each in chain.values())
    if not any("OfflineModeIsEnabled" in text for text in texts):
        yield from chain.values()


def _is(exc: BaseException, names: set[str]) -> bool:
    """Return whether the class of an exception, or one above it, has one of these names."""
    return bool({family.__name__ for family in type(exc).__mro__} & names)


def _mentions(exc: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(exc, RuntimeError) and any(sign in str(exc) for sign in signs)


def _reason(exc: BaseException) -> str:
    """Return the first line of a message; for NCCL also its last error, which is further down."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()] or [type(exc).__name__]
    if "Last error:" in lines[:-1]:
        lines[0] += f" {lines[lines.index('Last error:') + 1]}"
    return lines[0][:MOST_LETTERS]
