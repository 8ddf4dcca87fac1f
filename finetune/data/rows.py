"""Turn rows into conversations: choose the columns to read, and report wrong rows."""

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetune import failures, own_code
from finetune.data import readers, verdicts
from finetune.data.problems import Problems
from finetune.data.readers import Place, Row, list_columns, printable, short
from finetune.errors import ConfigError, DataError


@dataclass(frozen=True)
class Message:
    """One turn. `context` is the separate input of an instruction row, empty elsewhere."""

    role: str
    content: str
    supervised: bool = False
    context: str = ""
    from_setting: bool = field(default=False, compare=False)
    """Whether data.system_prompt added it; errors then name the setting, not the row."""


@dataclass(frozen=True)
class Conversation:
    """The one internal shape of what is learned; plain text is a single message of role "text"."""

    messages: tuple[Message, ...]
    place: Place


@dataclass(frozen=True)
class Sample:
    """What a row asks to be learned together: one conversation, or several, as two answers are.

    fields: what is known of it and never tokenised; for each name a number for each conversation.
    """

    conversations: tuple[Conversation, ...]
    fields: Mapping[str, tuple[float, ...]] = field(default_factory=dict)


# Format -> the columns it needs. Detection takes the first format whose columns are all there.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
PAIRS = ("question_answer", "prompt_completion", "instruction")  # formats of one question each
SHAPES = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
# Other names in common use for a column.
ALIASES = {"response": ("completion", "output"), "conversations": ("messages",)}
ROLES = ("system", "user", "assistant")
# ShareGPT's names of roles -> ours; its messages have `from` and `value`.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "assistant"), "assistant"),
    "system": "system",
}
SUPERVISED: tuple[Any, ...] = (None, [], "", 1, 1.0, True)
# Keys of a message that hold a part of it, which would be lost here.
PARTS = set("function_call reasoning reasoning_content thinking tool_call_id tool_calls".split())
READ_KEYS = {"role", "content", "from", "value"}
# Of a field, which is float32: the largest number, and the largest exact whole number.
MOST, WHOLE = 3.4028234663852886e38, 1 << 24
MOST_CHECKED = 10_000  # rows: reading takes 0.1 ms a row, and every start reads them again


def detect_format(
    sources: list[str],
    text_unit: str,
    columns: Mapping[str, str],
    for_training: bool = True,
    format: str = "auto",
) -> str:
    """Return the one format of all sources. Raise DataError if they differ: a template fits one.

    The first row of each source decides. `format`: auto, or a function of the user's own, which
    makes the rows to look at.
    """
    found: dict[str, list[str]] = {}
    for source in sources:
        rows = (
            row
            for row in readers.read(source, text_unit)
            if format == "auto" or not readers.is_empty(row)
        )
        made = next((made for made in (formatted(row, format) for row in rows) if made), None)
        if made:
            found.setdefault(detect(made[0][0], columns, for_training), []).append(source)
    if not found:
        raise DataError(
            f"{readers.some(sources)}: {_own(format)} returns None for every row, so no row is "
            "left to train on"
        )
    if len(found) > 1:
        listed = "; ".join(f"{format}: {readers.some(files)}" for format, files in found.items())
        raise DataError(
            f"the files hold rows of different formats ({listed}); convert them to one format, or "
            "list the files to read"
        )
    return next(iter(found))


Formatted = tuple[list[Row], dict[str, tuple[float, ...]]]
"""A row of each conversation of a sample, and the sample's fields."""


def formatted(row: Row, format: str) -> Formatted | None:
    """Return the rows and fields that the user's own function `format` makes of a row.

    None where it skips the row. Any other format leaves the row as it is. Raises DataError that
    names the row and the line of the function.
    """
    if not own_code.is_own(format):
        return [row], {}
    code = own_code.get(format)
    try:
        values = code.value(dict(row.values))
    except (Exception, SystemExit) as exc:
        if isinstance(exc, Exception):
            failures.reraise(exc)
        raise DataError(f"{row.place}: data.format: {code.blame(exc)}") from exc
    if values is None:
        return None
    where = f"{row.place}: data.format: {code}"
    fields, documents = {}, [values]
    if isinstance(values, dict):
        fields = values.get("fields", {})
        documents = [{name: value for name, value in values.items() if name != "fields"}]
        if isinstance(values.get("documents"), list):
            others, documents = documents[0].keys() - {"documents"}, values["documents"]
            if others:
                raise DataError(
                    f"{where} returns {list_columns(sorted(map(str, others)))} beside documents, "
                    "which would be ignored; move them into each document, or numbers into fields"
                )
    made = [_document(row.place, where, each) for each in documents]
    if not made:
        raise DataError(f"{where} returns no documents; return None to skip the row")
    return made, _fields(where, fields, len(made))


