"""A model on this machine, asked as a server is."""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from finetune.config.base import require_model
from finetune.data.conversations import Message
from finetune.endpoint import Reply, Request
from finetune.errors import ModelError
from finetune.export.load import commit_of, load, load_tokenizer, weights_in
from finetune.generation import generate


class LocalModel:
    """Answer in batches of all that is submitted before the first reply is needed."""

    def __init__(self, path: str, batch_size: int, trust_remote_code: bool) -> None:
        require_model(path, "--model")
        self._path, self._batch_size = path, batch_size
        commit = commit_of(path)
        self.identity = f"{path} {commit or weights_in(Path(path))}"
        self._tokenizer = load_tokenizer(path, trust_remote_code, commit)
        self._load: Callable[[], Any] = lambda: load(
            path, trust_remote_code=trust_remote_code, revision=commit
        )
        self._model: Any = None
        self._waiting: list[tuple[Request, Callable[[Reply], None], Future[Reply]]] = []

    def submit(self, request: Request, note: Callable[[Reply], None]) -> "Future[Reply]":
        future: Future[Reply] = Future()
        self._waiting.append((request, note, future))
        return future

    def flush(self) -> None:
        """Answer what waits. Raise ModelError without the chat template that messages need."""
        if self._model is None:  # not before: with all answers in the file it is never needed
            self._model = self._load().to("cuda" if torch.cuda.is_available() else "cpu")
        waiting, self._waiting = self._waiting, []
        prompts = [self._text(request) for request, _, _ in waiting]
        first = waiting[0][0]
        # The same prompts get the same answers, wherever an earlier start ended.
        seed = hashlib.sha256("\0".join(prompts).encode("utf-8", "replace")).digest()
        torch.manual_seed(int.from_bytes(seed[:7]))
        found = generate.answers(
            self._model, self._tokenizer, prompts, max_new_tokens=first.max_tokens,
            batch_size=self._batch_size, temperature=first.temperature or 0.0,
        )  # fmt: skip
        texts = [answer.text for answer in found]
        if self._tokenizer.chat_template:
            opening = generate.opening_of(self._tokenizer)
            texts = [generate.without_opening(text, opening) for text in texts]
        for (_, note, future), text, answer in zip(waiting, texts, found):
            reply = Reply(text, "length" if answer.is_cut else "stop")
            note(reply)
            future.set_result(reply)

    def _text(self, request: Request) -> str:
        if isinstance(request.prompt, str):
            return request.prompt
        if not self._tokenizer.chat_template:
            what = f"--model: {self._path}: its tokenizer has no chat template"
            raise ModelError(f"{what}; add --completions, which needs none")
        messages = [Message(each["role"], each["content"]) for each in request.prompt]
        return generate.chat_prompt(self._tokenizer, messages)
