"""Answers to tasks of reasoning-gym, by the rule of each task."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from finetune import extras
from finetune.evaluation.scores.base import OfAnswer, Value
from finetune.generation.completions import Completion, Prompt, Score

TASK, ENTRY = "task", "entry"
"""Columns of a row: the name of its task, and what the task's rule reads."""
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_task(setting: str = "--scores reasoning-gym") -> OfAnswer:
    """Score what the task's own rule gives, from 0 to 1.

    The answer is what stands in the last <answer></answer>, or all of it.
    """
    extras.require("reasoning-gym", setting)
    tasks()  # the import takes seconds, which would count against the first answer

    def of(completion: Completion) -> Value:
        if problem := lacks_task(completion.prompt):
            return Score(None, problem)
        fields = completion.prompt.fields
        return float(rule(fields[TASK])(answer_in(completion.text), fields[ENTRY]))

    return OfAnswer("reasoning-gym", "what the rule of the row's task gives", of)


def answer_in(text: str) -> str:
    """Return the answer that a text marks, or all of it."""
    tagged = _TAGGED.findall(text)
    return (tagged[-1] if tagged else text).strip()


def lacks_task(prompt: Prompt) -> str:
    """Return what a row lacks of a task; "" if it has all."""
    task, entry = prompt.fields.get(TASK), prompt.fields.get(ENTRY)
    if not isinstance(task, str) or not isinstance(entry, dict):
        return f"the row has no task of reasoning-gym in its columns {TASK} and {ENTRY}"
    return "" if task in tasks() else f"reasoning-gym has no task {task}"


@cache
def tasks() -> frozenset[str]:
    """Return the names of all tasks."""
    from reasoning_gym.factory import DATASETS

    return frozenset(DATASETS)


@cache
def rule(task: str) -> Callable[[str, Any], float]:
    """Return the rule of a task: (answer, entry) -> from 0 to 1."""
    from reasoning_gym.factory import get_score_answer_fn

    found: Callable[[str, Any], float] = get_score_answer_fn(task)
    return found
