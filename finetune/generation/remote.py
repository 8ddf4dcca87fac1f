"""A model behind an OpenAI-compatible server, such as vLLM, by the interface of engines."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed

from finetune.endpoint import Client, Refused, Request, Server
from finetune.errors import UserError
from finetune.generation import generate
from finetune.generation.completions import Completion, FinishReason, Prompt
from finetune.generation.engines import Decoding


def is_remote(name: str) -> bool:
    """Return whether a name is MODEL@URL."""
    return "@http://" in name or "@https://" in name


class Remote:
    """A server's model. name: MODEL@URL. system_prompt: of conversations that have none.

    The server renders prompts by its own chat template.
    """

    def __init__(
        self, name: str, system_prompt: str | None = None, key_variable: str | None = None,
        at_once: int = 8, log: Callable[[str], None] = generate.log, title: str = "asking",
    ) -> None:  # fmt: skip
        model, _, url = name.partition("@")
        if not model:
            raise UserError(f"{name}: names no model; write MODEL@URL, as my-model{name}")
        self._server = Server(url, model, key_variable, at_once=at_once)
        self._system, self._log, self._title = system_prompt, log, title
        self.identity = f"{name} {system_prompt or ''}".strip()

    def asked(self, prompt: Prompt) -> str:
        return json.dumps(self._messages(prompt))

    def _messages(self, prompt: Prompt) -> list[dict[str, str]]:
        messages = [
            {
                "role": each.role,
                "content": "\n\n".join(part for part in (each.content, each.context) if part),
            }
            for each in prompt.messages
        ]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return messages

    def complete(
        self, prompts: Sequence[Prompt], decoding: Decoding, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield answers as they come. What the server refuses is a completion that failed."""
        chosen = list(range(len(prompts)) if wanted is None else wanted)
        last = time.monotonic()
        with (
            Client(self._server, self._log) as client,
            generate.progress(self._title, len(chosen), self._log) as note,
        ):
            futures = {}
            for number in chosen:
                request = Request(
                    self._messages(prompts[number]), decoding.max_new_tokens, decoding.temperature
                )
                futures[client.submit(request, lambda reply: None)] = number
            for future in as_completed(futures):
                number = futures[future]
                note(1)
                try:
                    reply = future.result()
                    missing = reply.missing
                except Refused as exc:
                    missing = str(exc)
                if missing:
                    self._log(f"note: {prompts[number].place}: no answer: {missing}")
                    yield number, Completion(prompts[number], "", "failed", why=missing)
                    continue
                reason: FinishReason = "length" if reply.is_cut else "stop"
                now = time.monotonic()
                billed = None
                if reply.prompt_tokens is not None and reply.completion_tokens is not None:
                    billed = reply.prompt_tokens, reply.completion_tokens
                yield (
                    number,
                    Completion(
                        prompts[number], reply.text, reason, seconds=now - last, billed=billed
                    ),
                )
                last = now
