"""All processes of a run: what they add up, agree on, and do for one another. Every verb is collective."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from finetune import failures
from finetune.errors import FinetuneError, ProcessFailed, UserError

# The main process hashes, exports and reloads while the others wait; NCCL's 10 minutes would end that.
WAIT = timedelta(hours=2)


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
        """Do it on the main process only; every process gets its result, or raises its error.

        The main process raises the very exception, with its traceback and cause; the others raise one of the same type
        with the same words, or what `failures` makes of a library's, or ProcessFailed: others might not survive pickling.
        """
        if self.number == 1:
            return action()
        if not self.is_main:
            result, error = self._from_main(None)
            if error is not None:
                raise error
            return result
        try:
            result = action()
        except Exception as exc:
            self._from_main((None, self._portable(exc)))
            raise
        self._from_main((result, None))
        return result

    def on_every(self, action: Callable[[], Any]) -> Any:
        """Do it on every process. If it fails anywhere all raise the same error: the first UserError, or else the first.

        As with `on_main`, the process where that happened raises the very exception; one that failed otherwise has its own
        as the cause.
        """
        if self.number == 1:
            return action()
        try:
            result = action()
        except Exception as exc:
            self._raise_first(exc)
            raise
        self._raise_first(None)
        return result

    def _from_main(self, value: Any) -> Any:
        """The value of the main process."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def _raise_first(self, own: Exception | None) -> None:
        """Raise the error on which all agree; return if there is none, or if it is this process's own."""
        errors = self.gather(None if own is None else self._portable(own))
        failed = [rank for rank, error in enumerate(errors) if error is not None]
        if failed:
            first = next((rank for rank in failed if isinstance(errors[rank], UserError)), failed[0])
            if first != self.rank:
                raise errors[first] from own

    def _portable(self, exc: Exception) -> FinetuneError:
        """What other processes raise for an exception of this one."""
        known = failures.translate(exc, f"process {self.rank}")
        return known or ProcessFailed(f"process {self.rank}: {type(exc).__name__}: {exc}")
