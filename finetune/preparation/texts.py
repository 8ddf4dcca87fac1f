"""The texts of a row: which strings of it are compared, and which are changed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Columns that the formats of rows.py read, by all their names.
COLUMNS = frozenset(
    "answer chosen completion context conversations history input instruction messages output "
    "preferred_output non_preferred_output prompt question rejected response system text".split()
)
# What a column asks; the others answer.
ASKED = frozenset("context history input instruction prompt question system".split())
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


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with each string of `strings` changed, called in the same order."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [changed(each, change) for each in value]
    if isinstance(value, Mapping):
        return {key: each if key in NAMES else changed(each, change) for key, each in value.items()}
    return value
