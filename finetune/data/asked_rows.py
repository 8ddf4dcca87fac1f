"""Rows of prompts, each with a reference answer or without one."""

import json
from collections.abc import Mapping

from finetune.data import formats
from finetune.data.column_names import ASKED, asked_columns, no_column
from finetune.data.conversations import Conversation, Message, Sample
from finetune.data.messages import read_messages, read_tools, require_unicode
from finetune.data.places import Row, short
from finetune.errors import DataError


def to_sample(
    row: Row, columns: Mapping[str, str], system_prompt: str | None = None
) -> tuple[Sample, set[str]]:
    """Return the conversation of a row up to its answer, and the columns that it reads.

    A reference answer becomes its last message. Raises DataError that names row and column.
    """
    formats.require_known(ASKED, columns)
    taken = asked_columns(row, columns)
    if "prompt" not in taken:
        raise DataError(f"{row.place}: {no_column(row, columns.get('prompt', 'prompt'))}")
    messages = formats.with_system(row, taken.get("system"), _asked(row, taken["prompt"], columns))
    if system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt, from_setting=True))
    answer = row.values.get(taken.get("answer", ""))
    if answer is not None and answer != "":
        messages.append(Message("assistant", _reference(row, taken["answer"]), supervised=True))
    tools = row.values.get(taken.get("tools", ""))
    described = read_tools(f"{row.place}: column {taken['tools']!r}", tools) if tools else ()
    return Sample((Conversation(tuple(messages), row.place, described),), row=row), {
        *taken.values()
    }


def _asked(row: Row, column: str, columns: Mapping[str, str]) -> list[Message]:
    """Return the messages of a prompt: a text, or a list that ends before an answer."""
    value = row.values[column]
    is_list = isinstance(value, list) or (
        isinstance(value, str) and value.lstrip().startswith('[{"')
    )
    if not is_list:
        return [Message("user", formats.cell(row, column))]
    messages = read_messages(row.place, column, value, False, columns)
    if messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"{row.place}: column {column!r} ends with a message of the {messages[-1].role}; a "
            "prompt ends where the model should answer"
        )
    return [Message(m.role, m.content, context=m.context, parts=m.parts) for m in messages]


def _reference(row: Row, column: str) -> str:
    """Return the right answer as text; numbers and lists as JSON."""
    value = row.values[column]
    if isinstance(value, str):
        require_unicode(f"{row.place}: column {column!r}", value)
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as exc:
        raise DataError(
            f"{row.place}: column {column!r} should be text or a number, got {short(value)}"
        ) from exc
