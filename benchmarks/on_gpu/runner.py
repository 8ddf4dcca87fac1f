"""Processes with a time limit, several at once, under one deadline. Needs no torch."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[2]
T = TypeVar("T")
# What a cluster's or another launcher's environment would tell our processes about themselves.
OTHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
)


class Clock:
    """The time that a part has."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds = time.monotonic(), seconds

    def used(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.seconds - self.used()

    def stop(self) -> None:
        """What runs is killed, and nothing more starts."""
        self.seconds = 0.0


@dataclass(frozen=True)
class Ended:
    """How a process ended. `code` None: it was killed because its time was up."""

    code: int | None
    seconds: float
    said: str
    was_out_of_turn: bool = False
    """The part's time was up, not its own."""


@dataclass
class Row:
    """One line of the result."""

    part: str
    name: str
    status: str
    """right, measured (nothing to compare with), wrong, known failure, left out (something is missing here) or no turn (time was up)."""
    reason: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


def environment(work: Path, threads: int, on_cpu: bool) -> dict[str, str]:
    """For every process that is started: no network, no one else's launcher, few threads, nothing outside `work`."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in OTHERS and not k.startswith(("ACCELERATE_", "FINETUNE_", "FSDP_"))
    }
    kept |= {
        "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf"), "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip
    # One GPU, even where there are more; -1 hides them all.
    kept["CUDA_VISIBLE_DEVICES"] = "-1" if on_cpu else kept.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return kept


def run(
    command: Sequence[str], *, env: dict[str, str], log: Path, limit: float, clock: Clock,
    meanwhile: Callable[[subprocess.Popen[bytes]], bool] = lambda process: True,
) -> Ended:  # fmt: skip
    """Run until it ends or its time is up; then it and all that it started are killed. What it says is appended to `log`.

    `meanwhile` is called every twentieth of a second until it answers True.
    """
    began, is_done = time.monotonic(), False
    stop_at = began + limit
    with log.open("ab") as out:
        start = out.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < stop_at and clock.left() > 0:
                is_done = is_done or meanwhile(process)
                time.sleep(0.05)
            code = process.poll()
        finally:
            kill_tree(process)
    seconds = time.monotonic() - began
    with log.open("rb") as file:
        file.seek(start)
        said = file.read().decode(errors="replace")
    return Ended(code, seconds, said, was_out_of_turn=code is None and seconds < limit)


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that still runs, and everything that it started, also in sessions of its own."""
    if process.poll() is not None:
        return
    for pid in [*_descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Children, their children, ... of a process, by Linux's /proc."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def side_by_side(jobs: int, work: Iterable[T], do: Callable[[T], Row], clock: Clock, out_of_turn: Callable[[T], Row]) -> list[Row]:  # fmt: skip
    """Rows of all, `jobs` at once, in the order of `work`. What would start after the deadline gets no turn."""

    def one(item: T) -> Row:
        return do(item) if clock.left() > 0 else out_of_turn(item)

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(one, work))
        except BaseException:
            clock.stop()
            raise


class Helper:
    """A process that has torch, so that this one need not: helper.py answers one request after the other."""

    def __init__(self, env: dict[str, str], log: Path) -> None:
        self._log = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("helper.py"))], cwd=ROOT, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True,
        )  # fmt: skip

    def ask(self, what: str, limit: float, **arguments: Any) -> Any:
        """Raises RuntimeError with what went wrong, also when the answer comes too late."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise RuntimeError(f"the helper has ended; see {self._log.name}") from exc
        if not select.select([self._process.stdout], [], [], max(limit, 0.0))[0]:
            self.close()
            raise RuntimeError(f"the helper did not answer to {what} in {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the helper ended while it did {what}; see {self._log.name}")
        problem, answer = json.loads(line)
        if problem:
            raise RuntimeError(problem)
        return answer

    def close(self) -> None:
        kill_tree(self._process)
        self._log.close()


def last_words(said: str) -> str:
    """What a log says that went wrong: the last line of an error, in at most 300 characters."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    telling = [
        line for line in lines if any(word in line for word in ("rror:", "failed:", "out of memory", "preempted:"))
    ]
    return (telling or lines or ["it said nothing"])[-1][:300]
