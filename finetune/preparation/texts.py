"""The texts of a row: which strings of it are compared, and which are changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Columns that the formats of rows.py read, by all their names.
COLUMNS = frozenset(
    "answer choices chosen completion context conversations history input instruction messages "
    "non_preferred_output output preferred_output prompt query question rejected response system "
    "text".split()
)
# Columns that ask; in a list of messages, the roles that do not answer.
ASKED = frozenset("context history input instruction prompt query question system".split())
ASKING = frozenset("developer human system tool user".split())
NAMES = frozenset("from id name role tool_call_id type".split())  # keys of messages: no text


def text_columns(values: Mapping[str, Any], chosen: Sequence[str] = ()) -> list[str]:
    """Return the chosen columns that a row has; without a choice those of a format, or all."""
    if chosen:
        return [name for name in chosen if name in values]
    return [name for name in values if name in COLUMNS] or list(values)


def strings(value: Any) -> Iterator[str]:
    """Yield the strings inside a value, in order, without the names of roles."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from strings(each)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            if key not in NAMES:
                yield from strings(each)


def text_of(values: Mapping[str, Any], chosen: Sequence[str] = ()) -> str:
    """Return the text of a row, a line for each string."""
    found = [text for name in text_columns(values, chosen) for text in strings(values[name])]
    return "\n".join(found)


def parts_of(values: Mapping[str, Any], chosen: Sequence[str] = ()) -> tuple[str, str]:
    """Return (what a row asks, all else of its text); all is asked where nothing is known to be."""
    asked: list[str] = []
    answered: list[str] = []
    for name in text_columns(values, chosen):
        if name in ASKED:
            asked.extend(strings(values[name]))
            continue
        turns = values[name] if isinstance(values[name], list) else [values[name]]
        for turn in turns:
            role = (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None
            (asked if role in ASKING else answered).extend(strings(turn))
    return ("\n".join(asked), "\n".join(answered)) if asked else ("\n".join(answered), "")


def changed(value: Any, new: Iterator[str]) -> Any:
    """Return a value with the strings that `strings` yields replaced by new ones, in order."""
    if isinstance(value, str):
        return next(new)
    if isinstance(value, list | tuple):
        return [changed(each, new) for each in value]
    if isinstance(value, Mapping):
        return {key: each if key in NAMES else changed(each, new) for key, each in value.items()}
    return value
