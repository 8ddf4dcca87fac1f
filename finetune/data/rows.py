"""Turn rows into conversations: which columns are read, and what is wrong with a row."""

import difflib
import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from finetune.data import readers
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
    """Whether data.system_prompt put it there, so that messages name the setting and not the row."""


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
# How ShareGPT calls them; its messages have `from` and `value`.
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# Words in the name of a column that says how good an answer is, where its values are numbers, yes or no.
VERDICTS = set(
    "accepted approved bad chosen correct correctness desirable dislike dislikes downvotes feedback good grade harmful harmless helpful "
    "helpfulness incorrect label labels like likes liked preference preferred quality rank rating ratings rejected reward rewards "
    "safe score scores stars thumb thumbs toxic toxicity upvotes verdict vote votes weight winner wrong".split()
)
VERDICT_VALUES = set(
    "true false yes no good bad correct incorrect right wrong pass fail accepted rejected chosen up down".split()
)
# Keys of a message that other tools give a meaning, and that would be lost here.
MEANINGFUL_KEYS = ("weight", "train", "tool_calls", "function_call", "thinking", "reasoning_content", "reasoning")
MOST_PROBLEMS = 10  # shown one by one; more are summed up by kind


def detect_format(sources: list[str], text_unit: str, columns: Mapping[str, str], learned: bool = True) -> str:
    """The one format of all sources, each from its first row. Raises DataError if they differ: a template fits one."""
    found: dict[str, list[str]] = {}
    for source in sources:
        found.setdefault(detect(next(readers.read(source, text_unit)), columns, learned), []).append(printable(source))
    if len(found) > 1:
        listed = "; ".join(
            f"{format}: {', '.join(files[:3])}" + (f" and {len(files) - 3:,} others" if len(files) > 3 else "")
            for format, files in found.items()
        )
        raise DataError(
            f"the files hold rows of different formats ({listed}); bring them into one, or list those to read"
        )
    return next(iter(found))


def detect(row: Row, columns: Mapping[str, str] = MappingProxyType({}), learned: bool = True) -> str:
    """Format of the rows, from the columns of the first one. `columns` maps our name to the file's; `learned`: see `conversations`."""
    present = set(row.values) | {name for column in row.values for name in ALIASES.get(column, ())}
    present |= {ours for ours, theirs in columns.items() if theirs in row.values}
    for name, needed in FORMATS.items():
        if present.issuperset(needed):
            return name
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise DataError(f"{row.place}: data.columns: {ours}: {_no_column(row, theirs)}")
    if learned:
        _require_no_verdict(row, set(columns.values()))
    shapes = "; ".join(f"{name}: {', '.join(needed)}" for name, needed in FORMATS.items())
    is_table = row.place.source.lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    raise DataError(
        f"{row.place}: columns {list_columns(sorted(row.values))} fit no format ({shapes}); "
        + ("the first line should name the columns; " if is_table else "")
        + "rename them, or map them with data.columns, for example {question: Patient, answer: Doctor}"
    )


def to_conversation(
    row: Row, format: str, columns: Mapping[str, str], system_prompt: str | None = None, learned: bool = True
) -> Conversation:
    """One row -> Conversation. `columns` maps our name to the file's; `learned`: see `conversations`.

    Raises DataError naming row and column.
    """

    def cell(name: str, may_be_empty: bool = False) -> str:
        return _text(row, columns.get(name) or _present(row, name), may_be_empty)

    known = _columns_of(format)
    if unused := [name for name in columns if name not in known]:
        raise ConfigError(
            f"data.columns: {unused[0]} is no column of format {format}, whose columns are {', '.join(known)}; remove it"
        )
    if learned and (format != "text" or "rejected" in row.values):
        _require_no_verdict(row, read_columns(row, format, columns))
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
        messages.insert(0, Message("system", system_prompt, from_setting=True))
    return Conversation(tuple(messages), row.place)


