"""Prompts, what models answered, and how the answers score: what evaluation and rollouts share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from finetune.data.conversations import Conversation, Message

FinishReason = Literal["stop", "length", "failed"]
"""stop: the model ended the answer; length: a limit cut it; failed: no answer came."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked, with what is known of the right answer.

    messages: up to the next answer. reference: the right answer; None if the row has none. fields:
    other columns of the row, such as context, label or source.
    """

    conversation: Conversation
    reference: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.conversation.messages

    @property
    def place(self) -> str:
        return str(self.conversation.place)

    @property
    def question(self) -> str:
        """Return the text of the last message."""
        return self.messages[-1].content if self.messages else ""


@dataclass(frozen=True)
class Completion:
    """A model's answer to a prompt.

    token_ids: without the token that ended the answer; empty where a server does not give them.
    seconds: of the request, or of the batch divided by its answers. billed: tokens of the prompt
    and of the answer as a server counts them; None of a model here, or where it does not say.
    environment: the sum of rewards that an environment gave over the turns, of which `text` is the
    last and `token_ids` are all that the model wrote; None without one. why: no answer came.
    """

    prompt: Prompt
    text: str
    finish_reason: FinishReason = "stop"
    token_ids: tuple[int, ...] = ()
    seed: int | None = None
    seconds: float = 0.0
    billed: tuple[int, int] | None = None
    environment: float | None = None
    why: str = ""

    @property
    def is_cut(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True)
class Score:
    """A score of one answer. value None: it could not be computed, for the `reason`."""

    value: float | None
    reason: str = ""


def no_answer(completion: Completion) -> Score:
    """Return the gap of an answer that did not come."""
    return Score(None, f"no answer came: {completion.why}" if completion.why else "no answer came")


class Scorer(Protocol):
    """Scores answers: a rule, a model, a judge, or a function of the user.

    name: as in tables and files, in words with spaces. line: one line of documentation. higher:
    whether more is better; None where neither is, as for lengths. is_share: whether values are from
    0 to 1, shown in percent. All four are attributes, also of a frozen dataclass.
    """

    @property
    def name(self) -> str: ...
    @property
    def line(self) -> str: ...
    @property
    def higher(self) -> bool | None: ...
    @property
    def is_share(self) -> bool: ...

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """Return a score for each answer, in their order."""
        ...
