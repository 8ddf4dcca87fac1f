"""Turn rows with labels into samples: a label of a whole text, or one of each of its words."""

from collections.abc import Mapping
from typing import Any

from finetune.data.column_names import LABELLED, present_name
from finetune.data.conversations import Conversation, Label, Message, Sample
from finetune.data.formats import cell, column_of, require_known
from finetune.data.messages import require_unicode
from finetune.data.places import Row, short
from finetune.errors import DataError

IGNORED = -100
"""The label of a word that is not learned, as in PyTorch and in data sets; null is another."""


def to_sample(row: Row, format: str, columns: Mapping[str, str]) -> tuple[Sample, set[str]]:
    """Return the sample of a row, and the columns that were read. Raises DataError."""
    require_known(format, columns)
    first, second = (
        columns[name] if name in columns else present_name(row, name) for name in LABELLED[format]
    )
    words: tuple[str, ...] = ()
    labels: tuple[Label | None, ...]
    if format == "text_label":
        text = cell(row, first)
        labels = (_label(row, second, column_of(row, second)),)
    else:
        words = tuple(_words(row, first))
        labels = tuple(_labels(row, second, len(words)))
        text = " ".join(words)
    message = Message("text", text, supervised=True)
    made = Sample((Conversation((message,), row.place),), row=row, labels=labels, words=words)
    return made, {first, second}


def _words(row: Row, column: str) -> list[str]:
    value = column_of(row, column)
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        raise DataError(
            f"{row.place}: column {column!r} should be a list of words, got {short(value)}"
        )
    for number, word in enumerate(words, 1):
        if not isinstance(word, str) or not word.strip() or " " in word.strip():
            raise DataError(
                f"{row.place}: word {number} of {column!r} should be text without spaces, got "
                f"{short(word)}"
            )
        require_unicode(f"{row.place}: column {column!r}", word)
    return [word.strip() for word in words]


def _labels(row: Row, column: str, count: int) -> list[Label | None]:
    value = column_of(row, column)
    labels = value.split() if isinstance(value, str) else value
    if not isinstance(labels, list):
        raise DataError(
            f"{row.place}: column {column!r} should be a list of labels, got {short(value)}"
        )
    if len(labels) != count:
        raise DataError(
            f"{row.place}: column {column!r} has {len(labels)} labels for {count} words; give one "
            "of each, null for a word that should not be learned"
        )
    none = (None, IGNORED)
    found = [None if each in none else _label(row, column, each) for each in labels]
    if not any(label is not None for label in found):
        raise DataError(f"{row.place}: column {column!r} has no label to learn; remove the row")
    return found


def _label(row: Row, column: str, value: Any) -> Label:
    """Return a label: a name, or a whole number."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value >= 0:
        return value
    if isinstance(value, str) and value.strip():
        require_unicode(f"{row.place}: column {column!r}", value)
        return value.strip()
    raise DataError(
        f"{row.place}: column {column!r} should hold labels, each a name or a whole number from 0 "
        f"on, got {short(value)}"
    )