class Problems:
    """What is wrong with rows. All are read before anything is said, so that one start shows every kind of mistake."""

    def __init__(self) -> None:
        self.num_rows = 0
        """Rows read, right or wrong."""
        self._first: list[str] = []
        self._kinds: dict[str, list[str]] = {}  # kind -> its first messages
        self._counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take down a DataError of the block, and go on."""
        try:
            yield
        except DataError as exc:
            self.note(str(exc))

    def note(self, message: str, kind: str | None = None) -> None:
        """`message` begins with the place. Its kind is by default the message without place, numbers and values."""
        kind = kind or re.sub(
            r"\d+", "#", re.split(r", got |; this row has |: it renders ", message.partition(": ")[2])[0]
        )
        self._counts[kind] += 1
        for kept in (self._first, self._kinds.setdefault(kind, [])):
            if len(kept) < MOST_PROBLEMS:
                kept.append(message)

    def count(self, kind: str) -> int:
        return self._counts[kind]

    def tell(self, sums: Mapping[str, str] = MappingProxyType({})) -> None:
        """Raise DataError if anything was noted: each row, or if there are many, each kind. `sums`: what to say of a kind."""
        if not self:
            return
        if len(self) == 1:
            raise DataError(self._first[0])
        lines = self._first
        if len(self) > MOST_PROBLEMS:
            kinds = self._counts.most_common()
            lines = [sums.get(kind) or self._sum(kind, count) for kind, count in kinds[:MOST_PROBLEMS]]
            if len(kinds) > MOST_PROBLEMS:
                lines.append(f"and {len(kinds) - MOST_PROBLEMS:,} more kinds of mistakes")
        listed = "".join(f"\n  {line}" for line in lines)
        raise DataError(f"{len(self):,} of {max(len(self), self.num_rows):,} rows are wrong:{listed}")

    def _sum(self, kind: str, count: int) -> str:
        first, *others = self._kinds[kind]
        if count == 1:
            return first
        file = first.partition(": ")[0].rpartition(":")[0]
        places = [other.partition(": ")[0].removeprefix(f"{file}:") for other in others]
        return f"{first} ({count - 1:,} more like it: {', '.join(places)}{', ...' if count > len(places) + 1 else ''})"


def conversations(
    sources: Sequence[str],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    problems: Problems,
    unread: "Counter[str] | None" = None,
    learned: bool = True,
) -> Iterator[Conversation]:
    """Rows of all sources as conversations; `format` may be auto.

    What is wrong with rows goes into `problems`, and into `unread` how many rows have a column that is not read.
    `learned`: a column that says how good an answer is makes a row wrong, as training would learn bad answers, too.
    Raises ConfigError if no row has a column that `columns` names.
    """
    missing = dict(columns)
    for source in sources:
        with problems.noted():  # a file that is broken is read no further
            own = format
            for row in readers.read(source, text_unit):
                problems.num_rows += 1
                if own == "auto":
                    own = detect(row, columns, learned)
                for ours in [ours for ours, theirs in missing.items() if theirs in row.values]:
                    del missing[ours]
                if unread is not None:
                    others = row.values.keys() - read_columns(row, own, columns)
                    unread.update(name for name in others if row.values[name] not in (None, ""))
                conversation = None
                with problems.noted():
                    conversation = to_conversation(row, own, columns, system_prompt, learned)
                if conversation:
                    yield conversation
    if missing and not problems:
        ours, theirs = next(iter(missing.items()))
        raise ConfigError(
            f"data.columns: {ours}: no row has a column {short(theirs)!r}; correct the name, or remove it"
        )


def check(
    sources: Sequence[str],
    format: str,
    columns: Mapping[str, str],
    text_unit: str,
    system_prompt: str | None,
    most: int = 10_000,
) -> None:
    """Raise DataError for rows that are wrong whatever the tokenizer, so that nothing is fetched before they are mended.

    Looks at the first `most` rows, and at all of them once one is wrong; the rest is looked at when it is tokenised.
    """
    problems = Problems()
    for number, _ in enumerate(conversations(sources, format, columns, text_unit, system_prompt, problems), 1):
        if number >= most and not problems:
            return
    problems.tell()


def _columns_of(format: str) -> tuple[str, ...]:
    return (*FORMATS[format], "input") if format == "instruction" else FORMATS[format]


def read_columns(row: Row, format: str, columns: Mapping[str, str]) -> set[str]:
    """The row's own names of the columns that its format reads."""
    return {columns.get(name) or _present(row, name) for name in _columns_of(format)}


