"""Make conversations of support tickets: each ticket with an answer of an agent is a row.

Reads tables or rows with a message each (columns for ticket, author, text, perhaps time), and rows
with a ticket each that hold a list of messages (comments, as Zendesk exports them). Quoted replies
and signatures of e-mails are cut off. Use scrub afterwards: tickets are full of personal data.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from finetune.data.places import Row, short
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation.clean import without_markup
from finetune.preparation.frame import Frame
from finetune.preparation.threads import Post, conversation

# What a column is usually called; the first that a row has counts.
TICKET = "ticket_id ticket case_id case conversation_id thread_id issue_id request_id".split()
AUTHOR = "author_role role author_type sender_type author sender from author_id inbound".split()
TEXT = "text body plain_body message content comment description".split()
TIME = "created_at created time timestamp date sent_at".split()
LISTS = ("comments", "messages", "conversation", "replies", "posts")
AGENTS = set(
    "admin agent assistant bot employee false operator outbound owner rep representative service "
    "staff support team technician".split()
)
_QUOTED = re.compile(
    r"^\s*(?:On .{5,200} wrote:|-{2,} ?(?:Original Message|Forwarded message) ?-{2,}|From: .*@.*"
    r"|_{10,})\s*$.*",
    re.MULTILINE | re.DOTALL,
)
_SIGNATURE = re.compile(r"^(?:-- ?|Sent from my .{2,30})$.*", re.MULTILINE | re.DOTALL)
_QUOTE = re.compile(r"^>.*\n?", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    for name, known in (("ticket", TICKET), ("author", AUTHOR), ("text", TEXT), ("time", TIME)):
        what = f"column of the {name} (default: the first there is of {', '.join(known)})"
        add(f"--{name}", metavar="COLUMN", help=what)
    what = (
        "values of the author's column that are agents (default: agent, support, staff and so on)"
    )
    add("--agents", type=frames.names, metavar="VALUES", help=what)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    agents = {each.casefold() for each in arguments.agents or AGENTS}
    authors: Counter[str] = Counter()
    with frame.writing() as write:
        for ticket, where, messages in _tickets(frame, arguments):
            posts = []
            for message in messages:
                author = str(_value(message, arguments, "author", AUTHOR, where)).casefold()
                authors[author] += 1
                text = str(_value(message, arguments, "text", TEXT, where) or "")
                posts.append(Post(author in agents, without_quotes(text)))
            if turns := conversation(posts):
                write({"messages": turns, "ticket": ticket}, where)
            else:
                frame.dropped["ticket without question and answer"] += 1
    if not agents & set(authors):
        listed = ", ".join(author for author, _ in authors.most_common(10))
        what = f"no message is of an agent; authors are {short(listed, 300)}"
        raise UserError(f"--agents: {what}; name those who answer")


def _tickets(
    frame: Frame, arguments: argparse.Namespace
) -> Iterator[tuple[Any, str, list[Mapping[str, Any]]]]:
    """Yield (ticket, where it stands, its messages in order)."""
    tickets: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    places: dict[Any, str] = {}
    for row in frame.rows():
        where = str(row.place)
        nested = next((row.values[name] for name in LISTS if _is_list(row, name)), None)
        key = _value(row.values, arguments, "ticket", [*TICKET, *(["id"] if nested else [])], where)
        places.setdefault(key, where)
        tickets[key].extend(nested if nested is not None else [row.values])
    for key, messages in tickets.items():
        name = _column(messages[0], arguments.time, TIME)
        if name and all(message.get(name) not in (None, "") for message in messages):
            messages = sorted(messages, key=lambda message: str(message[name]))
        yield key, places[key], messages


def _is_list(row: Row, name: str) -> bool:
    value = row.values.get(name)
    return isinstance(value, list) and all(isinstance(each, dict) for each in value) and bool(value)


def _column(values: Mapping[str, Any], given: str | None, known: list[str]) -> str | None:
    return next((name for name in ([given] if given else known) if name in values), None)


def _value(
    values: Mapping[str, Any], arguments: argparse.Namespace, option: str, known: list[str],
    where: str,
) -> Any:  # fmt: skip
    name = _column(values, getattr(arguments, option), known)
    if name is None:
        what = f"no column for the {option} in {short(list(values), 200)}"
        raise DataError(f"{where}: {what}; name it with --{option}")
    value = values[name]
    return value.get("role", value.get("id")) if isinstance(value, dict) else value


def without_quotes(text: str) -> str:
    """Return an e-mail without quoted replies and its signature."""
    text = without_markup(text) if "<" in text and "</" in text else text
    text = text.replace("\r\n", "\n")
    for pattern in (_QUOTED, _SIGNATURE, _QUOTE):
        text = pattern.sub("", text)
    return text.strip()
