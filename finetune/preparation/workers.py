"""Map a function over rows in several processes; results keep the order of the rows."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from finetune.data.places import Row
from finetune.workers import chunks as chunks
from finetune.workers import cores as cores
from finetune.workers import mapped as mapped


def mapped_rows(
    rows: Iterable[Row],
    part_of: Callable[[Row], Any],
    make: Callable[..., Callable[[list[Any]], Any]],
    workers: int,
    *arguments: Any,
) -> Iterator[tuple[list[Row], Any]]:
    """Yield (rows, `make(*arguments)` of what `part_of` takes of each), a chunk at a time."""
    waiting: deque[list[Row]] = deque()

    def parts() -> Iterator[list[Any]]:
        for chunk in chunks(rows):
            waiting.append(chunk)
            yield list(map(part_of, chunk))

    for result in mapped(make, parts(), workers, *arguments):
        yield waiting.popleft(), result
