"""Talk to a model in the terminal, and switch between base, tuned and further models."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune import moderation, page, places
from finetune.config import paths
from finetune.config.kinds import temperature_argument
from finetune.console import visible
from finetune.data.conversations import Message
from finetune.data.templates import PROMPT, QUESTION
from finetune.errors import DataError, FinetuneError, ModelError, UserError
from finetune.export import lineup
from finetune.export.lineup import BASE, TUNED, Lineup
from finetune.generation import generate, streaming
from finetune.generation.streaming import Sampling, Token
from finetune.serving import web
from finetune.serving.service import Service
from finetune.serving.web import Votes, Web

PORT = 8001
TOP = 3  # tokens shown beside each token of an answer
COMMANDS = {
    "/base": "answer by the base",
    "/tuned": "answer by the tuned model",
    "/model NAME": "answer by the model of this name; without a name, list them",
    "/drop NAME": "delete a model of --also from memory",
    "/system TEXT": "set the system message, without a text remove it; begins a new conversation",
    "/retry": "answer the last message again, perhaps by another model",
    "/probs": "show the probability of each token after an answer, or stop showing it",
    "/help": "list the commands",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    lineup.add_arguments(parser)
    add("--prompt", default=None, help="answer this one message and end")
    add("--system", default=None, help="system message")
    add("--max-new-tokens", type=generate.at_least(1), default=256, help="longest answer")
    what = "sampling temperature; 0: always take the likeliest token"
    add("--temperature", type=temperature_argument, default=0.0, help=what)
    add("--one-turn", action="store_true", help="forget each message before the next")
    what = f"after each answer show the probabilities of its tokens and of the {TOP} likeliest"
    add("--probs", action="store_true", help=what)
    moderation.add_argument(parser)
    what = "open a page on this machine instead, with two models side by side, and votes"
    add("--web", action="store_true", help=what)
    add("--blind", action="store_true", help="with --web: draw the sides, name them after a vote")
    what = "with --web: a .jsonl file that votes are added to (default: votes.jsonl)"
    add("--votes", type=paths.argument, default=None, metavar="FILE", help=what)
    what = f"with --web: port of the page; 0: any that is free (default: {PORT})"
    add("--port", type=generate.at_least(0), default=None, help=what)


def require_system(tokenizer: Any, start: list[Message]) -> None:
    """Raise ModelError if the chat template takes no system message, or needs one."""
    try:
        generate.chat_prompt(tokenizer, [*start, *QUESTION])
    except DataError as exc:
        other = [] if start else [Message("system", "a")]
        try:
            generate.chat_prompt(tokenizer, [*other, *QUESTION])
        except DataError:
            raise exc from None  # the system message is not the reason
        takes, remedy = ("takes no", "remove it") if start else ("needs a", "give one")
        reason = str(exc).removeprefix(f"{PROMPT}: ")
        raise ModelError(
            f"--system: the model's chat template {takes} system message ({reason}); {remedy}"
        ) from exc


def main(arguments: argparse.Namespace) -> None:
    """Answer --prompt, or the lines that the user types, or open the page of --web."""
    _require_no_other(arguments)
    votes = Votes(Path(arguments.votes or "votes.jsonl")) if arguments.web else None
    if votes:
        votes.require_writable()
    models = lineup.of_arguments(arguments, f"{places.command()} chat", _log)
    chat = Chat(models, arguments)
    require_system(models.tokenizer(TUNED), chat.start)
    if votes:
        _open_page(models, votes, arguments)
        return
    models.open(TUNED)
    if arguments.prompt is not None:
        chat.ask(arguments.prompt)
        return
    _log("An empty line starts a new conversation, /help lists the commands, Ctrl-D ends.")
    while True:
        try:
            text = input("> ")
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if text.startswith("/"):
                chat.obey(text)
                continue
            if not text.strip() or arguments.one_turn:
                chat.forget()
            if text.strip():
                chat.ask(text.strip())
        except FinetuneError as exc:
            _log(str(exc))
        except KeyboardInterrupt:
            _log("\nstopped, and forgotten; Ctrl-D ends")


def _require_no_other(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option that would be ignored, with --web or without it."""
    options = ("prompt", "one_turn", "probs") if arguments.web else ("blind", "votes", "port")
    for option in options:
        if getattr(arguments, option) not in (None, False):
            where = "in the terminal, not with --web" if arguments.web else "with --web"
            what = f"--{option.replace('_', '-')}: only {where}"
            raise UserError(f"{what}; remove one of the two" if arguments.web else what)


def _open_page(models: Lineup, votes: Votes, arguments: argparse.Namespace) -> None:
    if len(models.names) < 2:
        raise ModelError(
            f"--web compares two models, and the base of {models.paths[TUNED]} is not known; name "
            "another one with --also"
        )
    for name in models.names[:2]:
        models.open(name)
    limit, temperature = arguments.max_new_tokens, arguments.temperature
    system = arguments.system or ""
    checks = moderation.of(arguments.moderation, arguments.trust_remote_code)
    owner = Web(Service(models, checks, _log), votes, limit, temperature, system, arguments.blind)
    web.run(owner, PORT if arguments.port is None else arguments.port)


