"""Make conversations of a Slack export: each thread with an answer is a row.

Reads the .zip of an export, or the folder it was unpacked to. Who began a thread is the user, all
others are the assistant; with --answerers only these people are, and all others are the user. Names
become [USER_1] and so on; --names keeps them. Messages of bots and of Slack itself are left out.
"""

import argparse
import datetime
import html
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune import failures
from finetune.config import paths
from finetune.data import readers
from finetune.data.places import printable
from finetune.errors import DataError, UserError
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame
from finetune.preparation.threads import Post, conversation

_REFERENCE = re.compile(r"<([@#!]?)([^<>|]*)(?:\|([^<>]*))?>")
LISTS = ("users.json", "channels.json", "dms.json", "groups.json", "mpims.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "export: a .zip file, or the folder that was made of it"
    add("exports", nargs="+", metavar="EXPORT", type=paths.argument, help=what)
    frames.add_output(parser)
    what = "people who answer, by name or id, as ann,bob"
    add("--answerers", type=frames.names, metavar="NAMES", help=what)
    what = "channels to read, as help,support (default: all)"
    add("--channels", type=frames.names, metavar="NAMES", help=what)
    add("--names", action="store_true", help="keep the names of people")


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    frame.sources, frame.unit = arguments.exports, "messages"
    with frame.writing() as write:
        for source in arguments.exports:
            files = dict(_files(source))
            people = _people(files.get("users.json", []))
            answerers = _answerers(arguments.answerers, people)
            for channel, messages in _channels(source, files, arguments.channels):
                for where, thread in _threads(frame, channel, messages):
                    turns = _turns(thread, answerers, None if not arguments.names else people)
                    if not turns:
                        frame.dropped["thread without an answer"] += 1
                        continue
                    time = datetime.datetime.fromtimestamp(_time(thread[0]), datetime.UTC)
                    date = time.date().isoformat()
                    write({"messages": turns, "channel": channel, "date": date}, where)


def _files(source: str) -> Iterator[tuple[str, Any]]:
    """Yield (path inside the export, content) of its JSON files."""
    with readers.readable(source):
        if Path(source).is_dir():
            for path in sorted(Path(source).rglob("*.json")):
                name = path.relative_to(source).as_posix()
                yield name, _parsed(f"{source}/{name}", path.read_bytes())
            return
        if not Path(source).exists():
            raise readers.absent(source, "EXPORT")
        try:
            with zipfile.ZipFile(source) as archive:
                for name in sorted(archive.namelist()):
                    if name.endswith(".json"):
                        yield name, _parsed(f"{source}/{name}", archive.read(name))
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as exc:
            what = f"not a whole .zip of a Slack export: {exc}; export it again"
            raise DataError(f"{printable(source)}: {what}") from exc


def _parsed(where: str, data: bytes) -> list[dict[str, Any]]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        why = failures.parsing_reason(exc)
        raise DataError(f"{printable(where)}: broken JSON: {why}; export it again") from exc
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _people(users: list[dict[str, Any]]) -> dict[str, str]:
    """Return id -> name."""
    return {
        str(user["id"]): str(user.get("name") or user.get("real_name") or user["id"])
        for user in users
        if "id" in user
    }


def _answerers(wanted: list[str] | None, people: dict[str, str]) -> set[str] | None:
    if wanted is None:
        return None
    ids = {name: key for key, name in people.items()} | {key: key for key in people}
    if unknown := [name for name in wanted if name not in ids]:
        listed = ", ".join(sorted(people.values())[:20])
        raise UserError(f"--answerers: {unknown[0]!r} is not in the export, which has {listed}")
    return {ids[name] for name in wanted}


def _channels(
    source: str, files: dict[str, Any], wanted: list[str] | None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (name, messages in order) of each channel."""
    channels: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for name, messages in files.items():
        if "/" in name and Path(name).name not in LISTS:
            channels[Path(name).parent.name].extend(messages)
    if not channels:
        what = "holds no channels, CHANNEL/2026-01-31.json; is it a Slack export?"
        raise DataError(f"{printable(source)}: {what}")
    if missing := [name for name in wanted or [] if name not in channels]:
        listed = ", ".join(sorted(channels)[:20])
        raise UserError(f"--channels: {missing[0]!r} is not in the export, which has {listed}")
    for name in sorted(channels):
        if wanted is None or name in wanted:
            yield name, sorted(channels[name], key=_time)


def _time(message: dict[str, Any]) -> float:
    try:
        return float(message.get("ts", 0))
    except (TypeError, ValueError):
        return 0.0


def _threads(
    frame: Frame, channel: str, messages: list[dict[str, Any]]
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield (where it stands, messages) of each thread; count what is left out."""
    threads: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for message in messages:
        frame.read += 1
        if message.get("bot_id") or message.get("subtype") not in (None, "thread_broadcast"):
            frame.dropped["message of a bot or of Slack"] += 1
        elif isinstance(message.get("user"), str) and isinstance(message.get("text"), str):
            threads[str(message.get("thread_ts") or message.get("ts"))].append(message)
        else:
            frame.dropped["message without user or text"] += 1
    for key, thread in threads.items():
        if len(thread) > 1:
            yield f"{channel} {key}", thread
        else:
            frame.dropped["message outside a thread"] += 1


def _turns(
    thread: list[dict[str, Any]], answerers: set[str] | None, names: dict[str, str] | None
) -> list[dict[str, Any]]:
    asker = thread[0]["user"]
    numbers: dict[str, str] = {}

    def name_of(person: str) -> str:
        if names is not None:
            return f"@{names.get(person, person)}"
        return numbers.setdefault(person, f"[USER_{len(numbers) + 1}]")

    return conversation(
        Post(
            message["user"] in answerers if answerers else message["user"] != asker,
            plain(message["text"], name_of),
        )
        for message in thread
    )


def plain(text: str, name_of: Any) -> str:
    """Return the text of a message without Slack's markup of people, channels and links."""

    def shown(match: re.Match[str]) -> str:
        sign, target, label = match[1], match[2], match[3]
        if sign == "@":
            return str(name_of(target))
        if sign:
            return ("@" if sign == "!" else "#") + (label or target).removeprefix("@")
        return f"{label} ({target})" if label and label not in target else target

    return html.unescape(_REFERENCE.sub(shown, text))
