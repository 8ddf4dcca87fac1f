"""What ends a run before its time -> one flag, which every step reads: signals, a cloud's notice, a deadline."""

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from finetune.engine.notices import Notice, Watch
from finetune.errors import EXIT_PREEMPTED, CheckpointError, Preempted

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
DEADLINE = "checkpoint.max_minutes are over"


class StopFlag:
    """SIGTERM, SIGINT and SIGUSR1, what a cloud says, and checkpoint.max_minutes.

    At first, while torch is being imported, they end the process, as there is nothing to save: code in C swallows what a
    handler raises, or aborts. After `raises` they raise Preempted. After `only_note` they set the
    flag, and what is under way is finished and saved; a second SIGINT quits at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.wants_save = False
        """A cloud has warned that it may take the machine."""
        self._began = time.monotonic()  # of the process, near enough: this is the first that train.py makes
        self._grace_seconds = 0.0
        self._goes: float | None = None
        self._is_importing, self._at_once, self._has_begun, self._interrupted = True, True, False, False
        self._watch: Watch | None = None
        self._timer: threading.Timer | None = None
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def configure(
        self, *, grace_seconds: float, max_minutes: float | None, cloud: str | None, say: Callable[[str], None]
    ) -> None:
        """`cloud`: whose notices to ask for, on this machine."""
        self._grace_seconds = grace_seconds
        if max_minutes is not None:
            left = max(0.0, self._began + 60 * max_minutes - time.monotonic())
            self._timer = threading.Timer(left, self._stop_by_signal, [DEADLINE])
            self._timer.daemon = True
            self._timer.start()
        if cloud is not None:
            self._watch = Watch(cloud, self._heard, say)
            self._watch.start()

    def close(self) -> None:
        """The run has ended: nothing can stop it any more."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self._timer:
            self._timer.cancel()
        if self._watch:
            self._watch.stop()

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def seconds_left(self) -> float:
        """Until the machine goes, as far as anybody has said."""
        return self._goes - time.monotonic() if self._goes is not None else self._grace_seconds

    def raises(self) -> None:
        """From now on what stops the run is an exception."""
        self._is_importing = False

    def only_note(self) -> None:
        """From now on the loop decides when to stop."""
        self._at_once, self._has_begun = False, True

    def at_once(self) -> None:
        """Everything is saved: from now on whatever stops the run stops it where it is."""
        self._at_once = True
        if self.is_set:
            raise Preempted(f"{self.reason}; run the same command again")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_importing:
            os.write(
                2,
                f"preempted: {signal.Signals(number).name} before anything was begun; run the same command again\n".encode(),
            )
            os._exit(EXIT_PREEMPTED)
        # Noted before it is raised: what is raised inside a destructor is lost.
        if self.reason is None:
            self.reason, self._goes = signal.Signals(number).name, time.monotonic() + self._grace_seconds
        if self._at_once:
            if self.reason == DEADLINE and not self._has_begun:
                raise CheckpointError(
                    f"{DEADLINE} before the first step of this attempt, and would be every time; raise them"
                )
            raise Preempted(f"{self.reason}; run the same command again")
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True

    def _heard(self, notice: Notice) -> None:
        if not notice.final:
            self.wants_save = True
            return
        if notice.deadline is not None:
            self._goes = time.monotonic() + notice.deadline - time.time()
        self._stop_by_signal(notice.reason)

    def _stop_by_signal(self, reason: str) -> None:
        """From another thread: only a signal reaches a main thread that is not in the loop."""
        self.reason = self.reason or reason
        os.kill(os.getpid(), signal.SIGUSR1)
