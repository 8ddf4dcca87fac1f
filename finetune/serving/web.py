"""`finetune chat --web`: a page on this machine with two models side by side, and votes.

Only a page that this program has sent can ask: requests show the token that stands in it.
"""

import json
import os
import random
import secrets
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import failures
from finetune.data.conversations import Message
from finetune.errors import UserError
from finetune.evaluation.votes import Vote
from finetune.generation.streaming import Sampling, Token
from finetune.serving import http, web_page
from finetune.serving.http import Rejected
from finetune.serving.service import Service

MOST_ROUNDS = 1_000  # that wait for a vote
TOP = 3  # tokens shown beside each token of an answer


class Turn(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str


class Question(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    token: str
    messages: list[Turn] = Field(min_length=1)
    models: Annotated[list[str], Field(min_length=2, max_length=2)]
    blind: bool = False
    probabilities: bool = False


class Choice(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    token: str
    round: str
    better: Literal["first", "second", "tie"]


@dataclass
class Round:
    """Two answers to one prompt, as they stand on the page."""

    prompt: list[dict[str, str]]
    models: list[str]
    answers: list[str] = field(default_factory=lambda: ["", ""])


class Votes:
    """A file of votes, as evaluation/votes.py reads them, to which votes are appended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        if path.exists():
            self.count = _count(path)

    def require_writable(self) -> None:
        """Raise UserError if a vote could not be written, before anybody gives one."""
        is_new = not self.path.exists()
        try:
            self.path.open("ab").close()
            if is_new:
                self.path.unlink()
        except OSError as exc:
            failures.reraise(exc, f"--votes: {self.path}: cannot be written now")
            why = exc.strerror or exc
            raise UserError(f"--votes: {self.path}: cannot be written: {why}") from exc

    def add(self, vote: Vote) -> None:
        """Append a vote and wait until it is on the disk."""
        with failures.writing(self.path), self.path.open("ab+") as file:
            if os.fstat(
                file.fileno()
            ).st_size:  # a line that a kill has cut stays, on a line of its own
                file.seek(-1, os.SEEK_END)
                file.write(b"" if file.read(1) == b"\n" else b"\n")
            file.write(vote.as_line().encode())
            file.flush()
            os.fsync(file.fileno())
        self.count += 1


def _count(path: Path) -> int:
    """Return the number of votes in a file. Raises UserError for a file of something else."""
    try:
        lines = path.read_bytes().splitlines()
        first = json.loads(lines[0]) if lines else {"better": ""}
    except (OSError, ValueError, RecursionError):
        first = None
    if not isinstance(first, dict) or "better" not in first:
        what = "exists and does not begin with a vote; choose another name"
        raise UserError(f"--votes: {path} {what}")
    return len(lines)


class Web:
    """What the handlers share."""

    def __init__(
        self, service: Service, votes: Votes, longest: int, temperature: float, system: str,
        is_blind: bool,
    ) -> None:  # fmt: skip
        self.service, self.votes = service, votes
        self.token = secrets.token_urlsafe(32)
        self.longest, self.temperature = longest, temperature
        self.system, self.is_blind = system, is_blind
        self.rounds: OrderedDict[str, Round] = OrderedDict()
        self.source = random.SystemRandom()

    def html(self) -> str:
        names = self.service.models.names
        # Base and tuned first, so that they are chosen.
        ordered = sorted(names, key=lambda name: name not in ("base", "tuned"))
        return web_page.html(
            "Base and tuned, side by side", sorted(ordered[:2]) + ordered[2:], token=self.token,
            file=str(self.votes.path), system=self.system, longest=self.longest,
            is_blind=self.is_blind,
        )  # fmt: skip

    def keep(self, round: Round) -> str:
        """Keep a round until its vote, and return its name."""
        name = secrets.token_urlsafe(16)
        self.rounds[name] = round
        while len(self.rounds) > MOST_ROUNDS:
            self.rounds.popitem(last=False)
        return name

    def vote(self, choice: Choice) -> dict[str, Any]:
        """Write a vote, and return the names of the models."""
        round = self.rounds.pop(choice.round, None)
        if round is None:
            raise Rejected(409, "this round has its vote, or is too old; ask again")
        models, answers = round.models, round.answers
        if models[0] == models[1]:
            raise Rejected(400, "both answers are of one model; choose two models and ask again")
        vote = Vote(
            "", tuple(round.prompt), (models[0], models[1]), (answers[0], answers[1]),
            choice.better,
        )  # fmt: skip
        try:
            self.votes.add(vote)
        except Exception:
            self.rounds[choice.round] = round  # such as of a full disk: the vote may be given again
            raise
        return {"names": round.models, "votes": self.votes.count}


class Handler(http.Handler):
    def get(self, path: str) -> None:
        if path != "/":
            raise Rejected(404, f"{path}: unknown; the page is {self.server.url}/")
        headers = {"X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer"}
        headers["Content-Security-Policy"] = f"{web_page.POLICY}; frame-ancestors 'none'"
        self.send(200, self._web.html(), "text/html; charset=utf-8", headers)

    def post(self, path: str, values: dict[str, Any]) -> None:
        kinds: dict[str, type[Question] | type[Choice]] = {"/ask": Question, "/vote": Choice}
        if path not in kinds:
            raise Rejected(404, f"{path}: unknown; there are /ask and /vote")
        if not secrets.compare_digest(str(values.get("token")).encode(), self._web.token.encode()):
            raise Rejected(403, "the token is not that of this server's page; load the page again")
        try:
            given = kinds[path].model_validate(values)
        except ValidationError as exc:
            first = exc.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise Rejected(400, f"{field}: {first['msg']}", field) from None
        if isinstance(given, Choice):
            self.send(200, self._web.vote(given))
        else:
            self._ask(given)

    @property
    def _web(self) -> Web:
        found: Web = self.server.owner
        return found

    def _ask(self, question: Question) -> None:
        """Let both models answer, one after the other, and send the pieces."""
        web = self._web
        models = [web.service.models.require(name) for name in question.models]
        if question.blind and web.source.random() < 0.5:
            models.reverse()
        prompt = [turn.model_dump() for turn in question.messages]
        round = Round(prompt, models)
        messages = [Message(turn.role, turn.content) for turn in question.messages]
        sampling = Sampling(
            web.longest, web.temperature, top_logprobs=TOP if question.probabilities else None
        )
        # Before anything is sent, an error can still have a status of its own.
        for side, name in enumerate(models):
            answer = web.service.chat(
                name, messages, sampling, self._listener(side, round, question)
            )
            round.answers[side] = answer.text
            self._begin(round, question)
            self.event({"side": side, "text": "", "cut": answer.finish_reason == "length"})
        can_vote = len(set(models)) == 2
        self.event({"round": web.keep(round), "can_vote": can_vote})

    def _begin(self, round: Round, question: Question) -> None:
        if not self.has_begun:
            self.begin_events()
            if not question.blind:
                self.event({"names": round.models})

    def _listener(self, side: int, round: Round, question: Question) -> Any:
        def listen(text: str, tokens: Sequence[Token]) -> None:
            self._begin(round, question)
            shown = [
                {"text": token.text, "logprob": token.logprob, "top": token.top}
                for token in tokens
            ]  # fmt: skip
            self.event({"side": side, "text": text, **({"tokens": shown} if shown else {})})

        return listen


def run(web: Web, port: int) -> None:
    """Serve the page on loopback until Ctrl-C."""
    server = http.bind("127.0.0.1", port, Handler, web)
    print(f"open {server.url}/ in a browser; votes go to {web.votes.path}", file=sys.stderr)
    server.run()
