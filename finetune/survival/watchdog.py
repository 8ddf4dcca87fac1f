"""End this process when another one has died, was stopped, or makes no progress.

A process in a collective would wait for hours for one that is gone. So once a second each process
writes to a store that it lives and how far its main thread is. The main process reads all entries,
the others only that of the main process: N messages a second for N processes.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from finetune.places import BEATS

# After a connection broke, a process that is silent for this long counts as gone.
SOON_SECONDS = 3.0


class Watchdog:
    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number = rank, number
        self.at, self.step = "the start", 0
        self._ticks, self._ticked, self._moves = 0, time.monotonic(), False
        self._waiting: Callable[[], float] | None = None
        self._store: TCPStore | None = None
        # Rank -> its last heartbeat, and when that arrived.
        self._heard: dict[int, tuple[dict[str, Any], float]] = {}
        self._verdict: str | None = None
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []
        folder = os.environ.get(BEATS)
        self._file = Path(folder) / str(rank) if folder else None

    def start(
        self,
        bound_seconds: float | None,
        end: Callable[[str], None],
        hurries: Callable[[], bool] = lambda: False,
    ) -> None:
        """Call `end` with a message, in a thread, if a process is silent or all hang.

        `bound_seconds`: for how long; None: never. `hurries`: whether the machine goes away soon;
        then a save in which all wait for each other ends the run after SOON_SECONDS.
        """
        self._bound, self._end, self._hurries = bound_seconds, end, hurries
        self._interval = min(1.0, (bound_seconds or 10.0) / 10)
        if self.number > 1:  # open another connection to the store where the processes met
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._heard = {rank: ({}, time.monotonic()) for rank in self._others()}
        # Asking a store whose process was stopped never returns, so another thread watches the
        # clock.
        for work in (self._exchange, self._watch):
            thread = threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._interval)

    def heartbeat(self, at: str | None = None) -> None:
        """Record progress of the main thread. Until `pause`, no heartbeat means that it hangs."""
        self._ticks, self._ticked = self._ticks + 1, time.monotonic()
        self.at, self._moves, self._waiting = at or self.at, True, None
        if at and at.startswith("step "):
            self.step = int(at.removeprefix("step ")) - 1  # the last finished one

    def pause(self, at: str, waiting: Callable[[], float] | None = None) -> None:
        """Allow any time until the next heartbeat.

        `waiting`: for a save, returns for how many seconds this process has waited for the others:
        if all processes wait, one has died silently.
        """
        self.at, self._waiting, self._moves = at, waiting, False

    def silent(self) -> list[int]:
        """Return processes without a heartbeat for SOON_SECONDS; one died if a connection broke."""
        time.sleep(SOON_SECONDS)
        now = time.monotonic()
        return [
            rank
            for rank, (_, since) in self._heard.items()
            if now - since >= SOON_SECONDS - self._interval
        ]

    def _others(self) -> Iterable[int]:
        return range(1, self.number) if self.rank == 0 else [0]

    def _exchange(self) -> None:
        number = 0
        self._note()
        while not self._stopped.wait(self._interval):
            number += 1
            self._note()
            if self._store is None:
                continue
            heartbeat = {"number": number, "verdict": self._verdict, **self._own()}
            try:
                self._store.set(f"beat/{self.rank}", json.dumps(heartbeat))
                for rank in self._others():
                    if self._store.check([f"beat/{rank}"]):
                        latest = json.loads(self._store.get(f"beat/{rank}"))
                        if latest != self._heard[rank][0]:
                            self._heard[rank] = (latest, time.monotonic())
            # The store died with the main process or its launcher; now their silence counts.
            except Exception:
                self._store = None

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            if problem := self._problem():
                self._verdict = problem
                self._stopped.wait(2 * self._interval)  # for the others to read this verdict
                self._end(problem)
                return

    def _own(self) -> dict[str, Any]:
        """Return where this process is, and for how many seconds it has made no progress."""
        moves, waiting = self._moves, self._waiting
        idle = time.monotonic() - self._ticked if moves else waiting() if waiting else 0.0
        saves = not moves and waiting is not None
        return {"at": self.at, "ticks": self._ticks, "idle": idle, "saves": saves}

    def _problem(self) -> str | None:
        now, bound = time.monotonic(), self._bound
        for rank, (heartbeat, since) in self._heard.items():
            if verdict := heartbeat.get("verdict"):
                return str(verdict)
            if bound is not None and now - since > bound:
                where = self.at if self._moves else heartbeat.get("at", self.at)
                return f"process {rank} has not answered for {bound:.3g} s, last at {where}"
        if self.rank > 0:
            return None
        heartbeats = {0: self._own()}
        heartbeats |= {rank: latest for rank, (latest, _) in self._heard.items() if latest}
        if all(heartbeat["saves"] for heartbeat in heartbeats.values()) and self._hurries():
            bound = SOON_SECONDS if bound is None else min(bound, SOON_SECONDS)
        if (
            bound is None
            or len(heartbeats) < self.number
            or any(heartbeat["idle"] <= bound for heartbeat in heartbeats.values())
        ):
            return None
        # All wait for those that are least far.
        least = min(heartbeats.values(), key=lambda heartbeat: heartbeat["ticks"])
        behind = [rank for rank in heartbeats if heartbeats[rank]["ticks"] == least["ticks"]]
        who = f"process {', '.join(map(str, behind))}"
        if len(behind) == self.number:
            who = "every process"
        return f"{who} has made no progress for {bound:.3g} s at {least['at']}"

    def _note(self) -> None:
        if self._file:
            try:
                fresh = self._file.with_suffix(".new")
                fresh.write_text(self.at)
                fresh.rename(self._file)  # never half of it
            except OSError:
                self._file = None  # the launcher is gone
