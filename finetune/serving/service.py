"""Answers of a lineup to several threads, one answer at a time."""

import threading
from collections.abc import Sequence

from finetune.data.conversations import Message
from finetune.errors import UserError
from finetune.export.lineup import Lineup
from finetune.generation import generate, streaming
from finetune.generation.streaming import Listener, Sampling, Streamed


class TooLong(UserError):
    """A prompt leaves no position for an answer."""


class Service:
    """A lineup and its lock. A listener that raises ends its answer and frees the models."""

    def __init__(self, models: Lineup) -> None:
        self.models = models
        self._lock = threading.Lock()

    def chat(
        self, name: str, messages: Sequence[Message], sampling: Sampling, listen: Listener
    ) -> Streamed:
        """Answer a conversation. Raises UserError for one that the template does not take."""
        with self._lock:
            prompt = generate.chat_prompt(self.models.tokenizer(name), messages)
            return self._answer(name, prompt, sampling, listen)

    def complete(self, name: str, text: str, sampling: Sampling, listen: Listener) -> Streamed:
        """Continue a text."""
        with self._lock:
            return self._answer(name, text, sampling, listen)

    def _answer(self, name: str, prompt: str, sampling: Sampling, listen: Listener) -> Streamed:
        with self.models.use(name) as opened:
            ids = streaming.encoded(opened.model, opened.tokenizer, prompt)
            context = streaming.positions(opened.model)
            if not ids or len(ids) >= context:
                what = "is empty" if not ids else f"has {len(ids)} tokens"
                raise TooLong(f"the prompt {what}; the model has positions for {context} tokens")
            return streaming.stream(
                opened.model, opened.tokenizer, ids, sampling, opened.ends, listen
            )
