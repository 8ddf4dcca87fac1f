"""Rows of several answers, or of rated ones: each becomes conversations with a label.

`label` is 1 for the chosen, desired or right answer and 0 for any other. An objective of a user's
own gets it as batch.columns["label"], a number for each document.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from finetune.data import formats
from finetune.data.column_names import present_name, taken_from
from finetune.data.conversations import Conversation, Message, Sample
from finetune.data.messages import read_messages, read_tools, require_order
from finetune.data.places import Place, Row, list_columns, short
from finetune.errors import DataError

ASKED = ("messages", "prompt", "question", "instruction")
LABELS = ("label", "kto_tag")
PAIRS = {"chosen", "rejected"}, {"preferred_output", "non_preferred_output"}
MARGIN = "margin"
"""The field that says by how much the chosen answer should lead."""
GOLD = ("gold", "answerKey", "answer", "label", "answer_index")
STEPS, STEP_LABELS = ("steps", "completions"), ("labels", "step_labels")
CHOICES = ("choices", "options", "endings")
YES = {"true", "1", "1.0", "yes", "desirable", "good", "chosen", "up"}
NO = {"false", "0", "0.0", "-1", "no", "undesirable", "bad", "rejected", "down"}


def to_sample(
    row: Row, format: str, columns: Mapping[str, str], system_prompt: str | None = None
) -> tuple[Sample, set[str]]:
    """Return what a row of a format of RATED asks to be learned, and the columns that it reads.

    Raises DataError that names row and column.
    """
    formats.require_known(format, columns)
    read = READERS[format]
    conversations, labels, used = read(row, columns)
    if system_prompt is not None:
        conversations = [_with_system_prompt(each, system_prompt) for each in conversations]
    fields = {"label": tuple(map(float, labels))}
    if MARGIN in columns and format == "preference":
        used = {*used, columns[MARGIN]}
        fields[MARGIN] = (_margin(row, columns[MARGIN]),) * len(conversations)
    return Sample(tuple(conversations), fields, row), used


Found = tuple[list[Conversation], Sequence[float], set[str]]
"""Conversations, their labels, and the columns that were read."""


def _with_system_prompt(conversation: Conversation, system_prompt: str) -> Conversation:
    if conversation.messages[0].role == "system":
        return conversation
    first = Message("system", system_prompt, from_setting=True)
    return replace(conversation, messages=(first, *conversation.messages))


def _name(row: Row, columns: Mapping[str, str], ours: str, names: Sequence[str]) -> str | None:
    """Return the row's own name of a column, or None if it has none of the usual ones."""
    if ours in columns:
        return columns[ours]
    found = (present_name(row, name) for name in names)
    return next((name for name in found if name in row.values), None)


def _require_name(row: Row, columns: Mapping[str, str], ours: str, names: Sequence[str]) -> str:
    name = _name(row, columns, ours, names)
    if name is None:
        raise DataError(
            f"{row.place}: no column {ours!r}; this row has {list_columns(sorted(row.values))}; "
            f"map it with data.columns, {{{ours}: NAME}}"
        )
    return name


# ---------------------------------------------------------------------------------- preferences


def _preference(row: Row, columns: Mapping[str, str]) -> Found:
    """Read a chosen answer and one or several rejected ones, in any of their shapes."""
    if {"preferred_output", "non_preferred_output"} <= row.values.keys():
        return _openai(row)
    chosen, rejected = (_require_name(row, columns, n, (n,)) for n in ("chosen", "rejected"))
    asked, used = question_of(row, columns)
    system = _name(row, columns, "system", ("system", "system_prompt"))
    tools_column = _name(row, columns, "tools", ("tools",))
    used |= {chosen, rejected} | {name for name in (system, tools_column) if name}
    tools = _tools(row.place, tools_column, row.values.get(tools_column or ""))
    bad: Any = row.values.get(rejected)
    is_several = isinstance(bad, list) and bad and all(isinstance(each, str) for each in bad)
    answers = [(chosen, _transcript(row.values.get(chosen)))]
    answers += [(rejected, _transcript(each)) for each in (bad if is_several else [bad])]
    whole = [
        formats.with_system(row, system, _answered(row, asked, name, answer, columns))
        for name, answer in answers
    ]
    return _compared(row, whole, tools, used)


def _margin(row: Row, column: str) -> float:
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(
            f"{row.place}: column {column!r} should be a number, by which the chosen answer leads, "
            f"got {short(value)}"
        )
    return float(value)


