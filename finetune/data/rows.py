"""Find and read rows, and turn each into a Conversation. Knows the file and line of every row.

JSON Lines, JSON, CSV and text are read record by record with the standard library, because an
error must name its line and "42" in a CSV must stay text; Parquet is read by pyarrow,
folders and Hub names by `datasets`.
"""

import codecs
import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune import failures
from finetune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Place:
    """Where a row stands. `line` and `row` are counted from 1; row is 0 where each row has a line of its own."""

    source: str
    line: int
    row: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" + (f" (row {self.row})" if self.row else "")


@dataclass(frozen=True)
class Row:
    """One record of a user's file."""

    place: Place
    values: dict[str, Any]


@dataclass(frozen=True)
class Message:
    """One turn. `context` is the separate input of an instruction row, empty elsewhere."""

    role: str
    content: str
    supervised: bool = False
    context: str = ""


@dataclass(frozen=True)
class Conversation:
    """The one internal shape of a row; plain text is a single message of role "text"."""

    messages: tuple[Message, ...]
    place: Place


# Format -> the columns it needs. Detection takes the first format whose columns are all there.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
# Other names in common use for a column.
ALIASES = {"response": ("completion", "output"), "conversations": ("messages",)}
ROLES = ("system", "user", "assistant")
# Keys of a message that other tools give a meaning, and that would be lost here.
MEANINGFUL_KEYS = ("weight", "train", "tool_calls", "function_call", "thinking", "reasoning_content", "reasoning")
_CONTENT: dict[str, str] = {}  # folder -> its fingerprint when it was last asked for; hashing one takes a while
csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is less than a book


