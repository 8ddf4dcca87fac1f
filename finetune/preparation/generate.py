"""Make rows with another model: new tasks like given ones, or answers to given prompts.

    finetune data generate seeds.jsonl --rows 1000 --output new.jsonl \\
        --endpoint http://localhost:8000/v1 --model my-teacher
    finetune data generate --prompts prompts.jsonl --output answers.jsonl --model folder
    finetune data generate --from-report request.json --output new.jsonl ...

SEEDS are rows of one question and one answer. Each request shows some of them and asks for more
(--template has the prompt); a question with ROUGE-L over 0.7 to a known one is refused. --prompts
are questions in any format, whose new answers are kept as conversations. --from-report is the
request for more data that an evaluation writes.

Rows leave this machine only with --endpoint. Every answer is kept in OUTPUT.answers when it comes:
after a kill, or when a budget has ended, the same command goes on and asks nothing twice. New rows
have the columns origin (generated), model and prompt_hash.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from finetune.config import paths
from finetune.config.base import model_argument
from finetune.config.kinds import temperature_argument
from finetune.data import preferences
from finetune.data.conversations import Message
from finetune.data.formats import detect, to_conversation, with_system
from finetune.data.places import Row
from finetune.data.problems import Problems
from finetune.endpoint import Budget, Client, Refused, Reply, Request, Server
from finetune.errors import DataError, FinetuneError, UserError
from finetune.preparation import frame as frames
from finetune.preparation import growing, request, tasks, texts
from finetune.preparation.asking import Answers, Asking, Model, prompt_hash
from finetune.preparation.frame import Frame
from finetune.preparation.growing import Growing, Part
from finetune.preparation.output import PIPE
from finetune.preparation.tasks import Prompts, Task

WINDOW = 16  # requests under way at most, as requests depend on the replies before these
ORIGIN, GENERATED = "origin", "generated"
OWN_COLUMNS = (ORIGIN, "model", "prompt_hash")
# Options that would be ignored without what they are for, and their defaults.
FOR_SERVER = {
    "key": None, "most_money": None, "price": None, "retries": 6, "timeout": 300.0,
}  # fmt: skip
FOR_TASKS = {
    "template": None, "two_steps": False, "per_request": 5, "threshold": 0.7, "seed": 0,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "rows of one question and one answer, in any type that training reads"
    add("inputs", nargs="*", metavar="SEEDS", type=paths.argument, help=what)
    what = "answer these prompts instead; may be given several times"
    add("--prompts", action="append", default=None, type=paths.argument, metavar="ROWS", help=what)
    what = "make the rows that this request for more data asks for (configs/request.json)"
    add("--from-report", type=paths.argument, metavar="FILE", help=what)
    frames.add_output(parser)
    frames.add_rejects(parser)
    frames.add_format(parser)
    add("--rows", type=frames.positive, metavar="N", help="how many new rows to make of SEEDS")
    what = "tasks to ask for in each request"
    add("--per-request", type=frames.positive, metavar="N", help=_default("per_request", what))
    what = "ask for questions, and then for the answer to each (Self-Instruct)"
    add("--two-steps", action="store_true", help=f"{what}; without it for both at once (Alpaca)")
    what = f"prompt that asks for tasks, a Jinja file (default: {tasks.TEMPLATE.name} of this "
    add("--template", type=paths.argument, metavar="FILE", help=f"{what}package)")
    what = "ROUGE-L over which a question is too much like a known one"
    add("--threshold", type=frames.fraction, help=_default("threshold", what))
    add("--system", metavar="TEXT", help="system message of each request")
    add("--max-tokens", type=frames.positive, default=1_024, help="longest answer")
    what = "temperature, or none for the server's own (default: 1 for tasks, 0 for --prompts)"
    add("--temperature", type=_temperature, default=argparse.SUPPRESS, metavar="T", help=what)
    add("--seed", type=int, help=_default("seed", "another seed shows other SEEDS together"))
    _add_model(parser)


def _default(name: str, what: str) -> str:
    return f"{what} (default: {(FOR_SERVER | FOR_TASKS)[name]})"


def _add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "model of the endpoint; without one a run directory, folder or Hub id on this machine"
    add("--model", required=True, metavar="NAME", help=what)
    what = "URL of an OpenAI-compatible server, such as http://localhost:8000/v1; it gets the rows"
    add("--endpoint", metavar="URL", help=what)
    what = "environment variable that holds the key (default: OPENAI_API_KEY for OpenAI's own "
    add("--key", metavar="VARIABLE", help=f"{what}server, none for any other)")
    add("--completions", action="store_true", help="ask for completions of text, not for chat")
    what = "requests in flight, or answers of a batch"
    add("--at-once", type=frames.positive, default=8, metavar="N", help=what)
    what = "further tries of a request that fails"
    add("--retries", type=_whole, help=_default("retries", what))
    what = "for a whole answer"
    add("--timeout", type=_amount, metavar="SECONDS", help=_default("timeout", what))
    what = "stop after this many requests, those of earlier starts included"
    add("--most-requests", type=frames.positive, metavar="N", help=what)
    what = "stop before the answers cost more than this, at --price"
    add("--most-money", type=_amount, metavar="AMOUNT", help=what)
    what = "price of a million tokens of prompts, and of answers, as 0.15,0.6"
    add("--price", type=_price, metavar="IN,OUT", help=what)
    what = "run Python code from the model's Hub repository"
    add("--trust-remote-code", action="store_true", help=what)


def _temperature(text: str) -> float | None:
    return None if text == "none" else temperature_argument(text)


def _amount(text: str, least: float = 1e-9) -> float:
    with contextlib.suppress(ValueError):
        if least <= (value := float(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} should be a number, at least {least:g}")


def _whole(text: str) -> int:
    if text.isdecimal() and text.isascii():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} should be a whole number")


def _price(text: str) -> tuple[float, float]:
    prices = [_amount(part, least=0.0) for part in text.split(",")]
    if len(prices) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} should be two numbers, as 0.15,0.6")
    return prices[0], prices[1]


class Work(Protocol):
    """Requests, and the rows that their replies make."""

    def requests(self) -> "Iterator[tuple[Any, Request] | None]": ...

    def take(
        self, tag: Any, request: Request, reply: Reply | Refused
    ) -> "Iterator[dict[str, Any]]": ...


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    _require(arguments)
    for name, value in (FOR_SERVER | FOR_TASKS).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    wanted, work = _work(frame, arguments)
    with contextlib.ExitStack() as stack:
        answers = stack.enter_context(_answers(frame, arguments))
        budget = Budget(arguments.most_requests, arguments.most_money, arguments.price or (0, 0))
        model = stack.enter_context(_model(frame, arguments))
        window = max(WINDOW, arguments.at_once)
        asking = Asking(model, answers, budget, window)
        write = stack.enter_context(frame.writing())
        bar = tqdm(
            total=wanted, desc="generating", unit=" rows", disable=None, leave=False, delay=1
        )
        with bar:
            for tag, asked, reply in asking.replies(work.requests()):
                for values in work.take(tag, asked, reply):
                    own = (GENERATED, arguments.model, prompt_hash(asked))
                    write(values | dict(zip(OWN_COLUMNS, own)), f"answer {budget.num_requests}")
                    bar.update()
        _report(frame, arguments, asking, wanted)
        if not frame.written and budget.num_requests:
            raise FinetuneError(_nothing(frame, budget))  # before an older output is replaced


def _require(arguments: argparse.Namespace) -> None:
    """Raise UserError for options that do not go together."""
    given = {
        "SEEDS": bool(arguments.inputs), "--prompts": arguments.prompts is not None,
        "--from-report": arguments.from_report is not None,
    }  # fmt: skip
    if sum(given.values()) != 1:
        named = " and ".join(name for name, is_there in given.items() if is_there)
        what = f"{named} exclude each other" if named else "nothing to begin with"
        raise UserError(f"{what}; give one of {', '.join(given)}")
    if bool(arguments.inputs) != (arguments.rows is not None):
        what = "says how many rows to make of SEEDS"
        how = "add it" if arguments.inputs else "remove it, as there are none"
        raise UserError(f"--rows {what}; {how}")
    if arguments.prompts is not None:
        _refuse(arguments, FOR_TASKS, "new tasks, not for --prompts; remove it")
    if not arguments.endpoint:
        _refuse(arguments, FOR_SERVER, "an --endpoint; add one, or remove it")
    elif arguments.trust_remote_code:
        raise UserError("--trust-remote-code is for a model on this machine; remove it")
    if arguments.format != "auto" and not arguments.inputs:
        raise UserError("--format is for SEEDS; remove it, and map --columns where names differ")
    if arguments.columns and arguments.from_report:
        raise UserError("--columns is for SEEDS and --prompts; remove it")
    if arguments.most_money is not None and arguments.price is None:
        raise UserError("--most-money needs --price: of a million tokens of prompts and of answers")


def _refuse(arguments: argparse.Namespace, options: Mapping[str, Any], what: str) -> None:
    """Raise UserError for the first of these options that is given; `what` they are for."""
    for option in options:
        given = getattr(arguments, option)
        if given is not None and given is not False:  # 0 is given
            raise UserError(f"--{option.replace('_', '-')} is for {what}")


def _answers(
    frame: Frame, arguments: argparse.Namespace
) -> contextlib.AbstractContextManager[Answers | None]:
    if arguments.output == PIPE:
        frame.note("--output - keeps no answers: after a kill all would be asked again")
        return contextlib.nullcontext()
    return Answers(Path(f"{arguments.output}.answers"), frame.note)


@contextlib.contextmanager
def _model(frame: Frame, arguments: argparse.Namespace) -> Iterator[Model]:
    """Yield what answers: the server that is named, or else a model on this machine."""
    if not arguments.endpoint:
        from finetune.preparation.local_model import LocalModel

        path = model_argument(arguments.model)
        yield LocalModel(path, arguments.at_once, arguments.trust_remote_code)
        return
    server = Server(
        arguments.endpoint, arguments.model, arguments.key, arguments.at_once, arguments.retries,
        arguments.timeout,
    )  # fmt: skip
    with Client(server, lambda text: frame.note(text.removeprefix("note: "))) as client:
        yield client


def _work(frame: Frame, arguments: argparse.Namespace) -> tuple[int | None, Work]:
    """Return how many rows are wanted, where that is known, and how they come about."""
    is_prompts = arguments.prompts is not None
    temperature = getattr(arguments, "temperature", 0.0 if is_prompts else 1.0)

    def make(messages: list[dict[str, str]]) -> Request:
        if arguments.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": arguments.system}, *messages]
        prompt: Any = messages
        if arguments.completions:
            prompt = "\n\n".join(message["content"] for message in messages)
        return Request(prompt, arguments.max_tokens, temperature)

    if is_prompts:
        frame.sources = frame.expanded(arguments.prompts, "--prompts")
        frame.unit = "prompts"
        answering = Answering(frame, arguments.columns, make)
        return answering.check(), answering
    if arguments.from_report:
        frame.unit = "slices"
        parts = _slices(arguments.from_report)
        frame.read = len(parts)
    else:
        parts = [Part(_seeds(frame, arguments), arguments.rows)]
    prompts = Prompts(arguments.template, arguments.per_request, not arguments.two_steps)

    def ask(text: str, is_answer: bool) -> Request:
        if arguments.completions and not is_answer:
            text += "\n\nQuestion:"
        return make([{"role": "user", "content": text}])

    work = Growing(
        parts, prompts, arguments.threshold, arguments.per_request, arguments.two_steps,
        arguments.seed, ask, frame.drop,
    )  # fmt: skip
    return sum(part.count for part in parts), work


def _seeds(frame: Frame, arguments: argparse.Namespace) -> list[Task]:
    """Return the seeds. Raise DataError that lists all wrong rows."""
    seeds, problems = list[Task](), Problems()
    for row in frame.rows():
        with problems.noted(row):
            seeds.append(_seed(row, arguments))
    problems.num_rows = frame.read
    problems.raise_if_any()
    if not seeds:
        raise DataError("SEEDS: none of the files holds a row; is it the right file?")
    return seeds


def _seed(row: Row, arguments: argparse.Namespace) -> Task:
    """Return a row as a task. Raise DataError unless it is one question and one answer."""
    columns, format = arguments.columns, arguments.format
    format = detect(row, columns, for_training=False) if format == "auto" else format
    messages = to_conversation(row, format, columns, None, for_training=False).messages
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"]:
        what = f"{', '.join(roles[:6])} are not one question and one answer"
        raise DataError(f"{row.place}: {what}, as seeds are; leave out the row")
    question = "\n\n".join(filter(None, (messages[0].content, messages[0].context)))
    return Task(question, messages[1].content)


def _slices(path: str) -> list[Part]:
    return [
        Part(
            [Task(each.prompt, each.reference or "", each.answer or "") for each in one.examples],
            one.count, one,
        )
        for one in request.read(path).slices
    ]  # fmt: skip


class Answering:
    """A request for each prompt; its row is the conversation with the new answer."""

    def __init__(
        self, frame: Frame, columns: dict[str, str],
        make: Callable[[list[dict[str, str]]], Request],
    ) -> None:  # fmt: skip
        self._frame, self._columns, self._make = frame, columns, make

    def check(self) -> int:
        """Return the number of prompts. Raise DataError that lists all wrong rows."""
        problems = Problems()
        for row in self._frame.rows(title="checking"):
            problems.num_rows += 1
            with problems.noted(row):
                self._asked(row)
        problems.raise_if_any()
        return problems.num_rows

    def requests(self) -> "Iterator[tuple[Any, Request]]":
        for row in self._frame.rows(title="asking"):
            messages, read = self._asked(row)
            turns = [
                {"role": each.role,
                 "content": "\n\n".join(filter(None, (each.content, each.context)))}
                for each in messages
            ]  # fmt: skip
            yield (row, turns, read), self._make(turns)

    def _asked(self, row: Row) -> tuple[list[Message], set[str]]:
        """Return the turns up to the answer, and the columns that they are from."""
        messages, read = preferences.question_of(row, self._columns)
        text = self._columns.get("text", "text")
        if not messages and isinstance(row.values.get(text), str):  # a line of a text file
            messages, read = [Message("user", row.values[text])], {text}
        column = self._columns.get("system", "system")
        system = next((name for name in (column, "system_prompt") if name in row.values), None)
        while messages and messages[-1].role == "assistant":
            messages = messages[:-1]
        if not messages or not any(message.role == "user" for message in messages):
            what = f"no prompt; it has {list(row.values)[:20]}"
            raise DataError(f"{row.place}: {what}; map one with --columns 'prompt: NAME'")
        if any(message.parts for message in messages):
            raise DataError(f"{row.place}: has tools or their calls; leave out the row")
        read |= {system} if system else set()
        if taken := [name for name in OWN_COLUMNS if name in row.values.keys() - read]:
            what = f"column {taken[0]!r} would be replaced; rename or remove it first"
            raise DataError(f"{row.place}: {what}")
        return with_system(row, system, messages), read

    def take(
        self, tag: Any, request: Request, reply: Reply | Refused
    ) -> "Iterator[dict[str, Any]]":
        row, turns, read = tag
        if reason := growing.problem(reply):
            why = {"why": str(reply)} if isinstance(reply, Refused) else {}
            self._frame.drop(row, reason, **why)
        elif isinstance(reply, Reply):
            answer = {"role": "assistant", "content": reply.text.strip()}
            made = {"messages": [*turns, answer]}
            left_out = read | texts.COLUMNS
            kept = {name: value for name, value in row.values.items() if name not in left_out}
            yield made | kept


def _nothing(frame: Frame, budget: Budget) -> str:
    why = ", ".join(f"{count:,} {reason}" for reason, count in frame.dropped.most_common())
    asked = f"{budget.num_requests:,} requests made no row: {why or 'no reply held one'}"
    output = frame.arguments.output
    return asked if output == PIPE else f"{asked}; {output}.answers has the replies"


def _report(
    frame: Frame, arguments: argparse.Namespace, asking: Asking, wanted: int | None
) -> None:
    """Say what it took, and why there are fewer rows than wanted."""
    budget = asking.budget
    frame.changed["requests"] = budget.num_requests
    if asking.num_reused:
        frame.changed["answers of earlier starts"] = asking.num_reused
    frame.details |= {"requests": budget.num_requests, "stopped": None}
    if arguments.endpoint:
        tokens = {"prompt": budget.prompt_tokens, "answer": budget.completion_tokens}
        frame.changed["tokens of prompts"] = budget.prompt_tokens
        frame.changed["tokens of answers"] = budget.completion_tokens
        frame.details |= {"tokens": tokens, "money": budget.spent if arguments.price else None}
    if arguments.price:
        frame.note(f"the answers cost {budget.spent:.4f}")
    if asking.has_ended:
        frame.details["stopped"] = "budget"
        what = f"the budget ended after {budget.num_requests:,} requests"
        frame.note(f"{what}; the same command with a larger one, and --force, goes on")
    elif wanted is not None and not arguments.prompts and frame.written < wanted:
        frame.details["stopped"] = "repeats"
        what = f"{growing.MOST_FRUITLESS} requests in a row brought no new task"
        frame.note(f"{what}: {frame.written:,} of {wanted:,} rows; give more seeds")
