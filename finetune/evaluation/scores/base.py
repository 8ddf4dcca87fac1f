"""What most scores are made of: a function of one answer, and what becomes of gaps.

A score that cannot be computed for an answer is `Score(None, reason)`: counted and shown, never 0.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from finetune.generation.completions import Completion, Score, no_answer
from finetune.time_limit import TimeLimit

NO_REFERENCE = Score(None, "the row has no reference")
Value = float | Score
SECONDS = 30.0  # a score by a rule takes milliseconds


@dataclass(frozen=True)
class OfAnswer:
    """A score that a function computes of one answer at a time.

    function: gets the completion. The rest as in `Scorer`. needs_reference: rows without one get a
    gap, and the function is not called. seconds: for an answer, as a pattern may backtrack without
    end; None: the function has a limit of its own.
    """

    name: str
    line: str
    function: Callable[[Completion], Value]
    higher: bool | None = True
    is_share: bool = True
    needs_reference: bool = False
    seconds: float | None = SECONDS

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        return [self._of(each) for each in completions]

    def _of(self, completion: Completion) -> Score:
        if (gap := gap_of(completion, self.needs_reference)) is not None:
            return gap
        with time_limit(self.seconds, completion, self.name):
            value = self.function(completion)
        return value if isinstance(value, Score) else Score(float(value))


def without_limit(make: Callable[..., OfAnswer], *arguments: Any) -> OfAnswer:
    """Make a score for a process that its caller ends after seconds of its own."""
    return replace(make(*arguments), seconds=None)


def of_reference(
    name: str, line: str, function: Callable[[str, str], Value], higher: bool | None = True,
    is_share: bool = True,
) -> OfAnswer:  # fmt: skip
    """Return a score of (answer, reference)."""

    def of(completion: Completion) -> Value:
        return function(completion.text, completion.prompt.reference or "")

    return OfAnswer(name, line, of, higher, is_share, needs_reference=True)


def time_limit(
    seconds: float | None, completion: Completion, name: str
) -> AbstractContextManager[object]:
    """Limit the seconds of a score of one answer. Raises DataError that names its row."""
    if seconds is None:
        return nullcontext()
    what = f"{completion.prompt.place}: --scores: {name}"
    return TimeLimit(seconds, what, "correct the score, or leave it or the row out")


def gap_of(completion: Completion, needs_reference: bool) -> Score | None:
    """Return the gap of an answer that did not come, or of a row without a needed reference."""
    if completion.finish_reason == "failed":
        return no_answer(completion)
    if needs_reference and completion.prompt.reference is None:
        return NO_REFERENCE
    return None


@runtime_checkable
class Detailed(Protocol):
    """A scorer that has more to show than one number."""

    def details(self, completions: Sequence[Completion]) -> list[str]:
        """Return lines for below the table, such as a confusion matrix."""
        ...
