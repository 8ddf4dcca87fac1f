"""Turn a row of each format into a conversation."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from finetune.data import ratings, verdicts
from finetune.data.column_names import (
    ASKED,
    FORMATS,
    IN_MESSAGES,
    SHAPES,
    by_other_case,
    columns_of,
    fitting,
    no_column,
    taken_from,
)
from finetune.data.conversations import Conversation, Message
from finetune.data.file_types import TABLES, type_of
from finetune.data.messages import (
    read_messages,
    read_tools,
    repaired,
    require_order,
    require_supervised,
    require_unicode,
)
from finetune.data.places import Place, Row, list_columns, short
from finetune.errors import ConfigError, DataError


def detect(
    row: Row, columns: Mapping[str, str] = MappingProxyType({}), for_training: bool = True
) -> str:
    """Return the format of a row, from its columns.

    `columns` maps our name to the file's; `for_training`: see `samples`.
    """
    if name := fitting(row, columns):
        return name
    if not for_training and columns.get(ASKED, ASKED) in row.values:
        return ASKED
    for ours, theirs in columns.items():
        if theirs not in row.values and ours not in IN_MESSAGES:
            raise DataError(f"{row.place}: data.columns: {ours}: {no_column(row, theirs)}")
    if for_training:
        ratings.require_none(row, columns)
    mapping = by_other_case(row) or "for example {question: Patient, answer: Doctor}"
    is_table = type_of(row.place.source) in TABLES
    raise DataError(
        f"{row.place}: columns {list_columns(sorted(row.values))} fit no format ({SHAPES}); "
        + ("the first line should name the columns; " if is_table else "")
        + f"rename them, or map them with data.columns, {mapping}"
    )


def to_conversation(
    row: Row,
    format: str,
    columns: Mapping[str, str],
    system_prompt: str | None = None,
    for_training: bool = True,
    repair_turns: bool = False,
) -> Conversation:
    """Convert one row to a Conversation. Raise DataError that names row and column.

    `columns` maps our name to the file's; `for_training`: see `samples`; `repair_turns`: whether to
    join and drop turns that stand where none can.
    """
    require_known(format, columns)
    taken = taken_from(row, format, columns)
    for ours, theirs in taken.items():
        if twice := [other for other in taken if other != ours and taken[other] == theirs]:
            raise ConfigError(
                f"data.columns: {ours} and {twice[0]} would both be read from column "
                f"{short(theirs)!r}; name another column for one of them"
            )
    if for_training and (
        format != "text" or verdicts.preference_columns(tuple(row.values), verdicts.REJECTED)
    ):
        ratings.require_none(row, taken)
    if format == "text":
        text = cell(row, taken["text"])
        return Conversation((Message("text", text, supervised=True),), row.place)
    repairs, tools = list[str](), None
    if format == "messages":
        messages = _turns(row, taken, for_training, columns)
        tools = row.values.get(taken["tools"]) if "tools" in taken else None
    else:
        messages = _pair(row, format, taken)
    messages = with_system(row, taken.get("system"), messages)
    if repair_turns:
        messages, repairs = repaired(messages)
    if format == "messages":
        require_order(row.place, messages)
        require_supervised(row.place, messages)
    if system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt, from_setting=True))
    if tools in (None, "", []):
        return Conversation(tuple(messages), row.place, repairs=tuple(repairs))
    described = read_tools(f"{row.place}: column {taken['tools']!r}", tools)
    return Conversation(tuple(messages), row.place, described, tuple(repairs))


def require_known(format: str, columns: Mapping[str, str]) -> None:
    """Raise ConfigError for a name in data.columns that a format does not have."""
    known = columns_of(format)
    if unused := [name for name in columns if name not in known]:
        raise ConfigError(
            f"data.columns: {unused[0]} is not a column of format {format}, which has "
            f"{', '.join(known)}; remove it"
        )


def _turns(
    row: Row, taken: Mapping[str, str], for_training: bool, columns: Mapping[str, str]
) -> list[Message]:
    """Return the messages of a column of messages, or of a prompt and what continues it."""
    if "messages" in taken:
        column = taken["messages"]
        turns = column_of(row, column)
        return read_messages(row.place, column, turns, for_training, columns)
    prompt, completion = taken["prompt"], taken["completion"]
    asked = as_turns(row.place, prompt, column_of(row, prompt), "user", for_training, columns)
    given = as_turns(
        row.place, completion, column_of(row, completion), "assistant", for_training, columns
    )
    return [*(replace(message, supervised=False) for message in asked), *given]


def as_turns(
    place: Place, column: str, value: Any, role: str, for_training: bool = True,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Message]:  # fmt: skip
    """Return messages of a column that holds a list of them, one of them, or text of `role`."""
    if isinstance(value, str):
        turns = [{"role": role, "content": value}]
        return read_messages(place, column, turns, for_training)
    turns = [value] if isinstance(value, dict) else value
    return read_messages(place, column, turns, for_training, columns)


def _pair(row: Row, format: str, taken: Mapping[str, str]) -> list[Message]:
    """Return one question and its answer, after the turns of an Alpaca row's history."""
    user, answer = FORMATS[format]
    for column in (taken[user], taken[answer]) if format == "prompt_completion" else ():
        if isinstance(row.values.get(column), list) and row.values[column]:
            raise DataError(
                f"{row.place}: column {column!r} should be text, got {short(row.values[column])}; "
                "lists of messages are data.format: messages"
            )
    has_input = "input" in taken and row.values.get(taken["input"]) is not None
    context = cell(row, taken["input"], may_be_empty=True) if has_input else ""
    return [
        *_history(row, taken.get("history")),
        Message("user", cell(row, taken[user]), context=context),
        Message("assistant", cell(row, taken[answer]), supervised=True),
    ]


