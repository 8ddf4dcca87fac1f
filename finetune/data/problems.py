"""Wrong rows, collected: one start reports every kind of mistake."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from finetune.data.places import Row, short
from finetune.errors import DataError

MOST_PROBLEMS = 10  # listed one by one; more are summed up by kind


@dataclass(frozen=True)
class Skipping:
    """Whether wrong rows are skipped: data.on_bad_row and data.max_bad_fraction."""

    skips: bool = False
    max_fraction: float = 0.0


ENDS = Skipping()
"""Wrong rows end a run."""


class _Noted:
    """A block whose DataError is noted. `contextmanager` would take 8 us a row."""

    __slots__ = ("_ends", "_problems", "_row")

    def __init__(self, problems: "Problems", row: Row | None, ends: bool) -> None:
        self._problems, self._row, self._ends = problems, row, ends

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, exc: BaseException | None, traceback: object) -> bool:
        if not isinstance(exc, DataError):
            return False
        self._problems.note(str(exc), row=self._row, ends=self._ends)
        return True


class Problems:
    """Wrong rows, collected over all rows, so that one start reports every kind of mistake."""

    def __init__(self, skipping: Skipping = Skipping()) -> None:
        self.skipping = skipping
        self.num_rows = 0
        """Rows read, right or wrong."""
        self.num_empty = 0
        """Empty rows of tables, which are skipped."""
        self.num_skipped = 0
        """Rows that the user's own data.format skips."""
        self.repairs = Counter[str]()
        """What data.repair_turns changed -> in how many rows."""
        self.rejects: list[dict[str, Any]] = []
        """Rows that are skipped, each with its problem."""
        self._cannot_skip = False
        self._first: list[str] = []
        self._kinds: dict[str, list[str]] = {}  # kind -> its first messages
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    @property
    def must_end(self) -> bool:
        """Whether a problem was noted that is not skipped."""
        return self._cannot_skip or bool(self and not self.skipping.skips)

    def noted(self, row: Row | None = None, ends: bool = False) -> "_Noted":
        """Note a DataError of the block, and go on. `row`, `ends`: as in `note`."""
        return _Noted(self, row, ends)

    def note(
        self, message: str, kind: str | None = None, row: Row | None = None, ends: bool = False
    ) -> None:
        """Note a problem; `message` begins with the place.

        Its kind is by default the message without place, numbers and values. `row`: the wrong one,
        if it could be read. `ends`: the problem is not that of one row, so it cannot be skipped.
        """
        if kind is None:
            what = re.split(r", got |; this row has |: it renders ", message.partition(": ")[2])[0]
            kind = re.sub(r"\d+", "#", what)
        self._cannot_skip = self._cannot_skip or ends
        if self.skipping.skips and not ends:
            self.rejects.append({"problem": message, "row": row.values if row else None})
        if row is not None:
            message += f"; the row: {short(row.values)}"
        self._counts[kind] += 1
        for kept in (self._first, self._kinds.setdefault(kind, [])):
            if len(kept) < MOST_PROBLEMS:
                kept.append(message)

    def add(self, other: "Problems") -> None:
        """Take over what was noted of a later part of the rows, without the rejected rows."""
        self.num_rows += other.num_rows
        self._cannot_skip = self._cannot_skip or other._cannot_skip
        self._counts.update(other._counts)
        groups = [(self._first, other._first)]
        groups += [(self._kinds.setdefault(kind, []), m) for kind, m in other._kinds.items()]
        for kept, messages in groups:
            kept.extend(messages[: MOST_PROBLEMS - len(kept)])

    def count(self, kind: str) -> int:
        return self._counts[kind]

    def kinds(self) -> dict[str, int]:
        """Return the kinds of problems, the most frequent first, and how many rows have each."""
        return dict(self._counts.most_common())

    def raise_if_any(self, sums: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise DataError if anything was noted: each problem, or if there are many, each kind.

        `sums`: messages that sum up a kind. Does not raise where wrong rows are skipped and are
        at most the given fraction of all.
        """
        most = self.skipping.max_fraction
        are_few = len(self) <= most * self.num_rows
        if not self or (not self.must_end and are_few):
            return
        hint = ""
        if are_few and not self._cannot_skip:
            hint = "\n  correct them, or leave them out with data.on_bad_row: skip"
        if not self.must_end:
            hint = (
                f"\n  data.max_bad_fraction: {most:g} lets at most {int(most * self.num_rows):,} "
                "be skipped; correct the rows, or raise it"
            )
        if len(self) == 1:
            raise DataError(self._first[0] + hint.replace("them", "it"))
        lines = self._first
        if len(self) > MOST_PROBLEMS:
            kinds = self._counts.most_common()
            shown = kinds[:MOST_PROBLEMS]
            lines = [sums.get(kind) or self._sum(kind, count) for kind, count in shown]
            if len(kinds) > MOST_PROBLEMS:
                lines.append(f"and {len(kinds) - MOST_PROBLEMS:,} more kinds of problems")
        listed = "".join(f"\n  {line}" for line in lines)
        raise DataError(
            f"{len(self):,} of {max(len(self), self.num_rows):,} rows are wrong:{listed}{hint}"
        )

    def _sum(self, kind: str, count: int) -> str:
        first, *others = self._kinds[kind]
        if count == 1:
            return first
        file = first.partition(": ")[0].rpartition(":")[0]
        places = [other.partition(": ")[0].removeprefix(f"{file}:") for other in others]
        listed = [*places, "..."] if count > len(places) + 1 else places
        return f"{first} ({count - 1:,} more like it: {', '.join(listed)})"
