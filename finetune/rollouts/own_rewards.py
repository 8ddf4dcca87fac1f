"""A reward of a user's own: FILE.py:NAME, a function of one answer, or of all answers of a call."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

from finetune import own_code
from finetune.data.places import short
from finetune.errors import ConfigError
from finetune.evaluation.scores.base import gap_of
from finetune.generation.completions import Completion, Score
from finetune.own_code import OwnCode

OF_ONE = ("text", "reference", "row", "completion")
OF_ALL = "completions"
FORMS = "a number, True or False, None where it has none, or (number, reason)"


class OwnReward:
    """Calls the function with those of OF_ONE that it has as parameters, or with OF_ALL.

    An exception, or anything but a finite number, is a gap with the reason.
    """

    def __init__(self, code: OwnCode) -> None:
        self._code = code
        self.takes = _parameters(code)
        self.is_of_all = self.takes == (OF_ALL,)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        if not self.is_of_all:
            return [self._of(each) for each in completions]
        gaps = [gap_of(each, needs_reference=False) for each in completions]
        asked = [each for each, gap in zip(completions, gaps) if gap is None]
        found = iter(self._of_all(asked))
        return [next(found) if gap is None else gap for gap in gaps]

    def _of(self, completion: Completion) -> Score:
        if (gap := gap_of(completion, needs_reference=False)) is not None:
            return gap
        values = {
            "text": completion.text, "reference": completion.prompt.reference,
            "row": dict(completion.prompt.fields), "completion": completion,
        }  # fmt: skip
        try:
            value = self._code.value(**{name: values[name] for name in self.takes})
        except (Exception, SystemExit) as exc:
            return Score(None, self._code.blame(exc))
        return self._score(value)

    def _of_all(self, completions: Sequence[Completion]) -> list[Score]:
        if not completions:
            return []
        try:
            values = self._code.value(completions=list(completions))
        except (Exception, SystemExit) as exc:
            return [Score(None, self._code.blame(exc))] * len(completions)
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            what = f"should return a list with a value for each of {len(completions):,} answers"
            gap = Score(None, f"{self._code} {what}, got {short(str(values))}")
            return [gap] * len(completions)
        return [self._score(value) for value in values]

    def _score(self, value: Any) -> Score:
        reason = ""
        if isinstance(value, Score):
            value, reason = value.value, value.reason
        elif isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], str):
            value, reason = value
        value = value.item() if hasattr(value, "item") else value  # of NumPy or PyTorch
        if value is None:
            return Score(None, reason or f"{self._code} gives none")
        if not isinstance(value, bool | int | float):
            return Score(None, f"{self._code} should return {FORMS}, got {short(repr(value))}")
        if not math.isfinite(value):
            return Score(None, f"{self._code} returns {value}")
        return Score(float(value), reason)


def _parameters(code: OwnCode) -> tuple[str, ...]:
    """Return which parameters to pass, by name. Raises ConfigError for others that it needs."""
    parameters = inspect.signature(code.value).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = [each.name for each in parameters if each.default is each.empty and each.kind in kinds]
    given = tuple(each.name for each in parameters if each.name in OF_ONE and each.kind in kinds)
    if needed == [OF_ALL]:
        return (OF_ALL,)
    if wrong := [name for name in needed if name not in OF_ONE]:
        raise ConfigError(
            f"{code} has the parameter {wrong[0]}; a reward takes {', '.join(OF_ONE)}, any of "
            f"them by name, or {OF_ALL} alone"
        )
    if not given:
        raise ConfigError(
            f"{code} has no parameter; a reward takes any of {', '.join(OF_ONE)} by name, or "
            f"{OF_ALL} alone"
        )
    return given


def made(name: str, sha256: str) -> OwnReward:
    """Return the reward in a process that another process started."""
    own_code.read_as(name, sha256)
    return OwnReward(own_code.get(name))
