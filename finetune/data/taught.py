"""What a teacher said of rows: their column `teacher`, written by `finetune data teach`.

For each document of a row: its tokens, which of them were scored, and for each of these the
likeliest tokens of the teacher with their log-probabilities. Numbers are base64 of little-endian
int32 and float32: exact, and a third of their decimals.
"""

import base64
import binascii
import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.data import readers
from finetune.data.examples import Examples
from finetune.data.places import Row
from finetune.data.problems import Problems

COLUMN = "teacher"
IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"
"""Columns of tokens: the likeliest of the teacher, [S, K] each."""
HOW = "write it again with `finetune data teach`"
HASHED = ("k", "temperature", "tokens", "scored", "ids", "logprobs")
MOST_SUM = 1e-3  # by which rounded probabilities of one token may exceed 1 together


@dataclass(frozen=True)
class Taught:
    """A document. tokens int32 [T]; scored int32 [S]: places among them, in their order.

    ids int32 [S, K]; logprobs float32 [S, K], in nats, of logits that `temperature` divided.
    """

    tokens: np.ndarray
    scored: np.ndarray
    ids: np.ndarray
    logprobs: np.ndarray
    temperature: float = 1.0

    def values(self) -> dict[str, Any]:
        """Return what a row holds."""
        arrays = {"tokens": self.tokens, "scored": self.scored, "ids": self.ids}
        written = {name: _text(each, "<i4") for name, each in arrays.items()}
        found = {
            "k": self.ids.shape[1], "temperature": self.temperature, **written,
            "logprobs": _text(self.logprobs, "<f4"),
        }  # fmt: skip
        return {**found, "sha256": _hash(found)}

    @classmethod
    def read(cls, values: Any) -> "Taught":
        """Read what a row holds. Raises ValueError that says what is wrong."""
        names = {*HASHED, "sha256"}
        if not isinstance(values, Mapping) or not names <= values.keys():
            raise ValueError(f"should have {', '.join(sorted(names))}; {HOW}")
        k, temperature = values["k"], values["temperature"]
        if type(k) is not int or k < 1 or not isinstance(temperature, int | float):
            raise ValueError(f"has k {k!r} and temperature {temperature!r}; {HOW}")
        try:
            tokens, scored, ids = (_array(values[n], "<i4") for n in ("tokens", "scored", "ids"))
            found = cls(
                tokens, scored, ids.reshape(len(scored), k),
                _array(values["logprobs"], "<f4").reshape(len(scored), k), float(temperature),
            )  # fmt: skip
        except (binascii.Error, TypeError, ValueError) as exc:
            raise ValueError(f"is damaged: {exc}; {HOW}") from exc
        if problem := found._problem():
            raise ValueError(f"{problem}; {HOW}")
        if values["sha256"] != _hash(values):
            raise ValueError(f"is damaged: it has another hash than when it was written; {HOW}")
        return found

    def _problem(self) -> str:
        """Return why these cannot be distributions; "" if they can."""
        with np.errstate(over="ignore"):
            sums = np.exp(self.logprobs.astype(np.float64)).sum(1)
        if not (np.isfinite(self.logprobs).all() and (sums <= 1 + MOST_SUM).all()):
            return "holds numbers that cannot be log-probabilities"
        ordered = np.sort(self.ids, axis=1)
        if (ordered[:, 1:] == ordered[:, :-1]).any():
            return "names a token twice at one place"
        if self.ids.size and self.ids.min() < 0:
            return "names tokens with an id below 0"
        bounds = np.concatenate([[0], self.scored, [len(self.tokens)]])
        if (np.diff(bounds) <= 0).any():
            return "scores places that the document does not have"
        return ""


def _hash(values: Mapping[str, Any]) -> str:
    """Return a hash of what a row holds, which also tells other numbers that could be right."""
    content = [float(values[name]) if name == "temperature" else values[name] for name in HASHED]
    return hashlib.sha256(" ".join(map(str, content)).encode()).hexdigest()[:32]


def _text(values: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(values, kind).tobytes()).decode()


def _array(text: Any, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), kind)


