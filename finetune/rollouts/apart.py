"""Code in a process of its own, so that what hangs or dies there costs one answer.

A thread could not be ended, and a pattern that backtracks holds the interpreter's lock.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Generic, TypeVar

from finetune.errors import FinetuneError
from finetune.workers import depend_on_parent

Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
START_SECONDS = 120.0  # to import what the code needs, on a busy machine
SLICE_SECONDS = 0.5
STOPS = "the run stops"
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class Apart(Generic[Asked, Answer]):
    """Calls `make(*arguments)` in another process, and its result for each of what is asked.

    The process ends with the thread that made the first call, or with the run.

    gap: makes the answer of a reason for which there is none. seconds: for an answer.
    call_seconds: for all answers of a call. whole: the result gets them all at once, and only the
    second limit holds. `make`, its arguments and `gap` must be picklable.
    """

    def __init__(
        self, make: Callable[..., Callable[[Sequence[Asked]], list[Answer]]],
        arguments: tuple[Any, ...], gap: Callable[[str], Answer], *, seconds: float,
        call_seconds: float, whole: bool = False,
    ) -> None:  # fmt: skip
        self._make, self._arguments, self._gap, self._whole = make, arguments, gap, whole
        self._seconds, self._call_seconds = seconds, call_seconds
        self._stop: Callable[[], bool] = lambda: False
        self._process: Any = None
        self._connection: Connection | None = None

    def open(self, stop: Callable[[], bool]) -> None:
        """Take the request to stop, after which no answer is waited for."""
        self._stop = stop

    def __call__(self, asked: Sequence[Asked]) -> list[Answer]:
        if self._connection is None and not self._start():
            return [self._gap(STOPS)] * len(asked)
        end = monotonic() + self._call_seconds
        if self._whole:
            return self._ask(asked, self._call_seconds)
        found = []
        for each in asked:
            left = end - monotonic()
            if left <= 0:
                found.append(self._gap(f"over {self._call_seconds:g} s for all answers"))
            else:
                found += self._ask([each], min(self._seconds, left))
        return found

    def _ask(self, asked: Sequence[Asked], seconds: float) -> list[Answer]:
        if self._connection is None and not self._start():
            return [self._gap(STOPS)] * len(asked)
        connection = self._connection
        assert connection is not None
        try:
            connection.send(asked)
            if self._answers(connection, seconds):
                found: list[Answer] = connection.recv()
                return found
            reason = STOPS if self._stop() else f"over {seconds:.3g} s"
        except (EOFError, OSError):
            self._process.join(1.0)
            reason = f"its process ended ({self._process.exitcode})"
        self.close()
        return [self._gap(reason)] * len(asked)

    def _answers(self, connection: Connection, seconds: float) -> bool:
        """Wait for an answer, in slices between which a request to stop is seen."""
        end = monotonic() + seconds
        while (left := end - monotonic()) > 0 and not self._stop():
            if connection.poll(min(left, SLICE_SECONDS)):
                return True
        return False

    def _start(self) -> bool:
        """Start the process; return False if a request to stop came before it was ready."""
        # Started fresh: a fork would inherit the locks of the libraries' threads.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._make, self._arguments, self._gap),
            daemon=True,
        )  # fmt: skip
        self._process.start()
        theirs.close()
        self._connection = ours
        try:
            if self._answers(ours, START_SECONDS):
                ours.recv()
                return True
            problem = f"is not ready after {START_SECONDS:g} s"
        except (EOFError, OSError):
            self._process.join(1.0)
            problem = f"ended ({self._process.exitcode}) before it was ready"
        self.close()
        if self._stop():
            return False
        raise FinetuneError(f"the process of rewards or environments {problem}")

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(
    connection: Connection, make: Callable[..., Callable[[Any], list[Any]]],
    arguments: tuple[Any, ...], gap: Callable[[str], Any],
) -> None:  # fmt: skip
    depend_on_parent()
    # Code that holds the interpreter's lock keeps that thread from running; the kernel needs none.
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    called, own_id = make(*arguments), os.getpid()
    connection.send(None)
    while True:
        try:
            asked = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = called(asked)
        except Exception as exc:
            found = [gap(f"{type(exc).__name__}: {exc}"[:200])] * len(asked)
        if os.getpid() != own_id:  # a fork that the code left behind would answer, too
            os._exit(0)
        connection.send(found)