def _history(row: Row, column: str | None) -> list[Message]:
    """Return earlier turns: a list of pairs of a question and its answer."""
    history, messages = (row.values.get(column) if column else None) or [], list[Message]()
    if isinstance(history, str) and not history.strip():
        return []
    for number, pair in enumerate(history if isinstance(history, list) else [history], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(map(is_filled, pair))):
            raise DataError(
                f"{row.place}: entry {number} of {column!r} should be a question and its answer, "
                f'["...", "..."], got {short(pair)}'
            )
        for text in pair:
            require_unicode(f"{row.place}: column {column!r}", text)
        messages += [Message("user", pair[0]), Message("assistant", pair[1], supervised=True)]
    return messages


def is_filled(value: Any) -> bool:
    """Return whether a value is text with letters in it."""
    return isinstance(value, str) and bool(value.strip())


def with_system(row: Row, column: str | None, messages: list[Message]) -> list[Message]:
    """Put the text of a column before messages, as their system message."""
    text = row.values.get(column) if column else None
    if text is None or text == "":
        return messages
    assert column
    content = cell(row, column)
    if messages[0].role == "system":
        if messages[0].content == content:
            return messages
        raise DataError(
            f"{row.place}: has a system message, and another in column {column!r}; remove one"
        )
    return [Message("system", content), *messages]


def column_of(row: Row, column: str) -> Any:
    """Return the value of a column. Raise DataError if the row lacks it."""
    if column not in row.values:
        raise DataError(f"{row.place}: {no_column(row, column)}")
    return row.values[column]


def cell(row: Row, column: str, may_be_empty: bool = False) -> str:
    """Return the text of a column. Raise DataError for anything else."""
    value = column_of(row, column)
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: column {column!r} should be text, got {short(value)}; write it as a "
            "string"
        )
    if not value.isascii():
        require_unicode(f"{row.place}: column {column!r}", value)
    if not may_be_empty and not value.strip():
        raise DataError(f"{row.place}: column {column!r} is empty; fill it or remove the row")
    return value
