"""Map a function over lists of items in several processes; results keep the order of the items."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any

from finetune.errors import OutOfMemory

CHUNK = 1_000  # items: sending a list costs 1 ms, working on it 20 and more
_function: list[Callable[[Any], Any]] = []


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def chunks(items: Iterable[Any], size: int = CHUNK) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def mapped(
    make: Callable[..., Callable[[Any], Any]],
    parts: Iterable[Any],
    workers: int,
    *arguments: Any,
    ahead: int | None = None,
    fewer: str = "fewer --workers",
) -> Iterator[Any]:
    """Yield `make(*arguments)(part)` for each part, in order.

    `make` runs once in each process, for what is slow to load. One part alone needs no process
    more. Each process is started fresh: a fork would inherit locks of the libraries' threads.

    `ahead`: parts that are taken before the first result is yielded; by default twice the workers.
    `fewer`: how to take less memory, for the error where it was not enough.
    """
    parts, most = iter(parts), 2 * workers if ahead is None else ahead
    first = list(islice(parts, 2))
    if workers < 2 or len(first) < 2:
        function = make(*arguments)
        yield from map(function, chain(first, parts))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, _begin, (make, arguments))
    try:
        waiting: deque[Future[Any]] = deque()
        for part in chain(first, parts):
            waiting.append(pool.submit(_call, part))
            if len(waiting) > most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as exc:
        what = "a worker process was killed, perhaps for its memory"
        raise OutOfMemory(f"{what}; try again with {fewer}") from exc
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(make: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    """Prepare a worker process."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes share the cores already
    depend_on_parent()
    _function[:] = [make(*arguments)]


def depend_on_parent() -> None:
    """End this process when the one that started it ends, and leave Ctrl-C to that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(part: Any) -> Any:
    return _function[0](part)
