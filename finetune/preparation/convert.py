"""Convert rows to another format, and files to another type by the ending of --output.

    finetune data convert rows.csv --to messages --output rows.jsonl

Formats are those that training reads, sharegpt (conversations of from and value) and openai
(messages). Rows with a chosen and a rejected answer become preference, openai (input,
preferred_output, non_preferred_output) or sharegpt (conversations, chosen, rejected). Columns that
a format does not read stay. What the other format cannot hold, such as a second question in
prompt_completion, is an error. The input of an instruction joins its question after a blank line.
"""

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from finetune.data.column_names import RATED, fitting, taken_from
from finetune.data.formats import detect, to_conversation
from finetune.data.places import Row, short
from finetune.errors import DataError
from finetune.preparation import frame as frames
from finetune.preparation import rated
from finetune.preparation.frame import Frame

# Formats whose columns the new ones replace.
READ = ("messages", "question_answer", "prompt_completion", "instruction", "text")
PAIRS = {
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
COMPARED = ("preference", "openai", "sharegpt")  # what rows of a chosen answer become
SEVERAL = ("messages", "openai", "sharegpt")  # what holds several answers
FORMATS = (*READ, "sharegpt", "openai", *rated.MAKERS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    frames.add_rejects(parser)
    what = f"{', '.join(FORMATS)} (default: as it is, for another type of file)"
    add("--to", choices=FORMATS, metavar="FORMAT", help=what)
    frames.add_format(parser, also=tuple(rated.MAKERS))
    what = "drop rows that the new format cannot hold, and count them"
    add("--drop", action="store_true", help=what)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    with frame.writing() as write:
        for row in frame.rows():
            try:
                values = row.values if arguments.to is None else converted(row, arguments)
            except DataError as exc:
                if not arguments.drop:
                    raise
                frame.drop(row, "does not fit the format", why=str(exc).partition(": ")[2])
                continue
            write(values, row.place)


def converted(row: Row, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a row in the format --to. Raise DataError if it does not fit."""
    format, columns = _format(row, arguments), arguments.columns
    if format in RATED:
        made, read = rated.converted(row, format, columns, arguments.to)
        return _joined(row, made, read)
    if arguments.to in RATED:
        what = f"holds no rated answers, as {arguments.to} does"
        raise DataError(f"{row.place}: {what}; give --format or --columns if it does")
    conversation = to_conversation(row, format, columns, None, for_training=False)
    turns = [rated.turn(each) for each in conversation.messages]
    if _keep_how_to_train(turns, row, format, columns) and arguments.to not in SEVERAL:
        what = f"this row says how to train on an answer, which {arguments.to} cannot hold"
        raise DataError(f"{row.place}: {what}; convert it --to messages")
    tools: dict[str, Any] = {}
    if conversation.tools or any(each.parts for each in conversation.messages):
        if arguments.to not in ("messages", "openai"):
            what = f"this row has tools, their calls or thoughts, which {arguments.to} cannot hold"
            raise DataError(f"{row.place}: {what}; convert it --to messages")
        tools = {"tools": list(conversation.tools)} if conversation.tools else {}
    made = MAKERS[arguments.to](row, turns) | tools
    joined = _joined(row, made, set(taken_from(row, format, columns).values()))
    _require_same_meaning(Row(row.place, joined), made, arguments.to, format)
    return joined


def _format(row: Row, arguments: argparse.Namespace) -> str:
    """Return the format of a row; rated answers count where the new format can hold them."""
    if arguments.format != "auto":
        return str(arguments.format)
    found = rated.rated_format(row, arguments.columns)
    if arguments.to == found or (found == "preference" and arguments.to in COMPARED):
        return str(found)
    if found and not fitting(row, arguments.columns):
        return found  # which says what it can become
    return detect(row, arguments.columns, for_training=False)


def _joined(row: Row, made: dict[str, Any], read: set[str]) -> dict[str, Any]:
    """Return a new row with the columns that were not read."""
    kept = {name: value for name, value in row.values.items() if name not in read}
    if taken := [name for name in made if name in kept]:
        what = f"column {short(taken[0])!r} would be replaced; rename or remove it first"
        raise DataError(f"{row.place}: {what}")
    return made | kept


def _require_same_meaning(row: Row, made: dict[str, Any], to: str, before: str) -> None:
    """Raise DataError if the new format reads a column that stayed, which the old one did not."""
    reads = taken_from(row, "messages" if to in SEVERAL else to, {})
    for name in reads.values():
        if name not in made and row.values.get(name) is not None:
            what = f"column {short(name)!r} is not read in {before}, but would be in {to}"
            raise DataError(f"{row.place}: {what}; rename or remove it first")


def _keep_how_to_train(
    turns: list[dict[str, Any]], row: Row, format: str, columns: Mapping[str, str]
) -> bool:
    """Put back into answers that they are not trained on, or their weight; return whether any is.

    Rows that nothing can be trained on say nothing here.
    """
    if format != "messages":
        return False
    with suppress(DataError):
        trained = to_conversation(row, format, columns)
        for turn, message in zip(turns, trained.messages, strict=True):
            if message.role == "assistant" and not message.supervised:
                turn["train"] = False
            elif message.weight != 1:
                turn["weight"] = message.weight
    return any(turn.keys() & rated.HOW_TO_TRAIN for turn in turns)


def _messages(row: Row, turns: list[dict[str, Any]]) -> dict[str, Any]:
    if turns[0]["role"] == "text":
        raise DataError(f"{row.place}: plain text has no messages; from_text makes rows of it")
    return {"messages": turns}


def _sharegpt(row: Row, turns: list[dict[str, Any]]) -> dict[str, Any]:
    made = _messages(row, turns)["messages"]
    return {"conversations": [rated.as_sharegpt(turn) for turn in made]}


def _text(row: Row, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Join what is said with blank lines; roles are lost."""
    return {"text": "\n\n".join(turn["content"] for turn in turns)}


def _pair(names: tuple[str, str]) -> Callable[[Row, list[dict[str, Any]]], dict[str, Any]]:
    def make(row: Row, turns: list[dict[str, Any]]) -> dict[str, Any]:
        roles = [turn["role"] for turn in _messages(row, turns)["messages"]]
        if roles != ["user", "assistant"]:
            what = f"{', '.join(roles[:6])} are not one question and one answer"
            raise DataError(f"{row.place}: {what}; convert it --to messages, or --drop such rows")
        return dict(zip(names, (turns[0]["content"], turns[1]["content"])))

    return make


MAKERS: Mapping[str, Callable[[Row, list[dict[str, Any]]], dict[str, Any]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "openai": lambda row, turns: {
        "messages": list(map(rated.as_openai, _messages(row, turns)["messages"]))
    },
    "text": _text,
    **{name: _pair(names) for name, names in PAIRS.items()},
}
