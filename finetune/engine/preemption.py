"""Signals -> one flag, which every step reads."""

import os
import signal
from types import FrameType


class StopFlag:
    """Set by SIGTERM, SIGINT or SIGUSR1. The handler only notes it; a second SIGINT quits at once."""

    def __init__(self) -> None:
        self.reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.is_set and number == signal.SIGINT:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
