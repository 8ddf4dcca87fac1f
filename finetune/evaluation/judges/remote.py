"""A judge at an OpenAI-compatible server: its options from the likeliest tokens that it returns."""

import math
from collections.abc import Sequence
from concurrent.futures import Future, as_completed

from finetune.endpoint import Client, Refused, Reply, Request
from finetune.errors import UserError
from finetune.evaluation.judges.weights import Note, Question, Weights, of_tokens

TOP = 20  # tokens at most that OpenAI and vLLM return
SLACK = 1e-3


class RemoteJudge:
    """A model behind an endpoint.Client, which the caller opens and closes."""

    def __init__(self, client: Client) -> None:
        self.name = client.server.model
        self.identity = f"{client.server.url} {client.server.model}"
        self._client = client

    def write(self, prompt: str, max_tokens: int) -> str:
        reply = self._client.ask(Request(_messages(prompt), max_tokens))
        if reply.missing:
            raise UserError(f"{self.identity}: no answer: {reply.missing}; use another judge")
        return reply.text

    def weigh(self, questions: Sequence[Question], note: Note) -> None:
        asked: dict[Future[Reply], int] = {}
        for number, each in enumerate(questions):
            asked[self._client.submit(request_of(each), lambda reply: None)] = number
        refused: dict[int, Refused] = {}
        try:
            for future in as_completed(asked):
                try:
                    note(asked[future], weights_of(future.result(), questions[asked[future]]))
                except Refused as exc:
                    refused[asked[future]] = exc
        finally:
            for future in asked:
                future.cancel()
        for number, refusal in refused.items():
            if len(refused) == len(questions):  # a setting, not a single prompt
                raise refusal
            note(number, Weights({}, 0.0, "", str(refusal)))


def request_of(question: Question) -> Request:
    """Ask for one token with its alternatives.

    The temperature is 1: some servers divide log-probabilities by it.
    """
    return Request(_messages(question.prompt), 1, temperature=1.0, top_logprobs=TOP)


def weights_of(reply: Reply, question: Question) -> Weights:
    """Return how a judge's reply weighs the options."""
    if not reply.top_logprobs:
        return Weights({}, 0.0, "", "the judge's answer is empty")
    given = reply.top_logprobs[0].items()
    # Rounding lifts some over 0. More, or NaN, cannot be a log-probability.
    chances = {token: math.exp(min(value, 0.0)) for token, value in given if value < SLACK}
    return of_tokens(chances, question.options)


def _messages(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]