def _document(place: Place, where: str, values: Any) -> Row:
    """Check what a user's function returned for one conversation."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DataError(
            f"{where} should return a dict with messages, or prompt and completion, or text, or "
            f"documents (a list of such dicts), or None to skip the row, got {short(values)}"
        )
    if "fields" in values:
        raise DataError(f"{where} returns fields inside a document; return them beside documents")
    made = Row(place, values)
    if _fitting(made, {}) is None:
        raise DataError(
            f"{where} gives columns {list_columns(sorted(made.values))}, which fit no format "
            f"({SHAPES})"
        )
    return made


def _fields(where: str, fields: Any, count: int) -> dict[str, tuple[float, ...]]:
    """Check the fields of `count` conversations; a single number belongs to each of them."""
    found = {}
    for name, value in fields.items() if isinstance(fields, dict) else [(None, fields)]:
        numbers = value if isinstance(value, list | tuple) else [value] * count
        if (
            not isinstance(name, str)
            or len(numbers) != count
            or not all(isinstance(n, int | float) and abs(n) <= MOST for n in numbers)
        ):
            what = "fields" if name is None else f"fields: {short(name)}"
            raise DataError(
                f"{where}: {what} should be a finite number, or a list with one for each document "
                f"({count}), by name, got {value!r:.80}"
            )
        if inexact := next((n for n in numbers if isinstance(n, int) and abs(n) > WHOLE), None):
            raise DataError(
                f"{where}: fields: {short(name)} is {inexact:,}, but fields are float32, which "
                f"holds whole numbers up to {WHOLE:,}; make it smaller, such as a difference"
            )
        found[name] = tuple(map(float, numbers))
    return found


def _own(format: str) -> str:
    return str(own_code.get(format)) if own_code.is_own(format) else format


def detect(
    row: Row, columns: Mapping[str, str] = MappingProxyType({}), for_training: bool = True
) -> str:
    """Return the format of a row, from its columns.

    `columns` maps our name to the file's; `for_training`: see `samples`.
    """
    if name := _fitting(row, columns):
        return name
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise DataError(f"{row.place}: data.columns: {ours}: {_no_column(row, theirs)}")
    if for_training:
        _require_no_verdict(row, columns)
    mapping = _by_other_case(row) or "for example {question: Patient, answer: Doctor}"
    is_table = row.place.source.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    raise DataError(
        f"{row.place}: columns {list_columns(sorted(row.values))} fit no format ({SHAPES}); "
        + ("the first line should name the columns; " if is_table else "")
        + f"rename them, or map them with data.columns, {mapping}"
    )


def _fitting(row: Row, columns: Mapping[str, str]) -> str | None:
    """Return the first format whose columns are all there, or None."""
    present = set(row.values) | {name for column in row.values for name in ALIASES.get(column, ())}
    present |= {ours for ours, theirs in columns.items() if theirs in row.values}
    return next((name for name, needed in FORMATS.items() if present.issuperset(needed)), None)


def _by_other_case(row: Row) -> str | None:
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


def to_conversation(
    row: Row,
    format: str,
    columns: Mapping[str, str],
    system_prompt: str | None = None,
    for_training: bool = True,
) -> Conversation:
    """Convert one row to a Conversation. Raise DataError that names row and column.

    `columns` maps our name to the file's; `for_training`: see `samples`.
    """

    def cell(name: str, may_be_empty: bool = False) -> str:
        return _text(row, taken[name], may_be_empty)

    known = _columns_of(format)
    if unused := [name for name in columns if name not in known]:
        raise ConfigError(
            f"data.columns: {unused[0]} is not a column of format {format}, which has "
            f"{', '.join(known)}; remove it"
        )
    taken = _taken(row, format, columns)
    for ours, theirs in taken.items():
        if twice := [other for other in taken if other != ours and taken[other] == theirs]:
            raise ConfigError(
                f"data.columns: {ours} and {twice[0]} would both be read from column "
                f"{short(theirs)!r}; name another column for one of them"
            )
    if for_training and (
        format != "text" or verdicts.preference_columns(tuple(row.values), verdicts.REJECTED)
    ):
        _require_no_verdict(row, taken)
    if format == "text":
        return Conversation((Message("text", cell("text"), supervised=True),), row.place)
    if format == "messages":
        messages = _messages(row, taken["messages"], for_training)
    else:
        user, answer = FORMATS[format]
        has_input = "input" in taken and row.values.get(taken["input"]) is not None
        context = cell("input", may_be_empty=True) if has_input else ""
        messages = [
            Message("user", cell(user), context=context),
            Message("assistant", cell(answer), supervised=True),
        ]
    if system_prompt is not None and messages[0].role != "system":
        messages.insert(0, Message("system", system_prompt, from_setting=True))
    return Conversation(tuple(messages), row.place)


def samples(
    sources: Sequence[str],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    problems: Problems,
    unread: "Counter[str] | None" = None,
    for_training: bool = True,
) -> Iterator[Sample]:
    """Yield the rows of all sources as samples.

    `format` may be auto, or name a function of the user's own. Wrong rows are noted in `problems`;
    `unread` counts the rows that have a column that is not read. `for_training`: whether answers
    will be trained on; if so, a column that rates an answer makes its row wrong, as bad answers
    would be learned, too. Raises ConfigError if no row has a column that `columns` names.
    """
    missing = dict(columns)
    for source in sources:
        with problems.noted():  # stop reading a broken file
            own, before = "auto" if own_code.is_own(format) else format, problems.num_rows
            for rows, fields in _formatted_rows(source, format, text_unit, problems):
                if own == "auto":
                    own = detect(rows[0], columns, for_training)
                for row in rows:
                    for ours in [ours for ours, theirs in missing.items() if theirs in row.values]:
                        del missing[ours]
                    if unread is not None:
                        unread.update(_unread(row, set(_taken(row, own, columns).values())))
                sample = None
                with problems.noted():
                    made = (
                        to_conversation(row, own, columns, system_prompt, for_training)
                        for row in rows
                    )
                    sample = Sample(tuple(made), fields)
                if sample:
                    yield sample
            if problems.num_rows == before:
                raise DataError(
                    f"{printable(source)}: all its rows are empty; is it the right file?"
                )
    if missing and not problems:
        ours, theirs = next(iter(missing.items()))
        raise ConfigError(
            f"data.columns: {ours}: no row has a column {short(theirs)!r}; correct the name, or "
            "remove it"
        )


def _formatted_rows(
    source: str, format: str, text_unit: str, problems: Problems
) -> Iterator[Formatted]:
    """Yield the rows of a source, formatted; note or count the others in `problems`."""
    for row_of_file in readers.read(source, text_unit):
        if readers.is_empty(row_of_file):
            problems.num_empty += 1
            continue
        problems.num_rows += 1
        made = None
        with problems.noted():
            made = formatted(row_of_file, format)
            problems.num_skipped += made is None
        if made is not None:
            yield made


def check(
    groups: Sequence[Sequence[str]],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    most: int = MOST_CHECKED,
) -> None:
    """Raise DataError for rows that are wrong with any tokenizer, before anything is fetched.

    `groups`: the files of data.train, and those of data.eval. Reads the first `most` rows of each,
    and all of them once one is wrong; tokenising checks the rest.
    """
    problems = Problems()
    for sources in groups:
        stream = samples(sources, format, columns, text_unit, system_prompt, problems)
        for number, _ in enumerate(stream, 1):
            if number >= most and not problems:
                break
    problems.raise_if_any()


def _columns_of(format: str) -> tuple[str, ...]:
    return (*FORMATS[format], "input") if format == "instruction" else FORMATS[format]


def _taken(row: Row, format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return the columns that a format reads -> the row's own names of them."""
    taken = {
        name: columns[name] if name in columns else _present(row, name) for name in FORMATS[format]
    }
    if format == "instruction" and ("input" in columns or "input" not in taken.values()):
        taken["input"] = columns.get("input", "input")
    return taken


