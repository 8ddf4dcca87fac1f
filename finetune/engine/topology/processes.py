"""All processes of a run: what they add up, agree on, and do for one another. Every verb is collective."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from finetune.errors import CheckpointError, ExportError, Outage, UserError

# The main process hashes, exports and reloads while the others wait; NCCL's 10 minutes would end that.
WAIT = timedelta(hours=2)
# Errors that are words alone; others may not survive the journey to another process, which gets their name and words.
TRAVEL = UserError | CheckpointError | ExportError | Outage


class Processes:
    """`group`: a process group of its own, for a thread of its own; None for the default one."""

    def __init__(self, rank: int, number: int, device: torch.device, group: Any = None) -> None:
        self.rank, self.number, self.device, self.group = rank, number, device, group
        self.is_main = rank == 0

    def apart(self) -> "Processes":
        """The same processes over a group in host memory, so that a second thread never gets into this one's way."""
        group = torch.distributed.new_group(backend="gloo", timeout=WAIT) if self.number > 1 else None
        return Processes(self.rank, self.number, torch.device("cpu"), group)

    def sum(self, values: Sequence[float | torch.Tensor]) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.number > 1:
            torch.distributed.all_reduce(total, group=self.group)
        return [float(v) for v in total.tolist()]

    def any(self, wish: bool) -> bool:
        """Whether one of them wishes it."""
        return self.sum([float(wish)])[0] > 0 if self.number > 1 else wish

    def gather(self, value: Any) -> list[Any]:
        """What each has, by rank."""
        everyone: list[Any] = [value]
        if self.number > 1:
            everyone = [None] * self.number
            torch.distributed.all_gather_object(everyone, value, group=self.group)
        return everyone

    def union(self, names: set[str]) -> set[str]:
        """What any process has."""
        return set().union(*self.gather(names))

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Do it on the main process only; every process gets its result, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as exc:
                if self.number == 1:
                    raise
                outcome[1] = exc if isinstance(exc, TRAVEL) else RuntimeError(f"{type(exc).__name__}: {exc}")
        if self.number > 1:
            torch.distributed.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_every(self, action: Callable[[], Any]) -> Any:
        """Do it on every process; if it fails on one, all raise its error, or RuntimeError that says which and why."""
        result, problem = None, None
        try:
            result = action()
        except Exception as exc:
            if self.number == 1:
                raise
            problem = (
                exc if isinstance(exc, TRAVEL) else RuntimeError(f"process {self.rank}: {type(exc).__name__}: {exc}")
            )
        if found := [exc for exc in self.gather(problem) if exc is not None]:
            raise next((exc for exc in found if isinstance(exc, UserError)), found[0])
        return result