def _openai(row: Row) -> Found:
    """Read a row of OpenAI's: input.messages, preferred_output, non_preferred_output."""
    given = row.values.get("input")
    if not isinstance(given, dict):
        raise DataError(
            f"{row.place}: column 'input' should be an object with messages, got {short(given)}"
        )
    asked = read_messages(row.place, "input.messages", given.get("messages"))
    names = ("preferred_output", "non_preferred_output")
    whole = [[*asked, *_answer(row, name, row.values[name], {})] for name in names]
    tools = _tools(row.place, "input.tools", given.get("tools"))
    return _compared(row, whole, tools, {"input", *names})


def _tools(place: Place, column: str | None, value: Any) -> tuple[Mapping[str, Any], ...]:
    return read_tools(f"{place}: column {column!r}", value)


def question_of(row: Row, columns: Mapping[str, str]) -> tuple[list[Message], set[str]]:
    """Return the turns that the answers continue, none if they hold them; and the columns read."""
    for ours in ASKED:
        name = _name(row, columns, ours, (ours,))
        value = row.values.get(name) if name else None
        if name and value not in (None, "", []):
            if not isinstance(value, str):
                return formats.as_turns(row.place, name, value, "user", True, columns), {name}
            context = _name(row, columns, "input", ("input",)) if ours == "instruction" else None
            text = formats.cell(row, name)
            given = row.values.get(context) if context else None
            inner = formats.cell(row, context) if context and given else ""
            return [Message("user", text, context=inner)], {name, *([context] if context else [])}
    return [], set()


_TURN = re.compile(r"\n\n(Human|Assistant):")


def _transcript(value: Any) -> Any:
    """Return the turns of a text that begins with "Human:", as Anthropic's rows do."""
    if not (isinstance(value, str) and value.lstrip().startswith("Human:")):
        return value
    _, *parts = _TURN.split("\n\n" + value.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[name], "content": text.strip()}
        for name, text in zip(parts[::2], parts[1::2])
    ]
    return turns if len(turns) > 1 else value


def _answer(row: Row, column: str, value: Any, columns: Mapping[str, str]) -> list[Message]:
    if value is None or value in ("", []):
        raise DataError(f"{row.place}: column {column!r} is empty; fill it or remove the row")
    return formats.as_turns(row.place, column, value, "assistant", True, columns)


def _answered(
    row: Row, asked: list[Message], column: str, value: Any, columns: Mapping[str, str]
) -> list[Message]:
    """Return the whole conversation of an answer, which may hold the question itself."""
    answer = _answer(row, column, value, columns)
    if answer[0].role in ("assistant", "tool"):
        if not asked:
            raise DataError(
                f"{row.place}: column {column!r} is an answer, but the row has no question; add "
                f"one of the columns {', '.join(ASKED)}, or write {column} as a list of messages "
                "that begins with the user's"
            )
        return [*asked, *answer]
    return answer


def _compared(
    row: Row, whole: list[list[Message]], tools: tuple[Mapping[str, Any], ...], used: set[str]
) -> Found:
    """Check conversations that begin alike; supervise only what differs."""
    for messages in whole:
        require_order(row.place, messages, can_repair=False)
    keys = [[(m.role, m.content, m.context, str(m.parts)) for m in each] for each in whole]
    common = sum(1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*keys)))
    for number, messages in enumerate(whole):
        if common == len(messages):
            raise DataError(
                f"{row.place}: the chosen and a rejected answer are equal; remove the row"
                if all(len(each) == common for each in whole)
                else f"{row.place}: one conversation only continues the other; remove the row"
            )
        if messages[common].role != "assistant":
            raise DataError(
                f"{row.place}: the conversations differ at message {common + 1}, which is of the "
                f"{messages[common].role}: {short(messages[common].content)}; they should begin "
                "alike and differ in their answers"
            )
        whole[number] = [
            replace(message, supervised=message.supervised and place >= common)
            for place, message in enumerate(messages)
        ]
    conversations = [Conversation(tuple(messages), row.place, tools) for messages in whole]
    return conversations, [1] + [0] * (len(whole) - 1), used


# ------------------------------------------------------------------------------ labels, choices


def _unpaired(row: Row, columns: Mapping[str, str]) -> Found:
    """Read one answer that is good or bad (KTO), or a pair, which has one of each."""
    name = _name(row, columns, "label", LABELS)
    if name is None and any(pair <= row.values.keys() for pair in PAIRS):
        return _preference(row, columns)
    name = name or _require_name(row, columns, "label", LABELS)
    value = row.values.get(name)
    word = str(value).strip().lower()
    if word not in YES | NO:
        raise DataError(f"{row.place}: column {name!r} should be true or false, got {short(value)}")
    others = {ours: theirs for ours, theirs in columns.items() if ours != "label"}
    rest = Row(row.place, {key: each for key, each in row.values.items() if key != name})
    format = formats.detect(rest, others)
    conversation = formats.to_conversation(rest, format, others)
    used = {name, *taken_from(rest, format, others).values()}
    return [conversation], [word in YES], used


