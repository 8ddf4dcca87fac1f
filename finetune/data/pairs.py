"""Rated answers, compared with each other or judged alone: what has to hold of their tokens."""

import numpy as np

from finetune.data.examples import Examples
from finetune.data.problems import Problems
from finetune.errors import DataError

LABEL = "label"
"""The column that is 1 for chosen, or good, answers and 0 for the others."""


def require(examples: Examples, are_compared: bool) -> None:
    """Raise DataError, with file and line, for answers whose tokens cannot be learned from.

    Compared answers have to follow the same tokens of a prompt, and to differ.
    """
    problems = Problems()
    if examples.weights is not None:
        problems.note(
            f"{examples.sources[0]}: messages have a weight, which an objective of rated answers "
            "would ignore; remove it"
        )
    if LABEL not in examples.columns:
        problems.note(
            f"{examples.sources[0]}: data.format gives no field label, which is 1 for the chosen "
            "answer and 0 for the others"
        )
    problems.raise_if_any()
    for example in range(len(examples)):
        problems.num_rows += 1
        if what := _wrong(examples, example, are_compared):
            problems.note(f"{examples.place(example)}: {what}")
    problems.raise_if_any()


def require_both(examples: Examples, kind: str) -> None:
    """Raise DataError unless some answers, or steps, are good and some are bad.

    From one kind alone an objective, here named `kind`, learns to find everything good, or bad.
    """
    good, total = int(examples.columns[LABEL].sum()), len(examples.columns[LABEL])
    if 0 < good < total:
        return
    missing, remedy = "bad" if good else "good", "add some"
    if good and kind == "kto":
        remedy += ", or train on the good ones with objective.kind: sft"
    raise DataError(
        f"{examples.sources[0]}: none of {total:,} labels is {missing}, and objective.kind: {kind} "
        f"learns to tell good from bad; {remedy}"
    )


def _wrong(examples: Examples, example: int, are_compared: bool) -> str:
    """Return what is wrong with an example, or nothing."""
    parts = [examples.input.span(number) for number in examples.documents(example)]
    supervised = [examples.supervised[part] for part in parts]
    labels = examples.columns[LABEL][examples.documents(example)]
    if not np.isin(labels, (0, 1)).all():
        return f"has the labels {labels.tolist()}; give 1 for a good answer and 0 for another"
    if are_compared and labels.sum() != 1:
        return f"has {int(labels.sum())} chosen answers; give one"
    if not all(each[1:].any() for each in supervised):
        return "an answer has no tokens; fill it or remove the row"
    ids = [examples.input.ids[part] for part in parts]
    return _difference(ids, supervised, int(labels.argmax())) if are_compared else ""


def _difference(ids: list[np.ndarray], supervised: list[np.ndarray], chosen: int) -> str:
    """Return what is wrong with answers to one prompt, or nothing."""
    begins = [int(each.argmax()) for each in supervised]
    prompts = [each[:begin] for each, begin in zip(ids, begins)]
    if not all(np.array_equal(prompts[0], prompt) for prompt in prompts[1:]):
        return (
            "the template writes the prompt in another way before the rejected answer than before "
            "the chosen one, so their log-probabilities cannot be compared; use another template"
        )
    others = (answer for number, answer in enumerate(ids) if number != chosen)
    if any(np.array_equal(answer, ids[chosen]) for answer in others):
        return "the chosen and a rejected answer are the same tokens; remove the row"
    return ""
