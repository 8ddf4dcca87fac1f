"""Votes on which of two answers is better: a file of them, and the preference rows they make.

A line of the file:

    {"row": "rows.jsonl:3", "prompt": [{"role": "user", "content": "..."}],
     "models": ["base", "tuned"], "answers": ["...", "..."], "better": "second", "rater": "person"}

better: "first" or "second" of the models, or "tie". People vote on the page of `voting.py` or in
chat, and models by `judges/pairwise.py`, with "by": "model"; all write this file. Other keys are
ignored.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from finetune import failures, files
from finetune.data.places import printable, short
from finetune.data.problems import Problems
from finetune.errors import DataError, UserError

Better = Literal["first", "second", "tie"]
By = Literal["person", "model"]
PERSON: By = "person"
MODEL: By = "model"
MOST_BYTES = 1 << 30  # of a file of votes


@dataclass(frozen=True)
class Vote:
    """Which of two answers to a prompt is better.

    row: where the prompt stands. prompt: messages up to the answers. rater: a name of the person,
    or of the model that judges. by: which of the two it is.
    """

    row: str
    prompt: tuple[Mapping[str, str], ...]
    models: tuple[str, str]
    answers: tuple[str, str]
    better: Better
    rater: str = PERSON
    by: By = PERSON

    @property
    def points(self) -> float:
        """Return what the second model gets: 1, 0, or 0.5 for a tie."""
        return {"first": 0.0, "tie": 0.5, "second": 1.0}[self.better]

    @cached_property
    def question(self) -> str:
        """Return the text of the prompt."""
        return "\n".join(message["content"] for message in self.prompt)

    @cached_property
    def pair(self) -> "Pair":
        """Return what was compared, whichever side each answer was on."""
        sides = sorted(zip(self.models, self.answers))
        return self.question, sides[0], sides[1]

    def points_of(self, model: str) -> float:
        """Return what one of the two models gets."""
        return self.points if model == self.models[1] else 1 - self.points

    def as_line(self) -> str:
        values = {
            "row": self.row, "prompt": [dict(message) for message in self.prompt],
            "models": self.models, "answers": self.answers, "better": self.better,
            "rater": self.rater, "by": self.by,
        }  # fmt: skip
        return json.dumps(values, ensure_ascii=False) + "\n"


Pair = tuple[str, tuple[str, str], tuple[str, str]]
"""A question, and two models with their answers."""


def latest(votes: Iterable[Vote]) -> list[Vote]:
    """Return the last vote of each rater on each pair: a page exports all its votes each time."""
    return list({(vote.row, vote.pair, vote.rater, vote.by): vote for vote in votes}.values())


# ------------------------------------------------------------------------------------- reading


def read(paths: Sequence[str]) -> list[Vote]:
    """Return the votes of files. Raise DataError that lists every line that is not a vote."""
    problems, found = Problems(), []
    for path in paths:
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            problems.num_rows += 1
            with problems.noted():
                found.append(_vote(f"{printable(path)}:{number}", line))
    problems.raise_if_any()
    if not found:
        listed = ", ".join(map(printable, paths))
        raise DataError(f"{listed}: holds no votes; export them from the page first")
    return found


def _lines(path: str) -> list[bytes]:
    shown = printable(path)
    try:
        if not Path(path).is_file():
            raise DataError(f"{shown}: should be a file of votes; is the name right?")
        if Path(path).stat().st_size > MOST_BYTES:
            raise DataError(f"{shown}: has over {MOST_BYTES >> 30} GiB; is it a file of votes?")
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (OSError, ValueError) as exc:
        failures.reraise(exc, f"{shown}: cannot be read now")
        why = getattr(exc, "strerror", None) or exc
        raise DataError(f"{shown}: cannot be read ({why}); is it the right file?") from exc


def _vote(place: str, line: bytes) -> Vote:
    try:
        values = json.loads(line.decode())
        if b"\\u" in line:  # halves of characters, which JSON may escape, cannot be written again
            text = json.dumps(values, ensure_ascii=False)
            values = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except (ValueError, RecursionError) as exc:
        what = short(line.decode("utf-8", "replace"))
        raise DataError(f"{place}: should be a vote in JSON, got {what}") from exc
    if not isinstance(values, dict):
        raise DataError(f"{place}: should be an object, got {short(values)}")
    models, answers = (_two(place, name, values.get(name)) for name in ("models", "answers"))
    if models[0] == models[1]:
        raise DataError(f"{place}: 'models' should name two models, got {short(values['models'])}")
    better, rater = values.get("better"), values.get("rater", PERSON)
    if better not in ("first", "second", "tie"):
        raise DataError(f"{place}: 'better' should be first, second or tie, got {short(better)}")
    row = values.get("row", "")
    for name, value in (("row", row), ("rater", rater)):
        if not isinstance(value, str):
            raise DataError(f"{place}: {name!r} should be text, got {short(value)}")
    if (by := values.get("by", PERSON)) not in (PERSON, MODEL):
        raise DataError(f"{place}: 'by' should be person or model, got {short(by)}")
    return Vote(row, _prompt(place, values.get("prompt")), models, answers, better, rater, by)


def _two(place: str, name: str, value: Any) -> tuple[str, str]:
    is_two = isinstance(value, list) and len(value) == 2
    if not is_two or not all(isinstance(each, str) for each in value):
        raise DataError(f"{place}: {name!r} should be a list of two texts, got {short(value)}")
    return value[0], value[1]


def _prompt(place: str, value: Any) -> tuple[Mapping[str, str], ...]:
    is_whole = isinstance(value, list) and bool(value)
    for message in value if is_whole else ():
        parts = (message.get("role"), message.get("content")) if isinstance(message, dict) else ()
        is_whole = is_whole and bool(parts) and all(isinstance(part, str) for part in parts)
    if not is_whole:
        what = "should be a list of messages with role and content"
        raise DataError(f"{place}: 'prompt' {what}, got {short(value)}")
    return tuple({"role": each["role"], "content": each["content"]} for each in value)


# ------------------------------------------------------------------------------------- writing


def write(path: Path, votes: Iterable[Vote]) -> None:
    """Write a file of votes, whole or not at all."""
    with failures.writing(path):
        files.write_whole(path, "".join(vote.as_line() for vote in votes))


@dataclass(frozen=True)
class Preferences:
    """Rows of a prompt, the answer that is better and one that is worse, as training reads them.

    num_ties: pairs of answers whose votes have no majority. num_unfit: pairs of equal texts, or
    with an empty one, which training refuses.
    """

    rows: list[dict[str, Any]]
    num_ties: int
    num_unfit: int


def to_preferences(votes: Iterable[Vote]) -> Preferences:
    """Return a preference row for each pair of answers that the majority of votes decides."""
    sums: Counter[tuple[str, str, str]] = Counter()
    prompts: dict[tuple[str, str, str], Vote] = {}
    for vote in votes:
        (one, other), points = vote.answers, 2 * vote.points - 1
        if one > other:  # the same answers, wherever they stood, by any model
            one, other, points = other, one, -points
        key = (json.dumps([dict(each) for each in vote.prompt]), one, other)
        prompts.setdefault(key, vote)
        sums[key] += points  # type: ignore[assignment]
    rows, num_ties, num_unfit = [], 0, 0
    for key, vote in prompts.items():
        _, one, other = key
        if one == other or not (one.strip() and other.strip()):
            num_unfit += 1
        elif not sums[key]:
            num_ties += 1
        else:
            chosen, rejected = (other, one) if sums[key] > 0 else (one, other)
            row = {"prompt": [dict(each) for each in vote.prompt]}
            rows.append(row | {"chosen": _answer(chosen), "rejected": _answer(rejected)})
    return Preferences(rows, num_ties, num_unfit)


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def write_preferences(path: Path, votes: Iterable[Vote], option: str) -> Preferences:
    """Write preference rows. Raise UserError for a file that exists, or without any row."""
    if path.exists():
        raise UserError(f"{option}: {path} exists, and is not replaced; choose another name")
    found = to_preferences(votes)
    if not found.rows:
        what = "the votes prefer no answer, so they make no preference rows"
        raise UserError(f"{option}: {what}; collect votes that are not ties")
    try:
        with failures.writing(path):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
            files.write_whole(path, "".join(lines))
    except OSError as exc:
        what = f"{option}: {path}: cannot be written: {exc.strerror}"
        raise UserError(f"{what}; choose another place") from exc
    return found
