"""What the processes of a run add up and agree on. Every verb is collective."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch

from finetune import failures
from finetune.errors import FinetuneError, Preempted, ProcessFailed, TopologyError, UserError

# The main process hashes, exports and reloads while the others wait: NCCL's 10 minutes are few.
WAIT = timedelta(hours=2)


class Processes:
    """`group`: a process group of its own, for a thread of its own; None for the default one."""

    def __init__(self, rank: int, number: int, device: torch.device, group: Any = None) -> None:
        self.rank, self.number, self.device, self.group = rank, number, device, group
        self.is_main = rank == 0
        self._waits_since: float | None = None

    def apart(self) -> "Processes":
        """Return the same processes over a group in host memory, for a second thread."""
        group = None
        if self.number > 1:
            group = torch.distributed.new_group(backend="gloo", timeout=WAIT)
        return Processes(self.rank, self.number, torch.device("cpu"), group)

    def leave(self) -> None:
        """Leave the group of `apart`: a process that waits in it fails at once, not in two hours.

        Gloo closes the connections of a group when its last reference goes; one may sit in a cycle
        that an exception left.
        """
        group, self.group = self.group, None
        if group is not None:
            torch.distributed.destroy_process_group(group)
            del group
            gc.collect()

    def waiting(self) -> float:
        """Return for how many seconds this process has waited for the others; 0.0 if it works."""
        since = self._waits_since
        return 0.0 if since is None else time.monotonic() - since

    @contextmanager
    def _waits(self) -> Iterator[None]:
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def sum(self, values: Sequence[float | torch.Tensor]) -> list[float]:
        """Add up each value over all processes, in float64. Wait for the device once."""
        on_host = [0.0 if isinstance(value, torch.Tensor) else float(value) for value in values]
        total = torch.tensor(on_host, dtype=torch.float64).to(self.device, non_blocking=True)
        # Scalars of the device join those of the host in one tensor, which is read at once. One by
        # one: PyTorch would send a list of their places first, and wait for that.
        for number, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                total[number] = value
        if self.number > 1:
            with self._waits():
                torch.distributed.all_reduce(total, group=self.group)
        return [float(value) for value in total.tolist()]

    def sum_on_device(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Add up each scalar over all processes, in float64, and leave it on the device.

        Every process gives the same names.
        """
        if not values:
            return {}
        values = dict(sorted(values.items()))  # each process may name them in another order
        total = torch.stack([value.double() for value in values.values()])
        if self.number > 1:
            with self._waits():
                torch.distributed.all_reduce(total, group=self.group)
        return dict(zip(values, total.unbind()))

    def add_arrays(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Add up arrays of numbers of one shape over all processes, element by element."""
        if self.number == 1:
            return list(arrays)
        total = torch.from_numpy(np.stack(arrays)).to(self.device)
        with self._waits():
            torch.distributed.all_reduce(total, group=self.group)
        return list(total.cpu().numpy())

    def any(self, request: bool) -> bool:
        """Tell whether any process asks for it."""
        return self.sum([float(request)])[0] > 0 if self.number > 1 else request

    def gather(self, value: Any) -> list[Any]:
        """Collect what each process has, by rank."""
        everyone: list[Any] = [value]
        if self.number > 1:
            everyone = [None] * self.number
            with self._waits():
                torch.distributed.all_gather_object(everyone, value, group=self.group)
        return everyone

    def union(self, names: set[str]) -> set[str]:
        """Collect what any process has."""
        return set().union(*self.gather(names))

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Do it on the main process only; every process gets its result, or raises its error.

        The main process raises the very exception, with its traceback and cause; the others raise
        one of the same type with the same words, or what `failures` makes of a library's, or
        ProcessFailed: others might not survive pickling. So do SystemExit and KeyboardInterrupt.
        Only Preempted passes at once: the signal reaches every process by itself, and waiting for
        the others would use up the time that is left.
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
        except Preempted:
            raise
        except BaseException as exc:
            self._from_main((None, self.portable(exc)))
            raise
        self._from_main((result, None))
        return result

    def on_every(self, action: Callable[[], Any]) -> Any:
        """Do it on every process. If it fails anywhere all raise the same error: see `first_error`.

        As with `on_main`, the process where that happened raises the very exception; one that
        failed otherwise has its own as the cause.
        """
        if self.number == 1:
            return action()
        try:
            result = action()
        except Preempted:
            raise
        except BaseException as exc:
            self._raise_first(exc)
            raise
        self._raise_first(None)
        return result

    def _from_main(self, value: Any) -> Any:
        """Give every process the value of the main process."""
        values = [value]
        with self._waits():
            torch.distributed.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def _raise_first(self, own: BaseException | None) -> None:
        """Raise the error on which all agree; return without one, or for this process's own."""
        errors = self.gather(None if own is None else self.portable(own))
        first = first_error(errors)
        if first is not None and first != self.rank:
            raise errors[first] from own

    def portable(self, exc: BaseException) -> FinetuneError:
        """Return what other processes raise for an exception of this one."""
        known = failures.translate(exc, f"process {self.rank}")
        return known or ProcessFailed(f"process {self.rank}: {type(exc).__name__}: {exc}")


def first_error(errors: Sequence[FinetuneError | None]) -> int | None:
    """Return the rank whose error counts: the first mistake of the user, or else the first error.

    A lost connection counts last, as it follows from what happened to the process at its other end.
    """
    failed = [rank for rank, error in enumerate(errors) if error is not None]
    mistakes = [rank for rank in failed if isinstance(errors[rank], UserError)]
    causes = [rank for rank in failed if not isinstance(errors[rank], TopologyError)]
    return next(iter([*mistakes, *causes, *failed]), None)
