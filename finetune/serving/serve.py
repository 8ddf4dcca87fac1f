"""Serve base and tuned model with OpenAI's methods, for trying: `finetune serve`.

One answer at a time, on one device. For production use a server such as vLLM: docs/serving.md.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from finetune import moderation, places
from finetune.console import visible
from finetune.export import lineup
from finetune.export.lineup import TUNED
from finetune.generation.generate import at_least
from finetune.generation.streaming import Streamed, Token
from finetune.serving import api, http
from finetune.serving.http import Rejected
from finetune.serving.service import Service, TooLong

METHODS: dict[str, type[api.ChatRequest] | type[api.TextRequest]] = {
    "/v1/chat/completions": api.ChatRequest,
    "/v1/completions": api.TextRequest,
}
MODELS = "/v1/models"


class Api:
    """What the handlers share. longest: tokens of an answer where a request sets no limit."""

    def __init__(self, service: Service, longest: int) -> None:
        self.service, self.longest = service, longest

    @property
    def names(self) -> list[str]:
        return self.service.models.names


class Handler(http.Handler):
    def get(self, path: str) -> None:
        names = self._api.names
        if path in (MODELS, MODELS + "/"):
            self.send(200, api.models(names))
        elif path.startswith(MODELS + "/"):
            name = path.removeprefix(MODELS + "/")
            self._require_model(name)
            self.send(200, api.models([name])["data"][0])
        else:
            raise self._unknown(path)

    def post(self, path: str, values: dict[str, Any]) -> None:
        if path not in METHODS:
            raise self._unknown(path)
        request = api.parsed(METHODS[path], values)
        self._require_model(request.model)
        try:
            if request.stream:
                self._stream(request)
            else:
                self._whole(request)
        except TooLong as exc:
            param = "messages" if isinstance(request, api.ChatRequest) else "prompt"
            raise Rejected(400, str(exc), param, "context_length_exceeded") from exc

    @property
    def _api(self) -> Api:
        found: Api = self.server.owner
        return found

    def _unknown(self, path: str) -> Rejected:
        return Rejected(404, f"{path}: unknown; this server has {', '.join([*METHODS, MODELS])}")

    def _require_model(self, name: str) -> None:
        if name not in self._api.names:
            what = f"the model {name!r} does not exist; there are {', '.join(self._api.names)}"
            raise Rejected(404, what, "model", "model_not_found")

    def _answers(self, request: Any, listener: Any) -> list[Streamed]:
        """Answer each prompt of a request; `listener(index)` gets the pieces of one."""
        sampling = request.sampling(self._api.longest)
        service = self._api.service
        if isinstance(request, api.ChatRequest):
            messages = [turn.message() for turn in request.messages]
            return [service.chat(request.model, messages, sampling, listener(0))]
        return [
            service.complete(request.model, text, sampling, listener(index))
            for index, text in enumerate(request.prompts)
        ]

    def _whole(self, request: Any) -> None:
        answers = self._answers(request, lambda index: self._watch)
        self.send(200, api.Shape(request).whole(answers))

    def _watch(self, text: str, tokens: Sequence[Token]) -> None:
        """End an answer that no client waits for."""
        if self.has_left():
            raise http.Gone

    def _stream(self, request: Any) -> None:
        shape = api.Shape(request)
        sent: dict[int, int] = {}

        def piece(index: int, text: str, tokens: Sequence[Token]) -> None:
            if not sent:
                self.begin_events()
            is_first = index not in sent
            offset = sent.get(index, 0)
            self.event(shape.chunk(index, text, tokens, offset, is_first=is_first))
            sent[index] = offset + len(text)

        def listener(index: int) -> Any:
            return lambda text, tokens: piece(index, text, tokens)

        answers = self._answers(request, listener)
        for index, answer in enumerate(answers):
            if index not in sent:  # an empty answer
                piece(index, "", ())
            self.event(shape.chunk(index, "", finish_reason=api.reason_of(answer)))
        if request.has_usage_chunk:
            self.event(shape.usage_chunk(answers))
        self.event("[DONE]")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lineup.add_arguments(parser)
    add = parser.add_argument
    what = "address to listen on; others than loopback let everybody there ask, without a key"
    add("--host", default="127.0.0.1", help=what)
    add("--port", type=at_least(0), default=8000, help="port; 0: any that is free")
    what = "longest answer, in tokens, where a request does not say"
    add("--max-new-tokens", type=at_least(1), default=1024, help=what)
    moderation.add_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    models = lineup.of_arguments(arguments, f"{places.command()} serve", _log)
    checks = moderation.of(arguments.moderation, arguments.trust_remote_code)
    owner = Api(Service(models, checks, _log), arguments.max_new_tokens)
    server = http.bind(arguments.host, arguments.port, Handler, owner)
    models.open(TUNED)
    if not server.is_loopback:
        what = "is not loopback: every machine that reaches it can ask, without a key"
        _log(f"note: {arguments.host} {what}")
    _log(f"{', '.join(models.names)} at {server.url}/v1, one answer at a time; Ctrl-C ends")
    server.run()


def _log(text: str) -> None:
    print(visible(text), file=sys.stderr)
