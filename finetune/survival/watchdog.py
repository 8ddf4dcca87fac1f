"""Notices when a process has died, was stopped, or stands still, and then ends this one.

A process that waits in a collective for one that has gone would wait for hours. So each tells a
store, once a second, that it is there and how far its main thread has come; the main process reads
what all of them say, and the others what the main process says: N messages a second for N
processes.
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

# Of silence, after which a process is taken for the one that has gone once a connection has broken
SOON_SECONDS = 3.0


class Watchdog:
    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number = rank, number
        self.at, self.step = "the start", 0
        self._ticks, self._ticked, self._moves = 0, time.monotonic(), False
        self._waiting: Callable[[], float] | None = None
        self._store: TCPStore | None = None
        self._heard: dict[
            int, tuple[dict[str, Any], float]
        ] = {}  # what each said last, and when that was new
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
        """From now on call `end` with a sentence, in a thread, when a process is silent or all
        stand still for so long.

        None: never. `hurries`: whether the machine goes away soon; then a save in which all wait
        for one another ends the run after SOON_SECONDS.
        """
        self._bound, self._end, self._hurries = bound_seconds, end, hurries
        self._interval = min(1.0, (bound_seconds or 10.0) / 10)
        if (
            self.number > 1
        ):  # a connection of its own to the store by which the processes have found each other
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._store = TCPStore(address, port, is_master=False, wait_for_workers=False)
            self._heard = {rank: ({}, time.monotonic()) for rank in self._others()}
        # Asking a store whose process was stopped never returns: what asks cannot be what watches
        # the clock.
        for work in (self._exchange, self._watch):
            self._threads.append(
                threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True)
            )
            self._threads[-1].start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(self._interval)

    def heartbeat(self, at: str | None = None) -> None:
        """The main thread has come further. From here until `rest`, no beat means that it stands
        still.
        """
        self._ticks, self._ticked = self._ticks + 1, time.monotonic()
        self.at, self._moves, self._waiting = at or self.at, True, None
        if at and at.startswith("step "):
            self.step = int(at.removeprefix("step ")) - 1  # the last that is done

    def pause(self, at: str, waiting: Callable[[], float] | None = None) -> None:
        """What comes now may take as long as it likes.

        `waiting`: for a save, how many seconds this process has waited for the others: not even a
        save may keep every process waiting, as then one of them has gone without a word.
        """
        self.at, self._waiting, self._moves = at, waiting, False

    def silent(self) -> list[int]:
        """Other processes that have said nothing for SOON_SECONDS: who has gone, once a connection
        has broken.
        """
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
                        said = json.loads(self._store.get(f"beat/{rank}"))
                        if said != self._heard[rank][0]:
                            self._heard[rank] = (said, time.monotonic())
            except (
                Exception
            ):  # it lived with the main process, or its launcher; their silence is what counts now
                self._store = None

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval):
            if problem := self._problem():
                self._verdict = problem
                self._stopped.wait(2 * self._interval)  # for the others to hear it in these words
                self._end(problem)
                return

    def _own(self) -> dict[str, Any]:
        """Where this process is, and for how many seconds it has stood still there."""
        moves, waiting = self._moves, self._waiting
        still = time.monotonic() - self._ticked if moves else waiting() if waiting else 0.0
        return {
            "at": self.at,
            "ticks": self._ticks,
            "still": still,
            "saves": not moves and waiting is not None,
        }

    def _problem(self) -> str | None:
        now, bound = time.monotonic(), self._bound
        for rank, (said, since) in self._heard.items():
            if verdict := said.get("verdict"):
                return str(verdict)
            if bound is not None and now - since > bound:
                where = self.at if self._moves else said.get("at", self.at)
                return f"process {rank} has not answered for {bound:.3g} s, last at {where}"
        if self.rank > 0:
            return None
        heartbeats = {
            0: self._own(),
            **{rank: said for rank, (said, _) in self._heard.items() if said},
        }
        if all(heartbeat["saves"] for heartbeat in heartbeats.values()) and self._hurries():
            bound = SOON_SECONDS if bound is None else min(bound, SOON_SECONDS)
        if (
            bound is None
            or len(heartbeats) < self.number
            or any(heartbeat["still"] <= bound for heartbeat in heartbeats.values())
        ):
            return None
        # All wait, for the one that has come least far.
        least = min(heartbeats.values(), key=lambda heartbeat: heartbeat["ticks"])
        behind = [
            rank for rank, heartbeat in heartbeats.items() if heartbeat["ticks"] == least["ticks"]
        ]
        who = (
            "every process"
            if len(behind) == self.number
            else f"process {', '.join(map(str, behind))}"
        )
        return f"{who} has made no progress for {bound:.3g} s at {least['at']}"

    def _note(self) -> None:
        if self._file:
            try:
                fresh = self._file.with_suffix(".new")
                fresh.write_text(self.at)
                fresh.rename(self._file)  # never half of it
            except OSError:
                self._file = None  # the launcher has gone
