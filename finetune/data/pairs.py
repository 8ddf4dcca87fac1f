"""Answers to one prompt that an objective compares: what has to hold of their tokens."""

from collections.abc import Iterator

import numpy as np

from finetune.data.examples import Examples
from finetune.data.problems import Problems

LABEL = "label"
"""The column that is 1 for the chosen answer of an example and 0 for the others."""


def require(examples: Examples) -> None:
    """Raise DataError, with file and line, for answers that cannot be compared as tokens.

    The prompt has to be the same tokens before each answer, and the answers have to differ.
    """
    problems = Problems()
    if examples.weights is not None:
        problems.note(
            f"{examples.sources[0]}: messages have a weight, which a comparison of answers would "
            "ignore; remove it"
        )
    if LABEL not in examples.columns:
        problems.note(
            f"{examples.sources[0]}: data.format gives no field label, which is 1 for the chosen "
            "answer and 0 for the others"
        )
    problems.raise_if_any()
    for example in range(len(examples)):
        problems.num_rows += 1
        for what in _wrong(examples, example):
            problems.note(f"{examples.place(example)}: {what}")
    problems.raise_if_any()


def _wrong(examples: Examples, example: int) -> Iterator[str]:
    """Yield what is wrong with an example."""
    parts = [examples.input.span(number) for number in examples.documents(example)]
    ids = [examples.input.ids[part] for part in parts]
    supervised = [examples.supervised[part] for part in parts]
    labels = examples.columns[LABEL][examples.documents(example)]
    if labels.sum() != 1:
        yield f"has {int(labels.sum())} chosen answers; give one"
        return
    begins = [int(each.argmax()) if each.any() else len(each) for each in supervised]
    if not all(each[1:].any() for each in supervised):
        yield "an answer has no tokens; fill it or remove the row"
        return
    prompts = [each[:begin] for each, begin in zip(ids, begins)]
    if not all(np.array_equal(prompts[0], prompt) for prompt in prompts[1:]):
        yield (
            "the template writes the prompt in another way before the rejected answer than before "
            "the chosen one, so their log-probabilities cannot be compared; use another template"
        )
        return
    chosen = int(labels.argmax())
    for number, answer in enumerate(ids):
        if number != chosen and np.array_equal(answer, ids[chosen]):
            yield "the chosen and a rejected answer are the same tokens; remove the row"
