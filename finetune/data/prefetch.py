"""The batches of the next step, made on a thread while the current one is learned."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from finetune.data.batches import Batch, Batches, Counts


class Prefetch:
    """Collates one step ahead: reading rows from a network disk then costs a step no time.

    With `pin`, batches lie in page-locked memory, from where a GPU copies them while it computes;
    copies from other memory make the host wait.
    """

    def __init__(
        self, batches: Batches, num_steps: int, *,
        part: Callable[[Batch], Batch] = lambda batch: batch, pin: bool = False,
    ) -> None:  # fmt: skip
        """`part`: what this process has of a batch that several share."""
        self.batches, self.num_steps, self.part, self.pin = batches, num_steps, part, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._next: tuple[int, Future[tuple[Sequence[Batch], Counts]]] | None = None

    def at(self, step: int) -> tuple[Sequence[Batch], Counts]:
        """This process's micro-batches of a step, and what the step is divided by over all
        processes.

        Raises what making them raised.
        """
        number, made = self._next or (-1, None)
        made = (
            made if made is not None and number == step else self._thread.submit(self._make, step)
        )
        found = made.result()
        if step + 1 < self.num_steps:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return found

    def close(self) -> None:
        """End the thread; what it is making is lost."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, step: int) -> tuple[Sequence[Batch], Counts]:
        mine = map(self.part, self.batches.at(step))
        return [batch.pinned() if self.pin else batch for batch in mine], self.batches.totals(step)
