"""Run the processes of one node: forward signals to all, return the first failure's exit code."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_PREEMPTED, EXIT_USER_ERROR
from finetune.places import BEATS, LAUNCHER, RUN

OTHERS_SECONDS = 10.0  # after one has failed, for the others to notice and write why they end
FINISH_SECONDS = 120.0  # after one has ended normally, for the others to finish
KILL_SECONDS = 10.0  # for the kernel to end a killed process
FORWARDED = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal has closed: save and end
}
POLL_SECONDS = 0.05


def run(environments: list[dict[str, str]], command: list[str]) -> int:
    """Start one process per environment, wait for all, and return their exit code.

    Returns 0 if all end with 0, else the first other code if it is 2 or 75, else 1. A process that
    SIGTERM killed before it had a handler counts as 75: it had nothing to save yet. Call it in the
    main thread, which handles signals.
    """
    with forwarding() as heard:
        return supervise(heard, environments, command)


def log(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # keep supervising if the stream is closed
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


@contextlib.contextmanager
def forwarding() -> Iterator[list[signal.Signals]]:
    """Yield a list that collects the signals to forward, in the order in which they arrive."""
    heard: list[signal.Signals] = []
    is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in FORWARDED if number != signal.SIGHUP or not is_nohup]

    def note(number: int, _: object) -> None:
        heard.append(FORWARDED[signal.Signals(number)])

    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Worker:
    """A process in its own session, so that Ctrl-C in a terminal reaches only the launcher."""

    def __init__(self, environment: dict[str, str], command: list[str], beats: Path | None) -> None:
        self.rank = environment.get("RANK", "0")
        self.name = f"process {self.rank}"
        self.code: int | None = None
        """The exit code as in subprocess: -9 means SIGKILL."""
        self._was_terminated = False
        self._beat = beats / self.rank if beats else None
        environment = {**environment, LAUNCHER: str(os.getpid())}
        if beats:
            environment[BEATS] = str(beats)
        self._process = subprocess.Popen(command, env=environment, start_new_session=True)

    @property
    def has_failed(self) -> bool:
        return self.code not in (None, EXIT_COMPLETE, EXIT_USER_ERROR, EXIT_PREEMPTED)

    def has_ended(self) -> bool:
        """Return whether it has ended; if so, kill its session (data loaders) and set `code`."""
        if self.code is None and (code := self._process.poll()) is not None:
            self.kill()
            had_no_handler = self._was_terminated and code == -signal.SIGTERM
            self.code = EXIT_PREEMPTED if had_no_handler else code
        return self.code is not None

    def send(self, number: signal.Signals) -> None:
        self._was_terminated |= number == signal.SIGTERM
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it and its children, even while it is stopped."""
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def bury(self) -> None:
        """Wait until it is gone, after `kill`; log it if the kernel does not let it go."""
        try:
            self._process.wait(timeout=KILL_SECONDS)
        except subprocess.TimeoutExpired:
            log(f"{self.name} cannot be killed: it waits in the kernel for a disk or a GPU")

    def end(self) -> str:
        """Return how it ended, and where: `was killed by SIGKILL in step 38`."""
        if self.code is not None and self.code < 0:
            known = -self.code in set(signal.Signals)
            name = signal.Signals(-self.code).name if known else f"signal {-self.code}"
            how = f"was killed by {name}"
        else:
            how = f"ended with exit code {self.code}"
        return how + self.where()

    def where(self) -> str:
        try:
            [at, *_] = self._beat.read_text(errors="replace").splitlines() if self._beat else [""]
        except (OSError, ValueError):  # it has not written anything yet
            return ""
        if not at.strip():
            return ""
        return f" {'in' if at.startswith('step') else 'at'} {at[:100].strip()}"


def supervise(
    heard: list[signal.Signals], environments: list[dict[str, str]], command: list[str]
) -> int:
    """Start and supervise the processes; leave none behind, even after an error."""
    if heard:
        log(
            "preempted: a signal came before the first process was started; "
            "run the same command again"
        )
        return EXIT_PREEMPTED
    workers: list[_Worker] = []
    problems: list[str] = []
    with _beats() as beats:
        try:
            for environment in environments:
                workers.append(_Worker(environment, command, beats))
            return _watch(heard, workers, problems)
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.bury()
            if beats and problems:
                _note_end(beats / RUN, problems[0])


def _note_end(run: Path, problem: str) -> None:
    """Write the outcome of a run whose processes died before they could."""
    with contextlib.suppress(OSError):
        directory = Path(run.read_text())
        from finetune.engine.rundir import note_end_of  # seldom needed, and 0.3 s

        note_end_of(directory, "failed", problem)


@contextlib.contextmanager
def _beats() -> Iterator[Path | None]:
    try:
        folder = tempfile.mkdtemp(prefix="finetune-")
    except OSError:  # this machine cannot write: messages will not name the step
        yield None
        return
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(heard: list[signal.Signals], workers: list[_Worker], problems: list[str]) -> int:
    """Wait until all processes end, or kill those that take too long after another's end.

    Returns the exit code, and appends to `problems` a message about each process that failed. After
    a signal they may take any time.
    """
    codes: list[int | None] = []  # in the order in which they ended
    deadline, because = float("inf"), ""
    while living := [worker for worker in workers if worker.code is None]:
        left = deadline - time.monotonic()
        if left <= 0:
            for worker in living:
                problems.append(
                    f"{worker.name} had not ended {because}, and was killed{worker.where()}"
                )
                log(problems[-1])
            break
        time.sleep(min(left, POLL_SECONDS))
        while heard:
            number = heard.pop(0)
            for worker in living:
                worker.send(number)
        for worker in living:
            if not worker.has_ended():
                continue
            codes.append(worker.code)
            if worker.has_failed:
                problems.append(f"{worker.name} {worker.end()}")
                log(problems[-1])
            seconds = OTHERS_SECONDS if worker.has_failed else FINISH_SECONDS
            if time.monotonic() + seconds < deadline:
                deadline = time.monotonic() + seconds
                because = f"{seconds:g} seconds after {worker.name}"
    first = next((code for code in codes if code), EXIT_COMPLETE)
    if first in (EXIT_USER_ERROR, EXIT_PREEMPTED):
        return first
    return EXIT_COMPLETE if first == EXIT_COMPLETE and len(codes) == len(workers) else EXIT_FAILED
