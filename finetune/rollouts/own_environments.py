"""Environments of a user's own: FILE.py:NAME, a class with `reset` and `step`; no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune import own_code
from finetune.data.conversations import Message
from finetune.data.places import short
from finetune.own_code import OwnCode

FORM = "(messages, reward or None, done)"
OF_TOOLS = ("name", "tool_call_id")  # what a message may have beside its role and content


@dataclass(frozen=True)
class Move:
    """A call of an environment: `reset` by a row, or without one `step` by the model's text."""

    place: int
    """Which completion of its group."""
    row: Mapping[str, Any] | None = None
    text: str = ""


@dataclass(frozen=True)
class Reply:
    """What an environment answers. failed: why it has no answer."""

    messages: tuple[Message, ...] = ()
    reward: float | None = None
    done: bool = False
    failed: str = ""


def no_answer(code: str, reason: str) -> Reply:
    return Reply(failed=f"{code}: {reason}")


class OwnEnvironments:
    """The environments of a group: an object of the class for each completion."""

    def __init__(self, code: OwnCode) -> None:
        self._code = code
        self._made: dict[int, Any] = {}

    def __call__(self, moves: Sequence[Move]) -> list[Reply]:
        return [self._answer(each) for each in moves]

    def _answer(self, move: Move) -> Reply:
        try:
            if move.row is None:
                return self._reply(self._made[move.place].step(move.text))
            made = self._made[move.place] = self._code.value()
            if (found := made.reset(dict(move.row))) is not None:
                what = "reset should return None, as the row's prompt opens the conversation"
                return self._wrong(what, found)
            return Reply()
        except (Exception, SystemExit) as exc:
            return Reply(failed=self._code.blame(exc))

    def _reply(self, found: Any) -> Reply:
        if not isinstance(found, tuple) or len(found) != 3:
            return self._wrong(f"step should return {FORM}", found)
        given, reward, done = found
        reward = reward.item() if hasattr(reward, "item") else reward  # of NumPy or PyTorch
        is_number = isinstance(reward, bool | int | float) and math.isfinite(reward)
        if reward is not None and not is_number:
            return self._wrong("the reward should be a finite number or None", reward)
        if not isinstance(done, bool):
            return self._wrong("done should be True or False", done)
        given = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
        messages = [_message(each) for each in given] if isinstance(given, list | tuple) else [None]
        if None in messages or not (messages or done):
            what = "a list of {role, content} with other roles than assistant"
            return self._wrong(f"messages should be a text, or {what}", given)
        worth = None if reward is None else float(reward)
        return Reply(tuple(each for each in messages if each), worth, done)

    def _wrong(self, what: str, found: Any) -> Reply:
        return no_answer(str(self._code), f"{what}, got {short(repr(found))}")


def _message(given: Any) -> Message | None:
    """Return a message of the environment; None if it is not one."""
    known = {"role", "content", *OF_TOOLS}
    if not isinstance(given, Mapping) or not {"role", "content"} <= given.keys() <= known:
        return None
    if not all(isinstance(value, str) for value in given.values()) or given["role"] == "assistant":
        return None
    parts = {name: given[name] for name in OF_TOOLS if name in given}
    return Message(given["role"], given["content"], parts=parts)


def made(name: str, sha256: str) -> OwnEnvironments:
    """Return the environments in a process that another process started."""
    own_code.read_as(name, sha256)
    return OwnEnvironments(own_code.get(name))
