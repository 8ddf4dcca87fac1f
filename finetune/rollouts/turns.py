"""What stands between an answer and the next one, as tokens.

What came before is never rendered or tokenised again: a template may write an answer in other
tokens than the model did, or leave its thoughts out, and then other tokens would be learned than
were sampled.
"""

from collections.abc import Sequence
from typing import Any

from finetune.data import tokens
from finetune.data.control_tokens import ControlTokens
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.templates import Template
from finetune.errors import ConfigError, DataError

SOURCE = Place("the environment", 1)


class Turns:
    """Tokenises what an environment says, by the template of the run.

    `special_tokens_in_text`: as data has it. Raises ConfigError for a template whose answers no
    token ends, or that takes no second question.
    """

    def __init__(self, template: Template, tokenizer: Any, special_tokens_in_text: str) -> None:
        control = ControlTokens(tokenizer, template.turn_ends)
        self._checked = control.as_text if special_tokens_in_text == "text" else control.refuse
        self._template, self._tokenizer = template, tokenizer
        try:
            self.between([Message("user", "a")])
        except DataError as exc:
            raise ConfigError(f"objective.rollouts.environment: {exc}") from exc

    def between(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens from the end of an answer to where the next one begins.

        Without the token that ends the answer, as the model wrote it. Raises DataError if the
        template does not take the messages.
        """
        messages = self._checked(Conversation(tuple(messages), SOURCE)).messages
        end, text = self._template.after_answer(messages, SOURCE)
        ids = tokens.encode_prompt(end + text, self._tokenizer)
        # The end is a token of its own, so what stands behind it has the tokens of a whole text.
        end_id = self._tokenizer.convert_tokens_to_ids(end)
        if end_id not in ids:
            raise DataError(f"{SOURCE}: the tokenizer reads {end!r}, the end of answers, as text")
        return ids[ids.index(end_id) + 1 :]
