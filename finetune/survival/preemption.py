"""What ends a run before its time -> one flag, which every step reads: signals, a cloud's notice, a
deadline.
"""

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
# What the kernel sends when the launcher dies: not SIGTERM, as it also sends it when only the
# launcher's thread has ended.
LAUNCHER_DIED = getattr(signal, "SIGRTMIN", signal.SIGUSR1)  # only Linux has it, and the request
PR_SET_PDEATHSIG = 1
LAUNCHERS = {
    "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli",
    "torchrun", "torch.distributed.run", "torch.distributed.launch",
}  # fmt: skip
STOPPING = b"\nstopping after this step, then saving; Ctrl-C again quits at once, and loses what is not saved yet\n"
DEADLINE = "checkpoint.max_minutes are over"


class StopFlag:
    """SIGTERM, SIGINT, SIGUSR1 and SIGHUP (unless nohup ignores it), the launcher's death, what a
    cloud says, and checkpoint.max_minutes.

    At first, while torch is being imported, they end the process, as there is nothing to save: code
    in C swallows what a handler raises, or aborts. After `raises` they raise Preempted. After
    `only_note` they set the flag, and what is under way is finished and saved; a second SIGINT
    quits at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.wants_save = False
        """A cloud has warned that it may take the machine."""
        self._began = (
            time.monotonic()
        )  # of the process, near enough: this is the first that train.py makes
        self._grace_seconds = 0.0
        self._goes: float | None = None
        self._is_importing, self._at_once, self._has_begun, self._interrupted = (
            True,
            True,
            False,
            False,
        )
        self._watch: Watch | None = None
        self._timer: threading.Timer | None = None
        self._launcher = 0
        self._signals = [
            number for number in SIGNALS if number != signal.SIGHUP or not _is_ignored(number)
        ]
        for number in self._signals:
            signal.signal(number, self._handle)

    def follow_launcher(self) -> None:
        """Stop when the launcher that started this process dies: ours, `accelerate launch` or
        torchrun. It may not live to pass a signal on.

        Linux only. No other parent counts: a shell may end, and what it has started goes on.
        """
        if not Path("/proc/self/cmdline").exists():
            return
        parent, ours = os.getppid(), os.environ.get(LAUNCHER)
        if str(parent) == ours or _is_launcher(parent):
            self._launcher = parent
            self._signals.append(LAUNCHER_DIED)
            signal.signal(LAUNCHER_DIED, self._handle)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, LAUNCHER_DIED)
            has_died = os.getppid() != parent  # before the kernel was asked
        elif ours:  # or while Python started
            has_died = not Path("/proc", ours).exists()
        else:  # then what Accelerate has set is all that tells of it
            has_died = "ACCELERATE_MIXED_PRECISION" in os.environ and _has_other_parent()
        if has_died:
            self._handle(LAUNCHER_DIED, None)

    def configure(
        self,
        *,
        grace_seconds: float,
        max_minutes: float | None,
        cloud: str | None,
        log: Callable[[str], None],
    ) -> None:
        """`cloud`: whose notices to ask for, on this machine."""
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
        """The run has ended: nothing can stop it any more."""
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
        """Count the seconds until the machine goes, as far as is known."""
        return self._goes - time.monotonic() if self._goes is not None else self._grace_seconds

    def save_seconds(self) -> float | None:
        """Time for a last save; None: any, as after Ctrl-C, where the machine stays."""
        return None if self.reason == signal.SIGINT.name else self.seconds_left()

    def raises(self) -> None:
        """From now on what stops the run is an exception."""
        self._is_importing = False

    def only_note(self) -> None:
        """From now on the loop decides when to stop."""
        self._at_once, self._has_begun = False, True

    def at_once(self) -> None:
        """Everything is saved: from now on a signal ends the run at once."""
        self._at_once = True
        if self.is_set:
            raise Preempted(f"{self.reason}; run the same command again")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == LAUNCHER_DIED and os.getppid() == self._launcher:
            return  # it lives: only the thread that started this process has ended
        reason = "the launcher has died" if number == LAUNCHER_DIED else signal.Signals(number).name
        if self._is_importing:
            end = _preempted(reason, f"{reason} before anything was begun")
            os.write(2, f"{end.label}: {end}\n".encode())
            os._exit(end.exit_code)
        # Noted before it is raised: what is raised inside a destructor is lost.
        if self.reason is None:
            self.reason, self._goes = reason, time.monotonic() + self._grace_seconds
        if self._at_once:
            if self.reason == DEADLINE and not self._has_begun:
                raise CheckpointError(
                    f"{DEADLINE} before the first step of this attempt, "
                    "and would be every time; raise them"
                )
            if not self._has_begun:
                raise _preempted(self.reason, self.reason)
            raise Preempted(f"{self.reason}; run the same command again")
        if number == signal.SIGINT:
            if self._interrupted:
                os._exit(128 + number)
            self._interrupted = True
            if (
                os.environ.get("RANK", "0") == "0"
            ):  # print may be what the signal has interrupted, and would fail
                os.write(2, STOPPING)

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


def _preempted(reason: str, when: str) -> Preempted:
    """The end of an attempt before its first step. After Ctrl-C there is no advice to try again."""
    if reason == signal.SIGINT.name:
        return Interrupted("by Ctrl-C before the first step of this attempt; it saved nothing")
    return Preempted(f"{when}; run the same command again")


def _is_ignored(number: signal.Signals) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN


def _is_launcher(pid: int) -> bool:
    """Whether a process is `accelerate launch` or torchrun, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has gone
        return False
    names = {Path(word).name for word in words}
    return bool(names & LAUNCHERS) or {"accelerate", "launch"} <= names


def _has_other_parent() -> bool:
    """Whether the process that started this one has gone: a session is inherited, and this one's is
    not the parent's.
    """
    try:
        return os.getsid(0) not in (os.getpid(), os.getsid(os.getppid()))
    except (OSError, ValueError):  # PID 1 of a container has no parent that it could see
        return False
