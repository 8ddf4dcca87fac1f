"""The groups of one shard of a phase, as they are sampled and scored.

One process writes a file at a time: a line with the completions of its groups once they are
sampled, another with the rewards of a group once they are there; each is on the disk before the
next begins. What a line holds is never sampled or asked again. Each line ends with a hash of
itself. The first says what the groups depend on.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune import failures, files
from finetune.errors import RunDirectoryError
from finetune.rollouts.phases import Group

LINE = re.compile(rb'(\{.+), "sha256": "([0-9a-f]{16})"\}\n')
# What reading values of another shape raises.
WRONG = (ValueError, TypeError, KeyError, AttributeError, RecursionError)


class ShardFile:
    """An open file. `of`: what its groups depend on; those of a file that says another are dropped.

    Raises RunDirectoryError for a line that was altered. A last line that a kill, or the end of the
    machine, left unfinished is dropped.
    """

    def __init__(self, folder: Path, number: int, of: str) -> None:
        self.path = folder / f"shard-{number:04d}.jsonl"
        self.groups: dict[int, Group] = {}
        self.reasons: dict[int, str] = {}
        """Why groups have no rewards yet, by their numbers."""
        with failures.writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            whole = self._read(of)
            self._file = self.path.open("ab")
            try:
                self._file.truncate(whole)
                if not whole:
                    self._append({"of": of})
                    files.flush(folder)
            except BaseException:
                with suppress(OSError):
                    self._file.close()
                raise

    def _read(self, of: str) -> int:
        """Read the lines that belong here; return where they end."""
        if not self.path.exists():
            return 0
        with self.path.open("rb") as file:
            end, lines = 0, list(file)
        for number, line in enumerate(lines, 1):
            try:
                values = _parsed(line)
                if number == 1 and values["of"] != of:
                    return 0
                if number > 1:
                    self._take(values)
            except WRONG as exc:
                if number == len(lines):
                    return end
                raise RunDirectoryError(
                    f"{self.path}:{number}: was altered; remove the file, and its groups are "
                    "sampled and scored again, or put back a copy"
                ) from exc
            end += len(line)
        return end

    def _take(self, values: Mapping[str, Any]) -> None:
        """Take over a line. Raise what a wrong one raises."""
        for each in values.get("groups", ()):
            group = Group.from_json(each, is_scored=False)
            self.groups[group.number] = group
            self.reasons.pop(group.number, None)
        if "failed" in values:
            self.reasons[self.groups[values["prompt"]].number] = values["failed"]
        if "rewards" in values:
            self._score(values["prompt"], values["rewards"])

    def lacks(self, number: int) -> bool:
        """Return whether a group is to be sampled: it is not here, or its environment failed."""
        group = self.groups.get(number)
        return group is None or not (group.is_scored or group.unplayed == "")

    def sampled(self, groups: Sequence[Group]) -> None:
        """Append groups without rewards. Raises Outage if the disk fails."""
        # One line: of several, a machine that ends may leave the last and not the first.
        self._append({"groups": [each.to_json() for each in groups]})
        self.groups |= {each.number: each for each in groups}

    def scored(self, number: int, rewards: Sequence[Mapping[str, Any]]) -> None:
        """Append the rewards of a group. Raises Outage if the disk fails."""
        self._append({"prompt": number, "rewards": list(rewards)})
        self._score(number, rewards)

    def _score(self, number: int, rewards: Sequence[Mapping[str, Any]]) -> None:
        self.groups[number] = self.groups[number].scored(rewards)
        self.reasons.pop(number, None)

    def failed(self, number: int, reason: str) -> None:
        """Append why a group has no rewards; the next attempt asks for them again."""
        self._append({"prompt": number, "failed": reason})
        self.reasons[number] = reason

    def _append(self, values: Mapping[str, Any]) -> None:
        with failures.writing(self.path):
            self._file.write(_line(values))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Raises Outage if the disk fails."""
        with failures.writing(self.path):  # what a full disk did not take is tried again
            self._file.close()


def recorded(folder: Path, of: str) -> list[Group]:
    """Return the groups of all shards of a phase that grows, by number.

    Those without rewards have the reason.
    """
    found: dict[int, Group] = {}
    for path in sorted(folder.glob("shard-*.jsonl")):
        shard = ShardFile(folder, int(path.stem.removeprefix("shard-")), of)
        shard.close()
        found |= shard.groups
        found |= {number: _failed(found[number], why) for number, why in shard.reasons.items()}
    return [found[number] for number in sorted(found)]


def _failed(group: Group, reason: str) -> Group:
    return replace(group, rollouts=tuple(replace(each, reason=reason) for each in group.rollouts))


def _line(values: Mapping[str, Any]) -> bytes:
    body = json.dumps(values)[:-1].encode()
    return body + f', "sha256": "{_hash(body)}"}}\n'.encode()


def _parsed(line: bytes) -> dict[str, Any]:
    """Return the values of a line. Raise ValueError for one that is torn, or was altered."""
    found = LINE.fullmatch(line)
    if found is None or _hash(found[1]) != found[2].decode():
        raise ValueError
    values: dict[str, Any] = json.loads(found[1] + b"}")
    return values


def _hash(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
