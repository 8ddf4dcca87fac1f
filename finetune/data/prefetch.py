"""The batches of the next step, made on a thread while the current one is learned."""

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, ClassVar

import torch

from finetune.data.batches import Batch, Batches, Counts

BEAT_SECONDS = 1.0  # between two checks of what a step waits for


class Prefetch:
    """Collates one step ahead: reading rows from a network disk then costs a step no time.

    For a GPU, batches lie in page-locked memory, from where it copies them while it computes;
    copies from other memory make the host wait.
    """

    facts: ClassVar[Mapping[str, float]] = {}
    """What the logs say of where a step comes from."""

    def __init__(
        self, batches: Batches, num_steps: int, *,
        part: Callable[[Batch], Batch] = lambda batch: batch,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # a constant
        heartbeat: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """`part`: what this process has of a batch that several share. `device`: where it goes.

        `heartbeat`: called while a step waits for shards, as long as some are made.
        """
        self.batches, self.num_steps, self.part = batches, num_steps, part
        self.heartbeat = heartbeat
        self.pin = device.type == "cuda"
        # A new thread starts on the first GPU, not on the process's own.
        use_own_gpu = functools.partial(torch.cuda.set_device, device) if self.pin else None
        self._thread = ThreadPoolExecutor(1, "prefetch", initializer=use_own_gpu)
        self._next: tuple[int, Future[tuple[Sequence[Batch], Counts]]] | None = None

    def ready(self, step: int) -> bool:
        """Return whether a step can be made: always, unlike where it has to be sampled before."""
        return True

    def at(self, step: int) -> tuple[Sequence[Batch], Counts]:
        """Return this process's micro-batches of a step, and the totals over all processes.

        Raises what making them raised.
        """
        number, made = self._next or (-1, None)
        if made is None or number != step:
            made = self._thread.submit(self._make, step)
        self._wait(made)
        found = made.result()
        if step + 1 < self.num_steps:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return found

    def places(self, step: int) -> list[str]:
        """Return file:line of every row of a step."""
        return self.batches.places(step)

    def _wait(self, made: Future[Any]) -> None:
        """Wait for a step, which may wait for shards that are still made."""
        progress = self.batches.progress()
        while not wait([made], BEAT_SECONDS).done:
            before, progress = progress, self.batches.progress()
            if progress != before:
                self.heartbeat()

    def close(self) -> None:
        """End the thread; what it is making is lost."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> tuple[Sequence[Batch], Counts]:
        mine = map(self.part, self.batches.at(step))
        return [batch.pinned() if self.pin else batch for batch in mine], self.batches.totals(step)
