"""Collect signals, cloud notices and the deadline in one flag, which every step reads."""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from finetune.errors import CheckpointError, Interrupted, Preempted
from finetune.places import LAUNCHER
from finetune.survival.notices import Notice, Watch

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The kernel sends this when the launcher dies. Not SIGTERM: the kernel also sends it when only the
# launcher's thread ends. Only Linux has SIGRTMIN and PR_SET_PDEATHSIG.
LAUNCHER_DIED = getattr(signal, "SIGRTMIN", signal.SIGUSR1)
PR_SET_PDEATHSIG = 1
LAUNCHERS = {
    "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip
STOPPING = (
    b"\nstopping after this step, then saving; "
    b"Ctrl-C again quits at once, and loses what is not saved yet\n"
)
DEADLINE = "checkpoint.max_minutes are over"


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGHUP, the launcher's death, a cloud or the deadline.

    nohup ignores SIGHUP; the deadline is checkpoint.max_minutes. At first, while the process
    imports torch, these end the process: there is nothing to save, and C code swallows what a
    handler raises, or aborts. After `raises` they raise Preempted. After `only_note` they set the
    flag, and the run finishes its step and saves; a second SIGINT quits at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.wants_save = False
        """A cloud has warned that it may take the machine."""
        # Nearly the start of the process: train.py makes this object first.
        self._began = time.monotonic()
        self._grace_seconds = 0.0
        self._goes: float | None = None
        self._is_importing, self._at_once = True, True
        self._has_begun, self._interrupted = False, False
        self._watch: Watch | None = None
        self._timer: threading.Timer | None = None
        self._launcher = 0
        self._signals = [
            number for number in SIGNALS if number != signal.SIGHUP or not _is_ignored(number)
        ]
        for number in self._signals:
            signal.signal(number, self._handle)

    def follow_launcher(self) -> None:
        """Stop when the launcher dies, which may not live to forward a signal.

        Launchers are ours, `accelerate launch` and torchrun; other parents do not count, as a shell
        may end before the programs that it started. Linux only.
        """
        if not Path("/proc/self/cmdline").exists():
            return
        parent, ours = os.getppid(), os.environ.get(LAUNCHER)
        if str(parent) == ours or _is_launcher(parent):
            self._launcher = parent
            self._signals.append(LAUNCHER_DIED)
            signal.signal(LAUNCHER_DIED, self._handle)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)
            has_died = os.getppid() != parent  # it died before prctl
        elif ours:  # it may have died while Python started
            has_died = not Path("/proc", ours).exists()
        else:  # only Accelerate's variable shows that there was a launcher
            has_died = "ACCELERATE_MIXED_PRECISION" in os.environ and _has_other_parent()
        if has_died:
            self._handle(LAUNCHER_DIED, None)

    def configure(
        self, *, grace_seconds: float, max_minutes: float | None, cloud: str | None,
        log: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Start the deadline's timer and the thread that asks `cloud` for notices."""
        self._grace_seconds = grace_seconds
        if max_minutes is not None:
            left = max(0.0, self._began + 60 * max_minutes - time.monotonic())
            self._timer = threading.Timer(left, self._stop_by_signal, [DEADLINE])
            self._timer.daemon = True
            self._timer.start()
        if cloud is not None:
            self._watch = Watch(cloud, self._heard, log)
            self._watch.start()

    def close(self) -> None:
        """Ignore signals, deadline and notices from now on, as the run has ended."""
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        if self._timer:
            self._timer.cancel()
        if self._watch:
            self._watch.stop()

    @property
    def is_set(self) -> bool:
        return self.reason is not None

    def seconds_left(self) -> float:
        """Return the seconds until the machine goes, as far as is known."""
        return self._goes - time.monotonic() if self._goes is not None else self._grace_seconds

    def save_seconds(self) -> float | None:
        """Return the time for a last save; None after Ctrl-C, where the machine stays."""
        return None if self.reason == signal.SIGINT.name else self.seconds_left()

    def raises(self) -> None:
        """From now on, raise an exception to stop the run."""
        self._is_importing = False

    def only_note(self) -> None:
        """From now on, only set the flag: the loop decides when to stop."""
        self._at_once, self._has_begun = False, True

    def at_once(self) -> None:
        """From now on a signal ends the run at once, as everything is saved."""
        self._at_once = True
        if self.is_set:
            raise Preempted(f"{self.reason}; run the same command again")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == LAUNCHER_DIED and os.getppid() == self._launcher:
            return  # the launcher lives: only the thread that started this process has ended
        reason = "the launcher has died" if number == LAUNCHER_DIED else signal.Signals(number).name
        if self._is_importing:
            end = _preempted(reason, f"{reason} before anything was begun")
            os.write(2, f"{end.label}: {end}\n".encode())
            os._exit(end.exit_code)
        # Set the flag before raising: Python drops exceptions raised inside a destructor.
        if self.reason is None:
            self.reason, self._goes = reason, time.monotonic() + self._grace_seconds
        if self._at_once:
            if self.reason == DEADLINE and not self._has_begun:
                raise CheckpointError(
                    f"{DEADLINE} before the first step of this attempt, "
                    "and would be over at every start; raise them"
                )
            if not self._has_begun:
                raise _preempted(self.reason, self.reason)
            raise Preempted(f"{self.reason}; run the same command again")
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True
            if os.environ.get("RANK", "0") == "0":
                os.write(2, STOPPING)  # the signal may have interrupted a print

    def _heard(self, notice: Notice) -> None:
        if not notice.final:
            self.wants_save = True
            return
        if notice.deadline is not None:
            self._goes = time.monotonic() + notice.deadline - time.time()
        self._stop_by_signal(notice.reason)

    def _stop_by_signal(self, reason: str) -> None:
        """Stop from another thread; only a signal reaches a main thread outside the loop."""
        self.reason = self.reason or reason
        os.kill(os.getpid(), signal.SIGUSR1)


def _preempted(reason: str, when: str) -> Preempted:
    """Return the error for an end before the first step; after Ctrl-C without advice to retry."""
    if reason == signal.SIGINT.name:
        return Interrupted("by Ctrl-C before the first step of this attempt; it saved nothing")
    return Preempted(f"{when}; run the same command again")


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _is_launcher(pid: int) -> bool:
    """Return whether a process is `accelerate launch` or torchrun, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has gone
        return False
    names = {Path(word).name for word in words}
    return bool(names & LAUNCHERS) or {"accelerate", "launch"} <= names


def _has_other_parent() -> bool:
    """Return whether this process's original parent is gone: the session is not the parent's."""
    try:
        return os.getsid(0) not in (os.getpid(), os.getsid(os.getppid()))
    except (OSError, ValueError):  # PID 1 of a container sees no parent
        return False
