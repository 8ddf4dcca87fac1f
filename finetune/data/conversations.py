"""What rows become: messages, conversations of them, and samples of conversations."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.data.places import Place, Row
from finetune.errors import DataError

THOUGHTS = "reasoning_content"
"""The part of an answer that holds its thoughts, in the name that templates have for it."""
# At the beginning of an answer; some prompts already open them.
_THOUGHTS = re.compile(r"\s*(?:<think(?:ing)?>)?.*?</think(?:ing)?>\s*", re.DOTALL)
_LATE_THOUGHTS = re.compile(
    r"\s*(?!<think)\S(?:(?!</think).)*<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL
)


@dataclass(frozen=True)
class Message:
    """One turn. `context` is the separate input of an instruction row, empty elsewhere."""

    role: str
    content: str
    supervised: bool = False
    context: str = ""
    from_setting: bool = field(default=False, compare=False)
    """Whether data.system_prompt added it; errors then name the setting, not the row."""
    weight: float = 1.0
    """Factor of the loss of a supervised message."""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """What a template gets beside the content: tool_calls, reasoning_content, and tool_call_id and
    name of a tool."""

    def with_content(self, content: str) -> "Message":
        """Return the message with another content; `dataclasses.replace` takes 8 us."""
        return Message(
            self.role, content, self.supervised, self.context, self.from_setting, self.weight,
            self.parts,
        )  # fmt: skip

    @property
    def has_calls(self) -> bool:
        return "tool_calls" in self.parts

    @property
    def thoughts(self) -> str:
        return str(self.parts.get(THOUGHTS, ""))


@dataclass(frozen=True)
class Conversation:
    """The one internal shape of what is learned; plain text is a single message of role "text"."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that the model may call, for the template's own `tools`."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """What data.repair_turns changed."""

    def with_messages(self, messages: tuple[Message, ...]) -> "Conversation":
        """Return the conversation with other messages."""
        return Conversation(messages, self.place, self.tools, self.repairs)


def without_thoughts(conversation: Conversation) -> Conversation:
    """Return the conversation without the thoughts of its answers.

    Raises DataError for an answer that is nothing else, whose thoughts do not end, or that begins
    before its thoughts, as that beginning would go with them.
    """
    messages = []
    for number, message in enumerate(conversation.messages, 1):
        if message.role == "assistant":
            if _LATE_THOUGHTS.match(message.content):
                raise DataError(
                    f"{conversation.place}: message {number} has text before its thoughts, which "
                    "data.thinking: drop would remove, too; write the thoughts first"
                )
            content = _THOUGHTS.sub("", message.content, count=1)
            parts = {key: value for key, value in message.parts.items() if key != THOUGHTS}
            if not (content.strip() or "tool_calls" in parts) or content.startswith("<think"):
                raise DataError(
                    f"{conversation.place}: message {number} holds nothing but thoughts, which "
                    "data.thinking: drop removes; remove the row"
                )
            message = replace(message, content=content, parts=parts)
        messages.append(message)
    return replace(conversation, messages=tuple(messages))


def turn_by_turn(conversation: Conversation) -> list[Conversation]:
    """Return a conversation that ends with it for each supervised answer."""
    messages = conversation.messages
    ends = [end for end, message in enumerate(messages, 1) if message.supervised]
    return [replace(conversation, messages=messages[:end]) for end in ends]


Label = str | int
"""The name of a label, or its number."""


@dataclass(frozen=True)
class Sample:
    """What a row asks to be learned together: one conversation, or several, as two answers are.

    fields: what is known of it and never tokenised; for each name a number for each conversation.
    labels: one of the row, or one of each of its `words`, which the text holds between spaces; None
    for a word that is not learned.
    """

    conversations: tuple[Conversation, ...]
    fields: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    row: Row | None = field(default=None, compare=False)
    """What stands in the user's file."""
    labels: tuple[Label | None, ...] = ()
    words: tuple[str, ...] = ()