class Scored:
    """A column of tokens that only scored tokens have, [all tokens, K]; elsewhere 0.

    values [N, K]: in the order of `places`, int64 [N], among all tokens.
    """

    def __init__(self, places: np.ndarray, values: np.ndarray, num_tokens: int) -> None:
        order = np.argsort(places, kind="stable")
        self._places, self._values = places[order], values[order]
        self.shape, self.dtype = (num_tokens, values.shape[1]), values.dtype

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the rows of a stretch of tokens."""
        first, last = np.searchsorted(self._places, [part.start, part.stop])
        found = np.zeros((part.stop - part.start, self.shape[1]), self.dtype)
        found[self._places[first:last] - part.start] = self._values[first:last]
        return found


def columns(
    examples: Examples, text_unit: str, temperature: float, vocab_size: int
) -> dict[str, Scored]:
    """Return columns of tokens with what the rows hold of their teacher.

    Raises DataError, with file and line, where a row has no such column, or where it was scored on
    other tokens than these. `vocab_size`: of the model that learns.
    """
    wanted: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for example, place in enumerate(examples.places()):
        wanted[place].append(example)
    problems, reading = Problems(), _Reading(examples, temperature, vocab_size)
    for number, source in enumerate(examples.sources):
        for row in readers.records(source, text_unit):
            members = isinstance(row, Row) and wanted.get(
                (number, row.place.line, row.place.row), []
            )
            if isinstance(row, Row) and members:
                problems.num_rows += 1
                try:
                    reading.add(row.values.get(COLUMN), members)
                except ValueError as exc:
                    problems.note(f"{row.place}: column {COLUMN} {exc}")
    problems.raise_if_any()
    return reading.columns()


class _Reading:
    """Collects what rows hold, for the places of the tokens of examples."""

    def __init__(self, examples: Examples, temperature: float, vocab_size: int) -> None:
        self._examples, self._temperature, self._size = examples, temperature, vocab_size
        self._k: int | None = None
        self._places = [np.zeros(0, np.int64)]
        self._ids, self._logprobs = list[np.ndarray](), list[np.ndarray]()

    def add(self, given: Any, members: Sequence[int]) -> None:
        """Add a row. Raises ValueError that says what is wrong."""
        documents = [each for example in members for each in self._examples.documents(example)]
        if given is None:
            raise ValueError("is missing; write it with `finetune data teach`, or name a teacher")
        if not isinstance(given, list) or len(given) != len(documents):
            count = len(given) if isinstance(given, list) else "no list of"
            raise ValueError(f"holds {count} documents, and training makes {len(documents)} of it")
        for document, values in zip(documents, given):
            self._add(document, Taught.read(values))

    def _add(self, document: int, taught: Taught) -> None:
        span = self._examples.input.span(document)
        ids, supervised = self._examples.input.ids[span], self._examples.supervised[span]
        _require_same(taught.tokens, ids)
        places = np.flatnonzero(supervised[1:]) + 1  # no token predicts the first
        if len(missing := np.setdiff1d(places, taught.scored)):
            raise ValueError(
                f"has nothing of token {missing[0]}, which training learns: data.loss_on was "
                f"another; {HOW}"
            )
        if taught.temperature != self._temperature:
            raise ValueError(
                f"was scored at temperature {taught.temperature:g}, and objective.temperature is "
                f"{self._temperature:g}; set it to that, or {HOW}"
            )
        k = taught.ids.shape[1]
        self._k = self._k or k
        if k != self._k:
            raise ValueError(f"holds {k} tokens for each, and the rows before {self._k}; {HOW}")
        if taught.ids.size and taught.ids.max() >= self._size:
            raise ValueError(
                f"names token {taught.ids.max()}, and the model has {self._size}; {HOW}"
            )
        rows = np.searchsorted(taught.scored, places)
        self._places.append(places + span.start)
        self._ids.append(taught.ids[rows])
        self._logprobs.append(taught.logprobs[rows])

    def columns(self) -> dict[str, Scored]:
        places, size = np.concatenate(self._places), len(self._examples.input.ids)
        empty = np.zeros((0, self._k or 1))
        ids = np.concatenate([empty.astype(np.int32), *self._ids])
        logprobs = np.concatenate([empty.astype(np.float32), *self._logprobs])
        return {IDS: Scored(places, ids, size), LOGPROBS: Scored(places, logprobs, size)}


def _require_same(scored: np.ndarray, trained: np.ndarray) -> None:
    if np.array_equal(scored, trained):
        return
    both = min(len(scored), len(trained))
    differ = np.flatnonzero(scored[:both] != trained[:both])
    first = int(differ[0]) if len(differ) else both
    here, there = (str(each[first]) if first < len(each) else "none" for each in (trained, scored))
    raise ValueError(
        f"was scored on other tokens: from token {first} on training has {here} where the teacher "
        f"had {there}; the row, its template, system prompt or tokenizer is another than then; "
        f"{HOW}"
    )
