"""A score of a user's own: FILE.py:NAME, a function of a completion, or a scorer."""

import inspect
import math
import threading
from collections.abc import Sequence
from typing import Any

from finetune import failures
from finetune.config import own
from finetune.data.places import short
from finetune.errors import ConfigError, DataError
from finetune.evaluation.scores.base import gap_of
from finetune.generation.completions import Completion, Score, Scorer
from finetune.own_code import OwnCode
from finetune.time_limit import TimeLimit

SECONDS = 60.0  # for an answer: a score may ask a model
FORMS = "a number, True or False, None for a gap, or (number, reason)"
_OF_SCORERS = ("name", "line", "higher", "is_share")


def own_score(name: str) -> "OwnScore":
    """Load a score by its name from `own_code.find`. Raises ConfigError."""
    return OwnScore(own.own_score(name))


class OwnScore:
    """A user's function of one completion, or an object with the attributes of a Scorer.

    The function may have the attributes `higher` (whether more is better; None: neither) and
    `is_share` (whether values are from 0 to 1, shown in percent); both are True without. `seconds`
    is how long it may take for an answer; a scorer gets as much for each answer of a call.
    """

    def __init__(self, code: OwnCode) -> None:
        value, self._code = code.value, code
        self._scorer: Scorer | None = None
        if all(hasattr(value, each) for each in _OF_SCORERS) and not isinstance(value, type):
            self._scorer = value
        self.name = str(getattr(value, "name", "") or code.name.rpartition(":")[2]).replace(
            "_", " "
        )
        documented = inspect.getdoc(value) if self._scorer is None else None
        self.line = str(getattr(value, "line", "") or (documented or "no docstring").split("\n")[0])
        self.higher: bool | None = getattr(value, "higher", True)
        self.is_share = bool(getattr(value, "is_share", True))
        self._seconds = getattr(value, "seconds", SECONDS)
        if type(self._seconds) not in (int, float) or not 0 < self._seconds < threading.TIMEOUT_MAX:
            raise ConfigError(f"{code}: seconds should be above 0, got {self._seconds!r:.80}")

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        if self._scorer is None:
            return [self._of(each) for each in completions]
        found = self._run(self._scorer, completions, completions[:1], len(completions))
        if not isinstance(found, list) or len(found) != len(completions):
            raise ConfigError(
                f"{self._code} should return a list with a score for each of "
                f"{len(completions):,} answers, got {short(str(found))}"
            )
        return [self._checked(value, each) for value, each in zip(found, completions)]

    def _of(self, completion: Completion) -> Score:
        if (gap := gap_of(completion, needs_reference=False)) is not None:
            return gap
        return self._checked(self._run(self._code.value, completion, [completion]), completion)

    def _run(
        self, function: Any, argument: Any, first: Sequence[Completion], count: int = 1
    ) -> Any:
        where = f"{first[0].prompt.place}: " if first else ""
        hint = "make it faster, or give it more in its attribute seconds"
        with TimeLimit(self._seconds * max(1, count), f"{where}--scores: {self._code}", hint):
            try:
                return function(argument)
            except (Exception, SystemExit) as exc:
                if isinstance(exc, Exception):
                    failures.reraise(exc)
                raise DataError(f"{where}--scores: {self._code.blame(exc)}") from exc

    def _checked(self, value: Any, completion: Completion) -> Score:
        if isinstance(value, Score):
            value, reason = value.value, value.reason
        elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
            value, reason = value
        else:
            reason = ""
        value = value.item() if hasattr(value, "item") else value  # of NumPy or PyTorch
        if value is None:
            return Score(None, reason or f"{self.name} gives no score")
        where = f"{completion.prompt.place}: --scores: {self._code}"
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise DataError(f"{where} should return {FORMS}, got {value!r:.80}")
        if self.is_share and not 0 <= value <= 1:
            raise DataError(
                f"{where} returned {value:g}, and scores are from 0 to 1; set its attribute "
                "is_share to False for other numbers"
            )
        return Score(float(value), reason)
