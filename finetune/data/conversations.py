"""What rows become: messages, conversations of them, and samples of conversations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from finetune.data.places import Place, Row


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
    """What a template gets beside the content: tool_calls, and tool_call_id and name of a tool."""

    @property
    def has_calls(self) -> bool:
        return "tool_calls" in self.parts


@dataclass(frozen=True)
class Conversation:
    """The one internal shape of what is learned; plain text is a single message of role "text"."""

    messages: tuple[Message, ...]
    place: Place
    tools: tuple[Mapping[str, Any], ...] = ()
    """Descriptions of the tools that the model may call, for the template's own `tools`."""
    repairs: tuple[str, ...] = field(default=(), compare=False)
    """What data.repair_turns changed."""


@dataclass(frozen=True)
class Sample:
    """What a row asks to be learned together: one conversation, or several, as two answers are.

    fields: what is known of it and never tokenised; for each name a number for each conversation.
    """

    conversations: tuple[Conversation, ...]
    fields: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    row: Row | None = field(default=None, compare=False)
    """What stands in the user's file."""
