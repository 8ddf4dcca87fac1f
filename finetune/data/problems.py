"""Wrong rows, collected: one start reports every kind of mistake."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from finetune.errors import DataError

MOST_PROBLEMS = 10  # listed one by one; more are summed up by kind


class Problems:
    """Wrong rows, collected over all rows, so that one start reports every kind of mistake."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Rows read, right or wrong."""
        self.num_empty = 0
        """Empty rows of tables, which are skipped."""
        self.num_skipped = 0
        """Rows that the user's own data.format skips."""
        self._first: list[str] = []
        self._kinds: dict[str, list[str]] = {}  # kind -> its first messages
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a DataError of the block, and go on."""
        try:
            yield
        except DataError as exc:
            self.note(str(exc))

    def note(self, message: str, kind: str | None = None) -> None:
        """Note a problem; `message` begins with the place.

        Its kind is by default the message without place, numbers and values.
        """
        if kind is None:
            what = re.split(r", got |; this row has |: it renders ", message.partition(": ")[2])[0]
            kind = re.sub(r"\d+", "#", what)
        self._counts[kind] += 1
        for kept in (self._first, self._kinds.setdefault(kind, [])):
            if len(kept) < MOST_PROBLEMS:
                kept.append(message)

    def count(self, kind: str) -> int:
        return self._counts[kind]

    def raise_if_any(self, sums: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise DataError if anything was noted: each problem, or if there are many, each kind.

        `sums`: messages that sum up a kind.
        """
        if not self:
            return
        if len(self) == 1:
            raise DataError(self._first[0])
        lines = self._first
        if len(self) > MOST_PROBLEMS:
            kinds = self._counts.most_common()
            shown = kinds[:MOST_PROBLEMS]
            lines = [sums.get(kind) or self._sum(kind, count) for kind, count in shown]
            if len(kinds) > MOST_PROBLEMS:
                lines.append(f"and {len(kinds) - MOST_PROBLEMS:,} more kinds of problems")
        listed = "".join(f"\n  {line}" for line in lines)
        raise DataError(
            f"{len(self):,} of {max(len(self), self.num_rows):,} rows are wrong:{listed}"
        )

    def _sum(self, kind: str, count: int) -> str:
        first, *others = self._kinds[kind]
        if count == 1:
            return first
        file = first.partition(": ")[0].rpartition(":")[0]
        places = [other.partition(": ")[0].removeprefix(f"{file}:") for other in others]
        listed = [*places, "..."] if count > len(places) + 1 else places
        return f"{first} ({count - 1:,} more like it: {', '.join(listed)})"