def _require_no_verdict(row: Row, read: Set[str]) -> None:
    """Raise DataError for a column that says how good the answer is: without it bad answers are learned as right ones."""
    if "chosen" in read:
        return  # the user has said which answers to learn
    for column in ("rejected", "chosen"):
        if row.values.get(column) is not None:
            target = (
                "messages"
                if isinstance(row.values["chosen" if "chosen" in row.values else column], list)
                else "completion"
            )
            raise DataError(
                f"{row.place}: column {column!r} belongs to preference rows (DPO, reward models), which cannot be trained on yet; "
                f"to learn the chosen answers alone, write data.columns: {{{target}: chosen}}, or drop the column"
            )
    for column in _verdict_columns(tuple(row.values)):
        if column not in read and _is_verdict(row.values[column]):
            raise DataError(
                f"{row.place}: column {column!r} ({short(row.values[column])}) says how good an answer is, and every answer would be "
                "learned as a right one; such rows are for preference, KTO or reward training, which is not there yet: keep the "
                f"good rows and drop the column, or call it '_{column}' if it says something else"
            )


@functools.lru_cache(1_000)
def _verdict_columns(columns: tuple[str, ...]) -> list[str]:
    """Columns whose name holds a word of VERDICTS, as is_good, rewardScore, score_2; not those that begin with _."""
    split = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
    return [
        column
        for column in columns
        if not column.startswith("_") and VERDICTS & {word.lower() for word in split.findall(column[:200])}
    ]


def _is_verdict(value: Any) -> bool:
    if isinstance(value, str):
        text = value.strip().lower()
        return bool(re.fullmatch(r"[+-]?\d*[.,]?\d+(e[+-]?\d+)?", text)) or text in VERDICT_VALUES
    if isinstance(value, list):
        return bool(value) and all(map(_is_verdict, value))
    return isinstance(value, (bool, int, float))


def _no_column(row: Row, column: str) -> str:
    known = {name.strip().lower(): name for name in row.values if len(name) <= 200}
    near = difflib.get_close_matches(column.strip().lower()[:200], known, n=1)
    return (
        f"no column {short(column)!r}; "
        + (f"did you mean {known[near[0]]!r}? " if near else "")
        + f"this row has {list_columns(sorted(row.values))}"
    )


def _present(row: Row, name: str) -> str:
    """The row's own name for a column: itself, or a common alias."""
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
        raise DataError(f"{row.place}: column {column!r} should be text, got {short(value)}; write it as a string")
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
        raise DataError(f"{row.place}: {_no_column(row, column)}")
    turns = row.values[column]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{row.place}: column {column!r} should be a list of messages, got {short(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        where = f"{row.place}: message {number} of {column!r}"
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys() and not {"role", "content"} & turn.keys():
            if turn["from"] not in SHAREGPT_ROLES:
                raise DataError(
                    f"{where} comes from {short(turn['from'])!r}; those of ShareGPT that can be read are {', '.join(SHAREGPT_ROLES)}"
                )
            turn = {**turn, "role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
            raise DataError(f"{where} should have role and content, got {short(turn)}")
        role, content = turn["role"], turn["content"]
        if ignored := sorted(
            key for key in turn.keys() & set(MEANINGFUL_KEYS) if turn[key] not in (None, [], "", 1, 1.0, True)
        ):
            raise DataError(
                f"{where} has {ignored[0]!r}, which would be ignored; remove it, or write it into the content"
            )
        if role not in ROLES:
            raise DataError(f"{where} has role {short(repr(role))}; roles are {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{where} ({role}) should have text as content, got {short(content)}")
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
            f"{row.place}: {ends}roles should be user, assistant, user, assistant, ..., got {short(', '.join(spoken)) or 'none'}"
        )
    return messages
