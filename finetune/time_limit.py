"""A limit of seconds for code and patterns of a user's own, such as a score that never ends."""

import signal
import threading
from types import FrameType

from finetune.errors import DataError

AGAIN = 1.0  # seconds between interrupts, for code that catches the first


class _Over(BaseException):
    """Not an Exception, as code that may fail often catches those and goes on."""


class TimeLimit:
    """A context manager that ends its block after `seconds` with a DataError about `what`.

    A signal interrupts Python code and the search for a regular expression, but no other code in
    C. Only the main thread gets it; other threads have no limit.
    """

    def __init__(self, seconds: float, what: str, hint: str = "make it faster") -> None:
        self._seconds, self._what, self._hint = seconds, what, hint
        self._is_over, self._has_ended = False, False

    def __enter__(self) -> "TimeLimit":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._handler = signal.signal(signal.SIGALRM, self._interrupt)
            self._timer = signal.setitimer(signal.ITIMER_REAL, self._seconds, AGAIN)
        return self

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._has_ended:
            self._is_over = True
            raise _Over

    def __exit__(self, *exc: object) -> None:
        self._has_ended = True
        if self._is_main:
            signal.setitimer(signal.ITIMER_REAL, *self._timer)
            signal.signal(signal.SIGALRM, self._handler)
        if self._is_over:
            raise DataError(
                f"{self._what}: not done after {self._seconds:g} s; {self._hint}"
            ) from None
