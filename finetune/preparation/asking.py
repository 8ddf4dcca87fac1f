"""Ask a model many requests: nothing twice, within a budget, with the same result after a kill.

Requests come from an iterator, whose next one may depend on replies to earlier ones. Replies come
in the order of the requests, and the request number n is made when the replies up to n - `window`
are known, whichever comes first from the server: so requests depend on replies alone, not on time.
"""

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from finetune.endpoint import Budget, Refused, Reply, Request
from finetune.lines_file import LinesFile

Tag = TypeVar("Tag")
Asked = tuple[Tag, Request]


class Model(Protocol):
    """What answers: a server, or a model on this machine."""

    identity: str
    """Another model has another one: its answers are not those of this one."""

    def submit(self, request: Request, note: Callable[[Reply], None]) -> "Future[Reply]":
        """Begin to answer. `note` gets the reply as soon as it is there, in any thread."""

    def flush(self) -> None:
        """Answer what was submitted, if nothing else does."""


def prompt_hash(request: Request) -> str:
    return _hash(request.prompt)[:16]


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()


class Answers:
    """A file of replies: each is appended, and on the disk before anything is made of it.

    A context manager: it closes the file, which stays if it holds a reply.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self._file = LinesFile(
            path, "answer of this program", "another place", note, "another --output"
        )
        lines = self._file.read(lambda values: (values["key"], _reply(values)))
        self._places = {key: place for place, (key, _) in lines}

    def known(self, key: str) -> Reply | None:
        place = self._places.get(key)
        return None if place is None else _reply(self._file.at(place))

    def append(self, key: str, request: Request, reply: Reply) -> None:
        values = asdict(reply)
        values.pop("top_logprobs")
        values.pop("tokens")
        line = {
            "key": key, "prompt_hash": prompt_hash(request), "prompt": request.prompt,
            "reply": values,
        }  # fmt: skip
        self._places[key] = self._file.append(line)

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.close()


def _reply(line: Any) -> Reply:
    """Return the reply of a line of the file. Raise what a wrong line raises."""
    reply = Reply(**line["reply"])
    numbers = (reply.tries, reply.prompt_tokens or 0, reply.completion_tokens or 0)
    texts = (line["key"], reply.text, reply.finish_reason)
    if not all(isinstance(text, str) for text in texts) or {*map(type, numbers)} != {int}:
        raise TypeError
    return reply


class Asking:
    """Requests to one model, with its answers so far and a budget.

    None instead of `answers` keeps nothing.
    """

    def __init__(self, model: Model, answers: Answers | None, budget: Budget, window: int) -> None:
        self.budget = budget
        self.has_ended = False
        """Whether the budget ended before the requests."""
        self.num_reused = 0
        self._model, self._answers, self._window = model, answers, window
        self._times: Counter[str] = Counter()
        self._num_answered = 0

    def replies(
        self, requests: "Iterator[Asked[Tag] | None]"
    ) -> "Iterator[tuple[Tag, Request, Reply | Refused]]":
        """Yield each request with its reply. None among them waits for the next reply."""
        waiting: deque[tuple[Tag, Request, Future[Reply]]] = deque()
        is_last = False
        while True:
            is_last = is_last or self._fill(requests, waiting)
            if not waiting:
                return
            tag, request, future = waiting.popleft()
            yield tag, request, self._settled(request, future)

    def _fill(
        self, requests: "Iterator[Asked[Tag] | None]",
        waiting: "deque[tuple[Tag, Request, Future[Reply]]]",
    ) -> bool:  # fmt: skip
        """Begin to ask until the window is full; return whether no request will follow."""
        while len(waiting) < self._window:
            try:
                asked = next(requests)
            except StopIteration:
                return True
            if asked is None:
                return False
            tag, request = asked
            if not self.budget.take(request):
                self.has_ended = True
                return True
            waiting.append((tag, request, self._submit(request)))
        return False

    def _submit(self, request: Request) -> "Future[Reply]":
        """Answer a request from the file, or begin to ask it."""
        content = _hash(request.body(self._model.identity))
        self._times[content] += 1
        key = f"{content}-{self._times[content]}"  # the same prompt again is another request
        reply = self._answers.known(key) if self._answers else None
        if reply is not None:
            self.num_reused += 1
            future: Future[Reply] = Future()
            future.set_result(reply)
            return future

        def note(reply: Reply) -> None:
            if self._answers:
                self._answers.append(key, request, reply)

        return self._model.submit(request, note)

    def _settled(self, request: Request, future: "Future[Reply]") -> Reply | Refused:
        if not future.done():
            self._model.flush()
        try:
            reply = future.result()
        except Refused as exc:
            if not self._num_answered:  # it may refuse all, for a setting
                raise
            self.budget.settle(request, None)
            return exc
        self._num_answered += 1
        self.budget.settle(request, reply)
        return reply