def _unread(row: Row, read: Set[str]) -> Iterator[str]:
    """Yield the filled columns that are not read, and keys of messages, as `messages[].name`."""
    for name, value in row.values.items():
        if name not in read and value not in (None, ""):
            yield name
    for column in read:
        turns = row.values.get(column)
        keys: set[str] = set()
        for turn in turns if isinstance(turns, list) else []:
            if isinstance(turn, dict):
                keys |= {key for key in turn.keys() - READ_KEYS if turn[key] not in (None, "")}
        yield from (f"{column}[].{key}" for key in keys)


def _require_no_verdict(row: Row, taken: Mapping[str, str]) -> None:
    """Raise DataError for a column that rates the answer: training would learn bad answers.

    `taken`: our names of the columns that are read -> the row's own.
    """
    names, read = tuple(row.values), set(taken.values())
    chosen, rejected = (
        verdicts.preference_columns(names, words) for words in (verdicts.CHOSEN, verdicts.REJECTED)
    )
    if read & set(chosen):
        return  # data.columns chooses the good answers
    for column in (*rejected, *chosen):
        if row.values[column] is not None:
            remedy = _to_train_on_chosen(row, column, taken, chosen, rejected)
            raise DataError(
                f"{row.place}: column {short(column)!r} belongs to preference rows (DPO, reward "
                f"models), which are not supported yet; {remedy}"
            )
    for column in verdicts.verdict_columns(names):
        if column not in read and verdicts.is_verdict(row.values[column], column):
            raise DataError(
                f"{row.place}: column {column!r} ({short(row.values[column])}) says how good an "
                "answer is, but training would learn every answer as a good one; preference, KTO "
                "and reward training are not supported yet: keep the good rows and drop the "
                f"column, or rename it to '_{column}' if it means something else"
            )