class Chat:
    """A conversation with one model of a lineup at a time; it goes on when the model changes."""

    def __init__(self, models: Lineup, arguments: argparse.Namespace) -> None:
        self.models, self.name = models, TUNED
        self.system: str | None = arguments.system
        self.shows_probabilities: bool = arguments.probs
        self._limit, self._temperature = arguments.max_new_tokens, arguments.temperature
        self._moderation = moderation.of(arguments.moderation, arguments.trust_remote_code)
        self.messages = self.start

    @property
    def start(self) -> list[Message]:
        return [Message("system", self.system)] if self.system is not None else []

    def forget(self) -> None:
        self.messages = self.start

    def ask(self, text: str) -> None:
        """Print the answer to a message as it is written, and keep both, or neither if it fails."""
        before = self.messages
        self.messages = [*before, Message("user", text)]
        try:
            self.messages.append(Message("assistant", self._answer()))
        except BaseException:
            self.messages = before
            raise

    def obey(self, line: str) -> None:
        """Run a command, or say in one line why it cannot be run."""
        word, _, rest = line.partition(" ")
        known: dict[str, Callable[[str], None]] = {
            "/base": lambda rest: self._switch(BASE), "/tuned": lambda rest: self._switch(TUNED),
            "/model": self._switch, "/drop": self._drop, "/system": self._set_system,
            "/retry": self._retry,
            "/probs": self._toggle_probabilities, "/help": self._help,
        }  # fmt: skip
        if word not in known:
            _log(f"{word} is not a command; /help lists them; a message may begin with a space")
            return
        try:
            known[word](rest.strip())
        except FinetuneError as exc:
            _log(str(exc))

    # --------------------------------------------------------------------------- commands

    def _switch(self, name: str) -> None:
        if not name:
            _log(f"models: {', '.join(self.models.names)}; now {self.name}")
            return
        self.models.open(name)
        self.name = name
        _log(f"now {name}: {self.models.paths[name]}")

    def _drop(self, name: str) -> None:
        self.models.drop(name)
        self.name = TUNED if self.name == name else self.name
        _log(f"{name} is dropped; now {self.name}")

    def _set_system(self, text: str) -> None:
        start = [Message("system", text)] if text else []
        require_system(self.models.tokenizer(self.name), start)
        self.system = text or None
        self.forget()
        _log("system message set; a new conversation" if text else "no system message")

    def _retry(self, rest: str) -> None:
        asked = [number for number, each in enumerate(self.messages) if each.role == "user"]
        if not asked:
            _log("/retry: there is nothing to answer yet; type a message")
            return
        before = self.messages
        self.messages = before[: asked[-1]]
        try:
            self.ask(before[asked[-1]].content)
        except BaseException:
            self.messages = before
            raise

    def _toggle_probabilities(self, rest: str) -> None:
        self.shows_probabilities = not self.shows_probabilities
        _log(f"probabilities are {'shown' if self.shows_probabilities else 'not shown'}")

    def _help(self, rest: str) -> None:
        for command, what in COMMANDS.items():
            _log(f"{command:<13} {what}")

    # ----------------------------------------------------------------------------- answers

    def _answer(self) -> str:
        """Return the answer, or the refusal of moderation, which sees it before it is printed."""
        asked = self.messages[-1].content
        found = self._moderation.find(asked, "input")
        text = "" if found else self._generated()
        found = found or self._moderation.find(text, "output")
        if found:
            _log(f"refused: {found.reason}")
        if self._moderation:
            _print((found.refusal if found else text) + "\n", None)
        return found.refusal if found else text

    def _generated(self) -> str:
        prompt = generate.chat_prompt(self.models.tokenizer(self.name), self.messages)
        with self.models.use(self.name) as opened:
            limit = self._limit
            ids, note = streaming.fitted(opened.model, opened.tokenizer, prompt, limit)
            if note:
                _log(note)
            # Of an answer that moderation may refuse nothing is shown before.
            top = TOP if self.shows_probabilities and not self._moderation else None
            sampling = Sampling(limit, self._temperature, top_logprobs=top)
            listen = (lambda text, tokens: None) if self._moderation else _print
            given = streaming.stream(
                opened.model, opened.tokenizer, ids, sampling, opened.ends, listen
            )
        if not self._moderation:
            print()
        if given.finish_reason == "length":
            _log(f"note: the answer was cut after {limit} tokens; see --max-new-tokens")
        for token in given.tokens:
            print(shown(token))
        return given.text


def _print(text: str, tokens: object) -> None:
    """Print a part of an answer: visibly on a terminal, which would obey it, as it is elsewhere."""
    print(visible(text) if sys.stdout.isatty() else text, end="", flush=True)


def shown(token: Token) -> str:
    """Return one line: a token, its probability, and the likeliest tokens with theirs."""
    top = "  ".join(f"{_visible(text)} {_percent(value)}" for text, value in token.top)
    return f"{_percent(token.logprob):>7}  {_visible(token.text):<16}  of {top}"


def _percent(logprob: float) -> str:
    return f"{math.exp(logprob):.1%}"


def _visible(text: str) -> str:
    return page.plain(repr(text))


def _log(text: str) -> None:
    print(visible(text), file=sys.stderr)
