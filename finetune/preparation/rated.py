"""Rows of rated answers in other shapes: preference, unpaired and choices; OpenAI's, ShareGPT's."""

import json
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple

from finetune.data import preferences
from finetune.data.column_names import RATED, fitting
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Row
from finetune.errors import DataError

OPENAI = ("input", "preferred_output", "non_preferred_output")
# Of OpenAI's input; whether calls may be parallel says nothing of what is learned.
INPUT_KEYS = {"messages", "tools", "parallel_tool_calls"}
SHAREGPT = {"user": "human", "assistant": "gpt"}
HOW_TO_TRAIN = {"train", "weight"}  # keys of an answer
Turns = list[dict[str, Any]]


def rated_format(row: Row, columns: Mapping[str, str]) -> str | None:
    """Return the format of a row of rated answers, from its columns, or None for any other."""
    there = {*row.values, *(ours for ours, theirs in columns.items() if theirs in row.values)}
    if there.issuperset(OPENAI[1:]) or there.issuperset(RATED["preference"]):
        return "preference"
    if there.intersection(preferences.CHOICES) and there.intersection(preferences.GOLD):
        return "choices"
    if there.intersection(preferences.LABELS) and fitting(row, columns):
        return "unpaired"
    return None


def turn(message: Message) -> dict[str, Any]:
    """Return a message as rows have it; the input of an instruction joins it."""
    content = "\n\n".join(filter(None, (message.content, message.context)))
    return {"role": message.role, "content": content} | dict(message.parts)


class Answers(NamedTuple):
    """What a row asks, and its answers; of the first, labels say how good each is."""

    asked: Turns
    given: list[Turns]
    labels: tuple[float, ...]
    tools: list[Any]

    @property
    def has_tools(self) -> bool:
        """Whether a message holds more than text."""
        turns = [*self.asked, *(each for answer in self.given for each in answer)]
        return bool(self.tools) or any(len(each) > 2 for each in turns)

    @property
    def texts(self) -> list[str] | None:
        """The texts of answers that are one message of text each."""
        if self.has_tools or any(len(answer) != 1 for answer in self.given):
            return None
        return [answer[0]["content"] for answer in self.given]

    @property
    def question(self) -> str | None:
        """The text of what is asked, if it is one message of the user."""
        is_text = [each["role"] for each in self.asked] == ["user"] and not self.has_tools
        return self.asked[0]["content"] if is_text else None


def converted(
    row: Row, format: str, columns: Mapping[str, str], to: str
) -> tuple[dict[str, Any], set[str]]:
    """Return a row of a format of RATED in another shape, and the columns that it was read from.

    Raises DataError if it does not fit.
    """
    makers = MAKERS[format]
    if to not in makers:
        others = ", ".join(makers)
        raise DataError(f"{row.place}: rows of format {format} can become {others}, not {to}")
    sample, read = preferences.to_sample(row, format, columns)
    if "input" in read and isinstance(given := row.values.get("input"), dict):
        for key in given.keys() - INPUT_KEYS:
            raise DataError(f"{row.place}: input holds {key!r}, which would be lost; remove it")
    return makers[to](row, _answers(sample.conversations, sample.fields["label"])), read


def _answers(conversations: tuple[Conversation, ...], labels: tuple[float, ...]) -> Answers:
    """Part what the conversations have in common from how each goes on."""
    whole = [[turn(message) for message in each.messages] for each in conversations]
    shared = takewhile(lambda turns: turns.count(turns[0]) == len(turns), zip(*whole))
    common = min(sum(1 for _ in shared), min(map(len, whole)) - 1)  # equal choices are answers
    tools = list(conversations[0].tools)
    return Answers(whole[0][:common], [turns[common:] for turns in whole], labels, tools)


def _preference(row: Row, answers: Answers) -> dict[str, Any]:
    """Write texts where all are, else lists of messages."""
    texts, question = answers.texts, answers.question
    # A text that begins so would be read as a whole conversation.
    if texts and question and not any(text.lstrip().startswith("Human:") for text in texts):
        chosen, *rejected = texts
        return {"prompt": question, "chosen": chosen,
                "rejected": rejected if len(rejected) > 1 else rejected[0]}  # fmt: skip
    chosen_turns, rejected_turns = _two(row, answers, "preference")
    made = {"prompt": answers.asked, "chosen": chosen_turns, "rejected": rejected_turns}
    return made | ({"tools": answers.tools} if answers.tools else {})


def _two(row: Row, answers: Answers, to: str) -> list[Turns]:
    """Return the chosen and the rejected answer. Raise DataError for several rejected ones."""
    if len(answers.given) > 2:
        what = f"{len(answers.given) - 1} rejected answers, but {to} holds one"
        raise DataError(f"{row.place}: {what}; make a row of each, or --drop such rows")
    return answers.given


def _openai(row: Row, answers: Answers) -> dict[str, Any]:
    chosen, rejected = ([as_openai(each) for each in answer]
                        for answer in _two(row, answers, "openai"))  # fmt: skip
    asked: dict[str, Any] = {"messages": [as_openai(each) for each in answers.asked]}
    if answers.tools:
        asked["tools"] = answers.tools
    return dict(zip(OPENAI, (asked, chosen, rejected)))


def as_openai(turn: Mapping[str, Any]) -> dict[str, Any]:
    """Write arguments of calls as JSON text, and 0 as the weight of what is not trained."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(
            call["function"]["arguments"], ensure_ascii=False)}}
        for call in turn.get("tool_calls", [])
    ]  # fmt: skip
    made = dict(turn) | ({"tool_calls": calls} if calls else {})
    if made.get("train") is False:
        del made["train"]
        made["weight"] = 0
    return made


def _sharegpt(row: Row, answers: Answers) -> dict[str, Any]:
    if answers.texts is None:
        what = "holds tools, thoughts or answers of several messages, which sharegpt cannot hold"
        raise DataError(f"{row.place}: {what}; convert it --to openai, or --drop such rows")
    chosen, rejected = _two(row, answers, "sharegpt")
    return {
        "conversations": [as_sharegpt(each) for each in answers.asked],
        "chosen": as_sharegpt(chosen[0]), "rejected": as_sharegpt(rejected[0]),
    }  # fmt: skip


def as_sharegpt(turn: Mapping[str, Any]) -> dict[str, Any]:
    made = {"from": SHAREGPT.get(turn["role"], turn["role"]), "value": turn["content"]}
    return made | {key: turn[key] for key in turn.keys() & HOW_TO_TRAIN}


def _unpaired(row: Row, answers: Answers) -> dict[str, Any]:
    label = {"label": bool(answers.labels[0])}
    [given] = answers.given
    if given[0]["role"] == "text":
        return {"text": given[0]["content"]} | label
    if answers.question is not None and answers.texts:
        return {"prompt": answers.question, "completion": answers.texts[0]} | label
    made = {"messages": [*answers.asked, *given]} | label
    return made | ({"tools": answers.tools} if answers.tools else {})


def _choices(row: Row, answers: Answers) -> dict[str, Any]:
    question = answers.question
    asked = {"messages": answers.asked} if question is None else {"question": question}
    gold = answers.labels.index(1)
    return {**asked, "choices": answers.texts, "gold": gold}


MAKERS: Mapping[str, Mapping[str, Callable[[Row, Answers], dict[str, Any]]]] = {
    "preference": {"preference": _preference, "openai": _openai, "sharegpt": _sharegpt},
    "unpaired": {"unpaired": _unpaired},
    "choices": {"choices": _choices},
}