def read(source: str, text_unit: str = "line") -> Iterator[Row]:
    """Rows of one source, in order. Raises DataError naming file and line."""
    readers: dict[str, Callable[[str], Iterator[Row]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": lambda name: _read_text(name, text_unit),
    }
    suffix = Path(source).suffix.lower()
    reader: Callable[[str], Iterator[Row]] = _read_with_datasets
    if os.path.isdir(source) or (not os.path.exists(source) and _is_hub_name(source)):
        pass
    elif not os.path.exists(source):
        raise _absent(source)
    elif suffix not in readers:
        raise DataError(f"{source}: unknown file type {suffix!r}; use one of {' '.join(readers)}")
    else:
        reader = readers[suffix]
    empty = True
    try:
        for row in reader(source):
            empty = False
            yield row
    except OSError as exc:
        failures.reraise(exc, f"{source}: cannot be read now")
        raise DataError(f"{source}: cannot be read: {exc.strerror or exc}") from exc
    if empty:
        raise DataError(f"{source}: holds no rows; is it the right file?")


def _absent(source: str) -> DataError:
    return DataError(
        f"{source or '(empty name)'}: no such file; data.train and data.eval take files, or Hub names as owner/name[:split]"
    )


def sources(train: str | list[str], evaluation: str | list[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Training and evaluation sources, name -> hash of content. Raises DataError if one is both, or is named twice."""
    train_files = [train] if isinstance(train, str) else train
    eval_files = [evaluation] if isinstance(evaluation, str) else evaluation or []
    if not train_files:
        raise DataError("data.train: the list is empty; name at least one file")
    known: dict[str, str] = {}
    found: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for own, key, names in ((found[0], "data.train", train_files), (found[1], "data.eval", eval_files)):
        for name in names:
            content = fingerprint(name)
            if content in known:
                raise DataError(
                    f"{key}: {name} holds the same rows as {known[content]}; what is trained on cannot be evaluated on, nor be given twice"
                )
            known[content] = f"{key} {name}"
            own[name] = content
    return found


def detect_format(sources: list[str], text_unit: str, columns: Mapping[str, str]) -> str:
    """The one format of all sources, each from its first row. Raises DataError if they differ: a template fits one."""
    found = {source: detect(next(read(source, text_unit)), columns) for source in sources}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{source}: {format}" for source, format in found.items())
        raise DataError(f"the files hold rows of different formats ({listed}); bring them into one")
    return found[sources[0]]


def fingerprint(source: str) -> str:
    """Hash of what a source holds; changes when any byte of it does."""
    try:
        if os.path.isfile(source):
            with open(source, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if os.path.isdir(source):
            digest = hashlib.sha256()
            for path in sorted(p for p in Path(source).rglob("*") if p.is_file()):
                inside = path.relative_to(source)
                if not any(part.startswith(".") for part in inside.parts):  # .git and .cache are no rows
                    digest.update(f"{inside} {fingerprint(str(path))}\n".encode())
            _CONTENT[source] = digest.hexdigest()
            return _CONTENT[source]
    except OSError as exc:
        failures.reraise(exc, f"{source}: cannot be read now")
        raise DataError(f"{source}: cannot be read: {exc.strerror or exc}") from exc
    if _is_hub_name(source):
        return str(_load_dataset(source)._fingerprint)
    raise _absent(source)


def detect(row: Row, columns: Mapping[str, str] = MappingProxyType({})) -> str:
    """Format of the rows, from the columns of the first one. `columns` maps our name to the file's."""
    names = set(row.values) | {name for column in row.values for name in ALIASES.get(column, ())}
    names |= {ours for ours, theirs in columns.items() if theirs in row.values}
    for name, needed in FORMATS.items():
        if names.issuperset(needed):
            return name
    if len(row.values) == 1 and (other := re.search(r"[;\t|]", next(iter(row.values)))):
        raise DataError(
            f"{row.place}: a single column {next(iter(row.values))!r}; is it separated by {other[0]!r}? Use commas"
        )
    shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    raise DataError(
        f"{row.place}: columns {sorted(row.values)} fit no format ({shapes}); "
        "rename them, or map them with data.columns, for example {question: Patient, answer: Doctor}"
    )


def to_conversation(
    row: Row, format: str, columns: Mapping[str, str], system_prompt: str | None = None
) -> Conversation:
    """One row -> Conversation. `columns` maps our name to the file's. Raises DataError naming row and column."""

    def cell(name: str, may_be_empty: bool = False) -> str:
        return _text(row, columns.get(name) or _present(row, name), may_be_empty)

    known = _columns_of(format)
    if unused := [name for name in columns if name not in known]:
        raise ConfigError(
            f"data.columns: {unused[0]} is no column of format {format}, whose columns are {', '.join(known)}; remove it"
        )
    if format == "text":
        return Conversation((Message("text", cell("text"), supervised=True),), row.place)
    if format == "messages":
        messages = _messages(row, columns.get("messages") or _present(row, "messages"))
    else:
        user, answer = FORMATS[format]
        has_input = format == "instruction" and row.values.get(columns.get("input", "input")) is not None
        context = cell("input", may_be_empty=True) if has_input else ""
        messages = [Message("user", cell(user), context=context), Message("assistant", cell(answer), supervised=True)]
    if system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt))
    return Conversation(tuple(messages), row.place)


def unused_columns(source: str, text_unit: str, format: str, columns: Mapping[str, str]) -> list[str]:
    """Columns of a source's first row that its format does not read."""
    row = next(read(source, text_unit))
    return sorted(set(row.values) - {columns.get(name) or _present(row, name) for name in _columns_of(format)})


def _columns_of(format: str) -> tuple[str, ...]:
    return (*FORMATS[format], "input") if format == "instruction" else FORMATS[format]


def _present(row: Row, name: str) -> str:
    """The row's own name for a column: itself, or a common alias."""
    if name not in row.values:
        for alias, stands_for in ALIASES.items():
            if name in stands_for and alias in row.values:
                return alias
    return name


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    if column not in row.values:
        raise DataError(f"{row.place}: no column {column!r}; this row has {sorted(row.values)}")
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(f"{row.place}: column {column!r} should be text, got {_short(value)}; write it as a string")
    _require_unicode(f"{row.place}: column {column!r}", value)
    if not may_be_empty and not value.strip():
        raise DataError(f"{row.place}: column {column!r} is empty; fill it or remove the row")
    return value


def _require_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(
            f"{where} holds {text[exc.start]!a}, half of a character that was cut in two; remove it"
        ) from exc


def _messages(row: Row, column: str) -> list[Message]:
    """Check and convert a list of turns: system first if at all, then user and assistant in turn."""
    if column not in row.values:
        raise DataError(f"{row.place}: no column {column!r}; this row has {sorted(row.values)}")
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: column {column!r} should be a list of messages, got {_short(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{row.place}: message {number} of {column!r}"
        if not isinstance(turn, dict) or not {"role", "content"} <= set(turn):
            raise DataError(f"{where} should have role and content, got {_short(turn)}")
        role, content = turn["role"], turn["content"]
        if ignored := sorted(
            key for key in set(turn) & set(MEANINGFUL_KEYS) if turn[key] not in (None, [], "", 1, 1.0, True)
        ):
            raise DataError(
                f"{where} has {ignored[0]!r}, which would be ignored; remove it, or write it into the content"
            )
        if role not in ROLES:
            raise DataError(f"{where} has role {role!r}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where} ({role}) should have text as content, got {_short(content)}")
        _require_unicode(where, content)
        messages.append(Message(role, content, supervised=role == "assistant"))
    spoken = [message.role for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise DataError(f"{row.place}: a system message stands after the first message; it can only be the first")
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        ends = (
            "the conversation ends with the user, so there is nothing to learn last; "
            if spoken[-1:] == ["user"]
            else ""
        )
        raise DataError(
            f"{row.place}: {ends}roles should be user, assistant, user, assistant, ..., got {', '.join(spoken) or 'none'}"
        )
    return messages


def _lines(source: str) -> Iterator[tuple[int, str]]:
    with open(source, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.removeprefix(codecs.BOM_UTF8).decode("utf-8")
            except UnicodeDecodeError as exc:
                raise DataError(
                    f"{source}:{number}: byte {raw[exc.start]:#04x} at position {exc.start + 1} is not UTF-8; "
                    "save the file as UTF-8"
                ) from exc


def _record(place: Place, value: Any) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"{place}: a row should be an object like {{...}}, got {_short(value)}")
    return Row(place, value)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, without silent duplicate keys."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return values


def _read_jsonl(source: str) -> Iterator[Row]:
    for number, line in _lines(source):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=_object)
            except (ValueError, RecursionError) as exc:
                why = f"{exc.msg} at character {exc.pos + 1}" if isinstance(exc, json.JSONDecodeError) else str(exc)
                raise DataError(
                    f"{source}:{number}: broken JSON: {why}: {_short(line.strip())}; correct or remove it"
                ) from exc
            yield _record(Place(source, number), value)


def _read_json(source: str) -> Iterator[Row]:
    """A list of objects; a row's line is that of its opening brace."""
    text = "".join(line for _, line in _lines(source))
    decoder, position, line = json.JSONDecoder(object_pairs_hook=_object), len(text) - len(text.lstrip()), 1
    line += text.count("\n", 0, position)

    def skip(to: int) -> None:
        nonlocal position, line
        while to < len(text) and text[to] in " \t\r\n":
            to += 1
        line += text.count("\n", position, to)
        position = to

    if not text[position : position + 1] == "[":
        raise DataError(
            f"{source}:{line}: a .json file should hold a list of rows, [ {{...}}, ... ]; one object per line is .jsonl"
        )
    skip(position + 1)
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        try:
            value, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as exc:
            raise DataError(f"{source}:{exc.lineno}: broken JSON: {exc.msg} at column {exc.colno}; correct it") from exc
        except (ValueError, RecursionError) as exc:
            raise DataError(f"{Place(source, line, number)}: broken JSON: {exc}; correct it") from exc
        yield _record(Place(source, line, number), value)
        skip(end)
        separator = text[position : position + 1]
        if separator == ",":
            skip(position + 1)
            if text[position : position + 1] == "]":
                raise DataError(f"{source}:{line}: broken JSON: a row should follow the last comma; remove the comma")
        elif separator != "]":
            raise DataError(f"{source}:{line}: broken JSON: expected , or ] after a row, got {separator!r}")
    skip(position + 1)
    if position < len(text):
        raise DataError(
            f"{source}:{line}: broken JSON: the list of rows has ended, but there is {_short(text[position:])}; write one list"
        )


def _read_csv(source: str) -> Iterator[Row]:
    reader, start = csv.reader((line for _, line in _lines(source)), strict=True), 1
    try:
        header = next((cells for cells in reader if cells), None)
        if not header:
            return
        if len(set(header)) < len(header):
            raise DataError(f"{source}:{reader.line_num}: the header names a column twice: {header}; rename one")
        start = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{source}:{start}: {len(cells)} cells, but the header names {len(header)} columns {header}"
                )
            if cells:
                yield Row(Place(source, start), dict(zip(header, cells)))
            start = reader.line_num + 1
    except csv.Error as exc:
        raise DataError(f"{source}:{start}: broken CSV: {exc}; check the quotes of the row that begins here") from exc


def _read_text(source: str, unit: str) -> Iterator[Row]:
    start, block = 1, ""
    for number, line in _lines(source):
        boundary = unit == "line" or (unit == "paragraph" and not line.strip())
        block += line if unit != "paragraph" or line.strip() else ""
        if boundary:
            if block.strip():
                yield Row(Place(source, start), {"text": block.strip("\r\n")})
            start, block = number + 1, ""
    if block.strip():
        yield Row(Place(source, start), {"text": block.strip("\r\n")})


def _read_parquet(source: str) -> Iterator[Row]:
    from pyarrow import ArrowException, parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(source).iter_batches(batch_size=1_000):
            for values in batch.to_pylist():
                number += 1
                yield Row(Place(source, number), values)
    except ArrowException as exc:
        raise DataError(f"{source}: no whole Parquet file: {exc}") from exc


def _read_with_datasets(source: str) -> Iterator[Row]:
    for number, values in enumerate(_load_dataset(source), 1):
        yield Row(Place(source, number), values)


def _load_dataset(source: str) -> Any:
    """A folder, or a Hub name with an optional :split, as a datasets.Dataset."""
    import datasets

    datasets.disable_progress_bars()
    # datasets knows a folder again by times and sizes; here it is by content.
    content = (_CONTENT.get(source) or fingerprint(source)) if os.path.isdir(source) else None
    cache = os.path.join(datasets.config.HF_DATASETS_CACHE, content) if content else None
    name, _, split = source.partition(":") if cache is None else (source, "", "")
    try:
        return datasets.load_dataset(name, split=split or "train", cache_dir=cache)
    except Exception as exc:  # datasets raises a dozen kinds, many of them plain ValueError and OSError
        failures.reraise(exc, f"{source}: datasets cannot load it now")
        raise DataError(f"{source}: datasets cannot load it: {type(exc).__name__}: {exc}") from exc


def _is_hub_name(source: str) -> bool:
    name = source.partition(":")[0]
    is_file = Path(name).suffix.lower() in (".jsonl", ".json", ".csv", ".parquet", ".txt")
    return name.count("/") == 1 and not is_file and not name.startswith((".", "/", "~"))


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    return f"{text[:80]}..." if len(text) > 80 else text
