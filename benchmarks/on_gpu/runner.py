"""Run processes with a time limit, several at once, under one deadline. Needs no torch."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
MARK = "MAKE_GPU_PROCESS"
"""A variable that every process of one start inherits, by which `kill` finds them."""
# Variables of a cluster or of another launcher, which our processes must not see.
OTHERS = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR",
    "MASTER_PORT", "NODE_RANK",
)  # fmt: skip


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Clock:
    """The time that a part has."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds

    def used(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.seconds - self.used()

    def stop(self) -> None:
        """Kill what runs, and start nothing more."""
        self.seconds = 0.0


@dataclass(frozen=True)
class Ended:
    """How a process ended. `code` None: it was killed because its time was up."""

    code: int | None
    seconds: float
    output: str
    was_out_of_turn: bool = False
    """The part's time was up, not its own."""


@dataclass
class Row:
    """One line of the result."""

    part: str
    name: str
    status: str
    """right, measured (nothing to compare with), wrong, known failure, left out (something is
    missing here, or time was short) or no turn (time was up).
    """
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


def environment(work: Path, threads: int, on_cpu: bool) -> dict[str, str]:
    """Return the environment of our processes: offline, few threads, caches inside `work`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in OTHERS and not k.startswith(("ACCELERATE_", "FINETUNE_", "FSDP_"))
    }
    kept |= {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"),
        "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    # One GPU, even where there are more; -1 hides them all.
    kept["CUDA_VISIBLE_DEVICES"] = (
        "-1" if on_cpu else kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    )
    return kept


def run(
    command: Sequence[str], *, env: dict[str, str], log: Path, limit: float, clock: Clock,
    meanwhile: Callable[[subprocess.Popen[bytes]], bool] = lambda process: True,
) -> Ended:  # fmt: skip
    """Run a command until it ends or its time is up, then kill all that it started.

    Appends its output to `log`. Calls `meanwhile` every twentieth of a second until it is True.
    """
    began, is_done = time.monotonic(), False
    stop_at = began + limit
    with log.open("ab") as out:
        start = out.tell()
        mark = uuid.uuid4().hex
        process = subprocess.Popen(
            command, cwd=ROOT, env=env | {MARK: mark}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < stop_at and clock.left() > 0:
                is_done = is_done or meanwhile(process)
                time.sleep(0.05)
            code = process.poll()
        finally:
            kill(process, mark)
    seconds = time.monotonic() - began
    with log.open("rb") as file:
        file.seek(start)
        output = file.read().decode(errors="replace")
    return Ended(code, seconds, output, was_out_of_turn=code is None and seconds < limit)


def kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a process and everything that it started, also if it has ended, in any session.

    A worker that outlives its launcher would keep its memory of the GPU, and the next cases would
    fail for want of it.
    """
    if process.poll() is None:
        process.kill()
    for _ in range(10):  # what is found may start others before it is killed
        if not (found := _marked(mark)):
            break
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)  # longer only if a driver holds it, and then it cannot be killed


def _marked(mark: str) -> list[int]:
    """Return the running processes with this mark in their environment, by Linux's /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def threads(number: int, clock: Clock) -> Iterator[ThreadPoolExecutor]:
    """Wait for the threads; if a signal or an error interrupts, kill what they run."""
    pool = ThreadPoolExecutor(number)
    try:
        yield pool
    except BaseException:
        clock.stop()
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()


def side_by_side(
    jobs: int,
    work: Iterable[T],
    do: Callable[[T], Row],
    clock: Clock,
    out_of_turn: Callable[[T], Row],
) -> list[Row]:
    """Return the rows of all, `jobs` at once, in the order of `work`.

    What would start after the deadline gets no turn.
    """

    def one(item: T) -> Row:
        return do(item) if clock.left() > 0 else out_of_turn(item)

    with threads(jobs, clock) as pool:
        return list(pool.map(one, work))


class Helper:
    """A process that has torch, so that this one need not: it runs helper.py.

    One that ended, or did not answer in time, is replaced at the next request: a late answer would
    be taken for the next one's.
    """

    def __init__(self, env: dict[str, str], log: Path, clock: Clock) -> None:
        self._env, self._log, self._clock = env, log.open("ab"), clock
        self._process: subprocess.Popen[bytes] | None = None
        self._mark = uuid.uuid4().hex

    def ask(self, what: str, limit: float, **arguments: Any) -> Any:
        """Raises RuntimeError with what went wrong, also when the answer comes too late."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
            process.stdin.flush()
            until = time.monotonic() + min(limit, self._clock.left())
            while not select.select([process.stdout], [], [], 0.2)[0]:
                if time.monotonic() > until or self._clock.left() <= 0:
                    raise RuntimeError(
                        f"the helper did not answer to {what} in {max(limit, 0):.0f} s"
                    )
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"the helper ended while it did {what}; see {self._log.name}")
            problem, answer = json.loads(line)
        except OSError as exc:
            self._end()
            raise RuntimeError(f"the helper has ended; see {self._log.name}") from exc
        except RuntimeError:
            self._end()
            raise
        if problem:
            raise RuntimeError(problem)
        return answer

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("helper.py"))], cwd=ROOT,
            env=self._env | {MARK: self._mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, start_new_session=True,
        )  # fmt: skip

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        kill(process, self._mark)
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # what was not sent to one that has ended
                if stream is not None:
                    stream.close()

    def restart(self) -> None:
        """Have the next request answered by a new process."""
        self._end()

    def close(self) -> None:
        self._end()
        self._log.close()


def last_words(output: str) -> str:
    """Return the last line of an error in an output, in at most 300 characters."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [
        line
        for line in lines
        if any(word in line for word in ("rror:", "failed:", "out of memory", "preempted:"))
    ]
    return (errors or lines or ["without output"])[-1][:300]