def _to_train_on_chosen(
    row: Row, column: str, taken: Mapping[str, str], chosen: Sequence[str], rejected: Sequence[str]
) -> str:
    """Say how to train on the good answer of a preference row, by where that answer stands."""
    best = next((name for name in chosen if isinstance(row.values[name], str | list | dict)), None)
    if best is None:
        if isinstance(row.values[column], str | list | dict):
            return "to train on the other answers only, drop the column"
        return "keep the good rows and drop the column"
    aim, answer = "to train on the chosen answers only, ", row.values[best]
    drop = f"drop the columns {list_columns(sorted({*chosen, *rejected}))}"
    if isinstance(answer, list) and (not answer or _role(answer[0]) != "assistant"):
        return f"{aim}write data.columns: {{messages: {short(best)}}}"
    for name in (taken.get("messages"), "messages", "conversations", "prompt"):
        turns = row.values.get(name) if name else None
        if isinstance(turns, list) and turns:
            if _role(turns[-1]) == "assistant":
                return f"{aim}{drop}: {short(name)!r} has an answer of its own"
            is_text = isinstance(answer, str)
            what = short(best) + (", as a message of the assistant," if is_text else "")
            rename = ", and rename it to 'messages'" if name == "prompt" else ""
            return f"{aim}append {what} to {short(name)}{rename}; then {drop}"
    if not isinstance(answer, str):
        return f"{aim}write them as text into a column named completion; then {drop}"
    otherwise = f", or {drop}" if _fitting(row, taken) not in (None, "text") else ""
    return f"{aim}write data.columns: {_mapping(row, best, taken, rejected)}{otherwise}"


def _mapping(row: Row, best: str, taken: Mapping[str, str], rejected: Sequence[str]) -> str:
    """Return data.columns for a row whose column `best` holds the text of the answer."""
    for ours, answer in (FORMATS[name] for name in PAIRS):
        theirs = taken.get(ours, ours)
        if isinstance(row.values.get(theirs), str):
            asked = "" if theirs == ours else f"{ours}: {short(theirs)}, "
            return f"{{{asked}{answer}: {short(best)}}}"
    answers = (best, *rejected)
    texts = [name for name, value in row.values.items() if isinstance(value, str)]
    others = [name for name in texts if name not in answers]
    if not others:
        return f"{{text: {short(best)}}}, which learns all of the text"
    if len(others) == 1:
        return f"{{prompt: {short(others[0])}, completion: {short(best)}}}"
    return f"{{prompt: NAME, completion: {short(best)}}}, with the NAME of the column that asks"


def _role(turn: Any) -> str | None:
    """Return our name for the author of a message."""
    name = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return SHAREGPT_ROLES.get(name) if isinstance(name, str) else None


