"""Answers of a lineup to several threads, one answer at a time."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune.data.conversations import Message
from finetune.errors import UserError
from finetune.export.lineup import Lineup
from finetune.generation import generate, streaming
from finetune.generation.streaming import Listener, Sampling, Streamed
from finetune.moderation import OFF, Moderation


class TooLong(UserError):
    """A prompt leaves no position for an answer."""


class Service:
    """A lineup and its lock. A listener that raises ends its answer and frees the models.

    With moderation, answers are passed on as a whole, after they have passed it.
    """

    def __init__(
        self, models: Lineup, moderation: Moderation = OFF,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.models, self._moderation, self._log = models, moderation, log
        self._lock = threading.Lock()

    def chat(
        self, name: str, messages: Sequence[Message], sampling: Sampling, listen: Listener
    ) -> Streamed:
        """Answer a conversation. Raises UserError for one that the template does not take."""
        asked = next((m.content for m in reversed(messages) if m.role == "user"), "")
        with self._lock:
            prompt = generate.chat_prompt(self.models.tokenizer(name), messages)
            return self._moderated(asked, name, prompt, sampling, listen)

    def complete(self, name: str, text: str, sampling: Sampling, listen: Listener) -> Streamed:
        """Continue a text."""
        with self._lock:
            return self._moderated(text, name, text, sampling, listen)

    def _moderated(
        self, asked: str, name: str, prompt: str, sampling: Sampling, listen: Listener
    ) -> Streamed:
        if not self._moderation:
            return self._answer(name, prompt, sampling, listen)
        given = Streamed("", "stop", 0, 0)
        found = self._moderation.find(asked, "input")
        if not found:
            given = self._answer(name, prompt, sampling, lambda text, tokens: None)
            found = self._moderation.find(given.text, "output")
        if found:
            self._log(f"refused: {found.reason}")
            given = replace(given, text=found.refusal, is_refused=True, tokens=())
        listen(given.text, given.tokens)
        return given

    def _answer(self, name: str, prompt: str, sampling: Sampling, listen: Listener) -> Streamed:
        with self.models.use(name) as opened:
            ids = generate.encode(opened.model, opened.tokenizer, prompt)
            context = generate.positions(opened.model)
            if not ids or len(ids) >= context:
                what = "is empty" if not ids else f"has {len(ids)} tokens"
                raise TooLong(f"the prompt {what}; the model has positions for {context} tokens")
            return streaming.stream(
                opened.model, opened.tokenizer, ids, sampling, opened.ends, listen
            )
