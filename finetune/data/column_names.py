"""Which columns each format reads, and under which other names rows have them."""

import difflib
import functools
from collections.abc import Iterator, Mapping, Set
from types import MappingProxyType

from finetune.data.messages import unread_keys
from finetune.data.places import Place, Row, list_columns, short

# Format -> the columns it needs. Detection takes the first format whose columns are all there.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
# Formats of several answers a row, or of answers that are good or bad; data.format names them.
RATED: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired": ("label",),
    "choices": ("choices", "gold"),
    "steps": ("steps", "labels"),
}
# Formats of classification, each for one objective.
LABELLED: dict[str, tuple[str, ...]] = {
    "text_label": ("text", "label"),
    "token_labels": ("tokens", "labels"),
}
# Rows that are asked: a prompt, and what is known of its answer, under the names of each.
ASKED = "prompt"
ASKED_COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", "problem", "messages"),
    "answer": ("answer", "reference", "solution", "ground_truth", "target"),
    "system": ("system", "system_prompt"),
    "tools": ("tools",),
}
# Format -> columns that it reads where a row has them -> their names in rows.
OPTIONAL: dict[str, dict[str, tuple[str, ...]]] = {
    "messages": {"system": ("system", "system_prompt"), "tools": ("tools",)},
    # Elsewhere `system` may be anything: the name of a computer.
    "question_answer": {"system": ("system_prompt",)},
    "instruction": {
        "input": ("input", "context"), "system": ("system", "system_prompt"),
        "history": ("history",),
    },
}  # fmt: skip
PAIRS = ("question_answer", "prompt_completion", "instruction")  # formats of one question each
SHAPES = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
# Other names in common use for a column.
ALIASES = {"response": ("completion", "output"), "conversations": ("messages",)}
# Those that count where nothing fits without them.
LATER_ALIASES = {
    "response": ("answer",), "query": ("question",), "inputs": ("prompt",),
    "targets": ("completion",), "conversation": ("messages",), "dialog": ("messages",),
    "dialogue": ("messages",),
}  # fmt: skip
# Names in data.columns that are not those of columns, but stand inside messages.
IN_MESSAGES = ("role", "content", "user", "assistant")


def fitting(row: Row, columns: Mapping[str, str]) -> str | None:
    """Return the first format whose columns are all there, or None."""
    mapped = {ours for ours, theirs in columns.items() if theirs in row.values}
    first = {name for each in row.values for name in ALIASES.get(each, ())}
    later = {name for each in row.values for name in LATER_ALIASES.get(each, ())}
    for present in ({*row.values, *mapped, *first}, {*row.values, *mapped, *first, *later}):
        for name, needed in FORMATS.items():
            if present.issuperset(needed):
                is_chat = name == "prompt_completion" and _is_chat(row, columns)
                return "messages" if is_chat else name
    return None


def _is_chat(row: Row, columns: Mapping[str, str]) -> bool:
    """Return whether prompt or completion are lists of messages, not text."""
    names = ("prompt", "completion")
    theirs = (columns[name] if name in columns else present_name(row, name) for name in names)
    return any(isinstance(row.values.get(name), list) for name in theirs)


def by_other_case(row: Row) -> str | None:
    """Return data.columns for columns that fit a format except for case and spaces, or None."""
    known: dict[str, str] = {}
    for name in (name for name in row.values if len(name) <= 200):
        known[name.strip().lower()] = name
        for ours in ALIASES.get(name.strip().lower(), ()):
            known.setdefault(ours, name)
    for needed in FORMATS.values():
        if known.keys() >= set(needed):
            listed = ", ".join(f"{ours}: {known[ours]}" for ours in needed if known[ours] != ours)
            return f"which is case-sensitive: {{{listed}}}"
    return None


@functools.cache
def columns_of(format: str) -> tuple[str, ...]:
    """Return the names that data.columns may have for a format."""
    if format in LABELLED:
        return LABELLED[format]
    if format == ASKED:
        return tuple(ASKED_COLUMNS)
    if format in RATED:
        asked = [name for each in FORMATS.values() for name in each]
        more = ["margin"] if format == "preference" else []
        return tuple(dict.fromkeys([*RATED[format], *asked, "input", "system", "tools", *more]))
    also = ("prompt", "completion", *IN_MESSAGES) if format == "messages" else ()
    return (*FORMATS[format], *OPTIONAL.get(format, ()), *also)


def taken_from(row: Row, format: str, columns: Mapping[str, str]) -> Mapping[str, str]:
    """Return the columns that a format reads -> the row's own names of them."""
    is_continued = False
    if format == "messages" and "messages" not in columns:
        is_continued = present_name(row, "messages") not in row.values and _is_chat(row, columns)
    return _taken(tuple(row.values), format, is_continued, tuple(columns.items()))


@functools.lru_cache(maxsize=1_000)  # most rows have the columns of the one before
def _taken(
    names: tuple[str, ...], format: str, is_continued: bool, columns: tuple[tuple[str, str], ...]
) -> Mapping[str, str]:
    """Return `taken_from` of a row with these columns."""
    row, given = Row(Place("", 0), dict.fromkeys(names)), dict(columns)
    needed = ("prompt", "completion") if is_continued else FORMATS[format]
    taken = {name: given[name] if name in given else present_name(row, name) for name in needed}
    for ours, theirs in OPTIONAL.get(format, {}).items():
        if ours in given:
            taken[ours] = given[ours]
        elif found := next((n for n in theirs if n in names and n not in taken.values()), None):
            taken[ours] = found
    return MappingProxyType(taken)


def asked_columns(row: Row, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns of a row of format prompt -> the row's own names of them."""
    found = {}
    for ours, names in ASKED_COLUMNS.items():
        own = (columns[ours],) if ours in columns else names
        if name := next((name for name in own if name in row.values), None):
            found[ours] = name
    return found


def described(row: Row, format: str, columns: Mapping[str, str]) -> str:
    """Return the columns that are read, each with the row's own name of it, for the summary."""
    taken = {name: name for name in LABELLED.get(format, ())}
    if format == ASKED:
        taken = asked_columns(row, columns)
    if format in FORMATS:
        taken = dict(taken_from(row, format, columns))
    taken |= {name: columns[name] for name in columns if taken.get(name, name) == name}
    return ", ".join(
        ours if ours == theirs else f"{ours} from {short(theirs)!r}"
        for ours, theirs in taken.items()
    )


def unread(row: Row, read: Set[str], columns: Mapping[str, str]) -> Iterator[str]:
    """Yield the filled columns that are not read, and keys of messages, as `messages[].name`."""
    for name, value in row.values.items():
        if name not in read and value not in (None, ""):
            yield name
    for column in read:
        yield from (f"{column}[].{k}" for k in unread_keys(row.values.get(column), columns))


def present_name(row: Row, name: str) -> str:
    """Return the row's own name for a column: itself, or a common alias."""
    if name not in row.values:
        for alias, stands_for in (*ALIASES.items(), *LATER_ALIASES.items()):
            if name in stands_for and alias in row.values:
                return alias
    return name


def no_column(row: Row, column: str) -> str:
    """Say that a row lacks a column, and which similar one it has."""
    known = {name.strip().lower(): name for name in row.values if len(name) <= 200}
    near = difflib.get_close_matches(column.strip().lower()[:200], known, n=1)
    return (
        f"no column {short(column)!r}; "
        + (f"did you mean {known[near[0]]!r}? " if near else "")
        + f"this row has {list_columns(sorted(row.values))}"
    )
