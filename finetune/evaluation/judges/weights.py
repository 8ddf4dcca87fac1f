"""How a judge weighs the answers that it may give.

By one forward pass, or by the log-probabilities that a server returns. Each is asked once: what a
judge has said is kept in a file by its content.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from finetune.data.places import short
from finetune.lines_file import LinesFile, LinesOfOthers

FILE = "judge_answers.jsonl"
MOST_OUTSIDE = 0.1
"""Mass outside the options from which an answer of a judge is not usable. Scores from 1 to 5 could
be wrong by 0.1 (5 - 1) = 0.4 then, if all of it belonged to one end."""


@dataclass(frozen=True)
class Question:
    """A prompt for a judge, and the texts that it may answer with, each about one token."""

    prompt: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Weights:
    """How a judge weighs its options.

    probabilities: of each option; with `outside` they add up to 1. likeliest: the likeliest token
    of all. reason: why the judge could not be asked; empty if it could.
    """

    probabilities: Mapping[str, float]
    outside: float
    likeliest: str
    reason: str = ""

    @property
    def problem(self) -> str:
        """Return why these weights cannot be used; "" if they can."""
        if self.reason or self.outside <= MOST_OUTSIDE:
            return self.reason
        return (
            f"the judge puts {self.outside:.0%} outside its options, likeliest on "
            f"{short(self.likeliest, 20)!r}"
        )

    @property
    def best(self) -> str:
        """Return the likeliest option; of equal ones the first."""
        return max(self.probabilities, key=lambda option: self.probabilities[option])

    def expectation(self) -> float:
        """Return the mean of options that are numbers, over their own mass."""
        total = sum(self.probabilities.values())
        return sum(float(each) * chance for each, chance in self.probabilities.items()) / total


def of_tokens(chances: Mapping[str, float], options: Sequence[str]) -> Weights:
    """Return the weights of options from probabilities of tokens; space around them is ignored."""
    found = dict.fromkeys(options, 0.0)
    for token, chance in chances.items():
        if token.strip() in found:
            found[token.strip()] += chance
    outside = max(0.0, 1 - sum(found.values()))
    return Weights(found, outside, max(chances, key=lambda token: chances[token], default=""))


Note = Callable[[int, Weights], None]
"""Gets the number of a question and its weights, as soon as they are there."""


class Judge(Protocol):
    """A model that judges: a local one, or a server.

    name: as people know it. identity: differs between models whose answers may differ.
    """

    name: str
    identity: str

    def weigh(self, questions: Sequence[Question], note: Note) -> None:
        """Weigh the options of each question; `note` gets them in any order, in this thread."""

    def write(self, prompt: str, max_tokens: int) -> str:
        """Return a text that answers a prompt."""


# ------------------------------------------------------------------------------------ the file


class Kept:
    """A judge whose weights are kept in a file, from which a later start takes them.

    A context manager. num_asked: questions that the file did not know. others: returns folders of
    other processes, whose files are read, too.
    """

    def __init__(
        self, judge: Judge, folder: Path, log: Callable[[str], None],
        others: Callable[[], Iterable[Path]] = tuple,
    ) -> None:  # fmt: skip
        self.name, self.identity = judge.name, judge.identity
        self.num_asked = 0
        self._asked = judge
        holds = "answer of a judge"
        self._file = LinesFile(
            folder / FILE, holds, "another folder", lambda text: log(f"note: {text}")
        )
        self._known = dict(each for _, each in self._file.read(_weights))
        self._others = LinesOfOthers(lambda: [each / FILE for each in others()], holds, _weights)

    def weigh(self, questions: Sequence[Question]) -> list[Weights]:
        """Return the weights of each question, and ask only those that are new."""
        for key, weights in self._others.new():
            self._known.setdefault(key, weights)
        keys = [self._key(question) for question in questions]
        new = {key: each for key, each in zip(keys, questions) if key not in self._known}
        asked = list(new)

        def note(number: int, weights: Weights) -> None:
            found[asked[number]] = weights
            if not weights.reason:  # another server, or a longer context, may answer it
                self._append(asked[number], weights)

        found = dict(self._known)
        if new:
            self._asked.weigh(list(new.values()), note)
        self.num_asked += len(new)
        return [found[key] for key in keys]

    def write(self, prompt: str, max_tokens: int) -> str:
        return self._asked.write(prompt, max_tokens)

    def _key(self, question: Question) -> str:
        content = json.dumps([self.identity, question.prompt, question.options])
        return hashlib.sha256(content.encode()).hexdigest()

    def _append(self, key: str, weights: Weights) -> None:
        self._known[key] = weights
        line = {"key": key, "judge": self.name, "probabilities": dict(weights.probabilities),
                "outside": weights.outside, "likeliest": weights.likeliest}  # fmt: skip
        self._file.append(line)

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._file.close()


def _weights(line: Any) -> tuple[str, Weights]:
    """Return key and weights of a line. Raise what a wrong line raises."""
    chances = {option: float(chance) for option, chance in line["probabilities"].items()}
    if not (isinstance(line["key"], str) and isinstance(line["likeliest"], str)):
        raise TypeError
    return line["key"], Weights(chances, float(line["outside"]), line["likeliest"])