def _choices(row: Row, columns: Mapping[str, str]) -> Found:
    """Read a question with several answers, one of which is right."""
    name = _require_name(row, columns, "choices", CHOICES)
    asked, used = question_of(row, columns)
    if not asked:
        raise DataError(f"{row.place}: no column with a question; map it with data.columns, "
                        "{question: NAME}")  # fmt: skip
    texts, right, read = choices_of(row, columns, used)
    conversations = [
        Conversation((*asked, *_answer(row, name, text, columns)), row.place) for text in texts
    ]
    return conversations, [number == right for number in range(len(texts))], used | read


def _steps(row: Row, columns: Mapping[str, str]) -> Found:
    """Read a question, the steps of an answer, and whether each is right.

    Each gives a conversation that ends with it, as if the answer ended there.
    """
    name = _require_name(row, columns, "steps", STEPS)
    marks = _require_name(row, columns, "labels", STEP_LABELS)
    asked, used = question_of(row, columns)
    if not asked:
        raise DataError(f"{row.place}: no column with a question; map it with data.columns, "
                        "{question: NAME}")  # fmt: skip
    steps, labels = row.values.get(name), row.values.get(marks)
    if not isinstance(steps, list) or not steps or not all(map(formats.is_filled, steps)):
        raise DataError(
            f"{row.place}: column {name!r} should be a list of texts, one for each step, got "
            f"{short(steps)}"
        )
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = f"{len(labels)} labels" if isinstance(labels, list) else short(labels)
        raise DataError(
            f"{row.place}: column {marks!r} should be a list with true or false for each of "
            f"{len(steps)} steps, got {count}"
        )
    words = [str(each).strip().lower() for each in labels]
    if wrong := next((n for n, word in enumerate(words) if word not in YES | NO), None):
        raise DataError(
            f"{row.place}: column {marks!r}: label {wrong + 1} should be true or false, got "
            f"{short(labels[wrong])}"
        )
    texts = ["\n".join(steps[:end]) for end in range(1, len(steps) + 1)]
    conversations = [
        Conversation((*asked, *_answer(row, name, text, columns)), row.place) for text in texts
    ]
    return conversations, [word in YES for word in words], used | {name, marks}


READERS = {
    "preference": _preference, "unpaired": _unpaired, "choices": _choices, "steps": _steps,
}  # fmt: skip


def choices_of(
    row: Row, columns: Mapping[str, str], used: Collection[str] = ()
) -> tuple[list[str], int, set[str]]:
    """Return the texts of the choices, which of them is right, and the columns that say so.

    `used`: columns that were read for the question. Raises DataError.
    """
    name = _require_name(row, columns, "choices", CHOICES)
    names, texts = _named_choices(row, name)
    gold = _require_name(row, columns, "gold", [each for each in GOLD if each not in used])
    return texts, _right(row, gold, names, texts), {name, gold}


def _named_choices(row: Row, column: str) -> tuple[list[str], list[str]]:
    """Return names and texts: of a list, of {A: ..., B: ...}, or of {label: [...], text: [...]}."""
    value = row.values.get(column)
    names: Any
    texts: Any
    if isinstance(value, dict) and {"label", "text"} <= value.keys():
        names, texts = value["label"], value["text"]
    elif isinstance(value, dict):
        names, texts = list(value), list(value.values())
    else:
        names, texts = None, value
    is_list = isinstance(texts, list) and len(texts) > 1
    if is_list and all(isinstance(each, str) for each in texts):
        empty = [str(number) for number, each in enumerate(texts, 1) if not each.strip()]
        if empty:
            raise DataError(
                f"{row.place}: column {column!r}: choice {', '.join(empty)} of {len(texts)} is "
                "empty; fill it or remove the row"
            )
    if not is_list or not all(map(formats.is_filled, texts)):
        raise DataError(
            f"{row.place}: column {column!r} should be a list of at least two answers, got "
            f"{short(value)}"
        )
    if not isinstance(names, list) or len(names) != len(texts):
        names = [chr(ord("A") + number) for number in range(len(texts))]
    return [str(name) for name in names], texts


def _right(row: Row, column: str, names: list[str], texts: list[str]) -> int:
    """Return which choice is right: by its number from 0, its name, or its text."""
    value = row.values.get(column)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(texts):
        return value
    if isinstance(value, str):
        for known in (names, texts):
            if known.count(value.strip()) == 1:
                return known.index(value.strip())
        if value.strip().isdigit() and int(value) < len(texts):
            return int(value)
    raise DataError(
        f"{row.place}: column {column!r} should name one of the {len(texts)} choices, by its "
        f"number from 0, by {short(', '.join(names))}, or by its text, got {short(value)}"
    )
