"""Signals -> one flag, which every step reads."""

import os
import signal
from types import FrameType

from finetune.errors import Preempted


class StopFlag:
    """What SIGTERM, SIGINT and SIGUSR1 do.

    Before the loop there is nothing to save, and they raise Preempted at once. After `only_note`
    they set the flag, and the step under way is finished and saved; a second SIGINT quits at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._at_once = True
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def only_note(self) -> None:
        """From now on the loop decides when to stop."""
        self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once:
            raise Preempted(f"{signal.Signals(number).name} before the first step; run the same command again")
        if self.is_set and number == signal.SIGINT:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