def _no_column(row: Row, column: str) -> str:
    known = {name.strip().lower(): name for name in row.values if len(name) <= 200}
    near = difflib.get_close_matches(column.strip().lower()[:200], known, n=1)
    return (
        f"no column {short(column)!r}; "
        + (f"did you mean {known[near[0]]!r}? " if near else "")
        + f"this row has {list_columns(sorted(row.values))}"
    )


def _present(row: Row, name: str) -> str:
    """Return the row's own name for a column: itself, or a common alias."""
    if name not in row.values:
        for alias, stands_for in ALIASES.items():
            if name in stands_for and alias in row.values:
                return alias
    return name


def _text(row: Row, column: str, may_be_empty: bool = False) -> str:
    if column not in row.values:
        raise DataError(f"{row.place}: {_no_column(row, column)}")
    value = row.values[column]
    if not isinstance(value, str):
        raise DataError(
            f"{row.place}: column {column!r} should be text, got {short(value)}; write it as a "
            "string"
        )
    _require_unicode(f"{row.place}: column {column!r}", value)
    if not may_be_empty and not value.strip():
        raise DataError(f"{row.place}: column {column!r} is empty; fill it or remove the row")
    return value


def _require_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(
            f"{where} holds {text[exc.start]!a}, half of a character; remove it"
        ) from exc


def _messages(row: Row, column: str, for_training: bool) -> list[Message]:
    """Check and convert a list of turns: an optional system message, then user and assistant."""
    if column not in row.values:
        raise DataError(f"{row.place}: {_no_column(row, column)}")
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{row.place}: column {column!r} should be a list of messages, got {short(turns)}"
        )
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{row.place}: message {number} of {column!r}"
        keys = turn.keys() if isinstance(turn, dict) else set()
        if {"from", "value"} <= keys and not {"role", "content"} & keys:
            if not isinstance(turn["from"], str) or turn["from"] not in SHAREGPT_ROLES:
                raise DataError(
                    f"{where} comes from {short(turn['from'])!r}; ShareGPT's names are "
                    f"{', '.join(SHAREGPT_ROLES)}"
                )
            turn = {**turn, "role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{where} should have role and content, got {short(turn)}")
        role, content = turn["role"], turn["content"]
        _require_nothing_lost(where, turn, for_training)
        if role not in ROLES:
            raise DataError(f"{where} has role {short(repr(role))}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where} ({role}) should have text as content, got {short(content)}")
        _require_unicode(where, content)
        messages.append(Message(role, content, supervised=role == "assistant"))
    spoken = [message.role for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise DataError(
            f"{row.place}: a system message stands after the first message; it can only be the "
            "first"
        )
    if spoken != ["user", "assistant"] * (len(spoken) // 2) or not spoken:
        hint = ""
        if spoken[-1:] == ["user"]:
            hint = "the conversation ends with the user, so it has no last answer to learn; "
        raise DataError(
            f"{row.place}: {hint}roles should be user, assistant, user, assistant, ..., got "
            f"{short(', '.join(spoken)) or 'none'}"
        )
    return messages


def _require_nothing_lost(where: str, turn: dict[str, Any], for_training: bool) -> None:
    """Raise DataError for a key of a message that would be lost: a rating, a mask, a part."""
    extra = tuple(sorted(turn.keys() - READ_KEYS))
    for key in extra:
        value, words = turn[key], verdicts.words(key)
        if key in PARTS and value not in SUPERVISED:
            raise DataError(
                f"{where} has {key!r}, which would be ignored; remove it, or write it into the "
                "content"
            )
        if turn["role"] != "assistant" and value in (0, False):
            continue  # true anyway: only answers are supervised
        usual = SUPERVISED[:3] if words & verdicts.MASKS else SUPERVISED
        if for_training and words & verdicts.LEARNING and value not in usual:
            raise DataError(
                f"{where} has {key!r}, which would be ignored ({short(value)}), and training would "
                "learn every answer; remove what should not be learned, and the key with it; if it "
                f"means something else, rename it to '_{key}'"
            )
    for key in (
        verdicts.verdict_columns(extra) if for_training and turn["role"] == "assistant" else ()
    ):
        if not verdicts.words(key) & verdicts.LEARNING and verdicts.is_verdict(turn[key], key):
            raise DataError(
                f"{where} has {key!r}, which would be ignored ({short(turn[key])}): it says how "
                "good the answer is, but training would learn every answer as a good one; keep the "
                f"good ones and remove the key, or rename it to '_{key}' if it means something else"
            )
