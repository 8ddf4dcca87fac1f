"""Other ways to ask the base: with worked examples, or with retrieved context."""

import random
from collections.abc import Sequence
from dataclasses import replace

from finetune.data.conversations import Message
from finetune.data.places import list_columns, short
from finetune.errors import DataError
from finetune.generation.completions import Prompt


def with_examples(prompts: Sequence[Prompt], examples: Sequence[Prompt]) -> list[Prompt]:
    """Put the examples, each with its reference as the answer, before every prompt.

    System messages come first, those of examples are left out.
    """
    turns = [
        message
        for example in examples
        for message in (
            *(each for each in example.messages if each.role != "system"),
            Message("assistant", example.reference or ""),
        )
    ]
    found = []
    for prompt in prompts:
        system = [each for each in prompt.messages[:1] if each.role == "system"]
        messages = (*system, *turns, *prompt.messages[len(system) :])
        found.append(_asking(prompt, messages))
    return found


def drawn(rows: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """Return `count` of the rows as examples; the same for the same rows and seed.

    Raises DataError if there are fewer.
    """
    if len(rows) < count:
        raise DataError(
            f"--few-shot: {count} examples are asked for, and the run was trained on {len(rows)} "
            "rows; give a smaller number"
        )
    return random.Random(seed).sample(list(rows), count)


def with_context(prompts: Sequence[Prompt], column: str) -> list[Prompt]:
    """Put the text of a column before what the last message asks. Raises DataError without it."""
    found = []
    for prompt in prompts:
        value = prompt.fields.get(column)
        if not isinstance(value, str) or not value.strip():
            listed = list_columns(prompt.fields)
            raise DataError(
                f"--context: {prompt.place} has no text in column {short(column)}; it has {listed}"
            )
        *before, last = prompt.messages
        if value in (last.content, last.context):
            raise DataError(
                f"--context: {prompt.place}: column {short(column)} is a part of the question "
                "already; name the column of retrieved text"
            )
        asked = replace(last, content=f"{value.strip()}\n\n{last.content}")
        found.append(_asking(prompt, (*before, asked)))
    return found


def _asking(prompt: Prompt, messages: Sequence[Message]) -> Prompt:
    conversation = replace(prompt.conversation, messages=tuple(messages))
    return replace(prompt, conversation=conversation)
