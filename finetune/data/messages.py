"""Turn a list of turns, of OpenAI's form or ShareGPT's, into messages."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from finetune import failures
from finetune.data import verdicts
from finetune.data.conversations import THOUGHTS, Message
from finetune.data.places import Place, short
from finetune.errors import DataError

# Names of roles -> ours. OpenAI's developer messages took the place of system messages.
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "call"),  # ShareGPT's: the value is JSON
}
SUPERVISED: tuple[Any, ...] = (None, [], "", 1, 1.0, True)
# Keys that hold the thoughts of an answer, as transformers reads them: the first that is filled.
THINKING_KEYS = (THOUGHTS, "thinking", "reasoning")
READ_KEYS = {"role", "content", "from", "value"}
CALL_KEYS = {"tool_calls", "function_call"}
TOOL_KEYS = {"tool_call_id", "name"}  # of a tool's message
# Keys that say whether to learn an answer, by 0 or 1, true or false.
TRAINED_KEYS = ("train", "training", "trainable", "weight", "loss")
OF_ROLE = {"tool": TOOL_KEYS, "assistant": {"weight", *THINKING_KEYS}}  # further keys that are read
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6  # besides 0; float32 holds all of them
MAPPED_ROLES = ("user", "assistant")  # which data.columns can give other names
# System and user, answers and calls of tools with their results, each by its letter.
_ORDER = re.compile(r"(?:U(?:CT+)*A)*U(?:CT+)*[AC]")


def role_of(turn: Any) -> str | None:
    """Return our name for the author of a message."""
    name = (turn.get("role") or turn.get("from")) if isinstance(turn, dict) else None
    return ROLES.get(name) if isinstance(name, str) else None


def unread_keys(turns: Any, columns: Mapping[str, str]) -> set[str]:
    """Return the filled keys of messages that are not read."""
    read = READ_KEYS | {columns[name] for name in ("role", "content") if name in columns}
    found: set[str] = set()
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict):
            also = CALL_KEYS | OF_ROLE.get(role_of(turn) or "", set())
            found |= {k for k in turn.keys() - read - also if turn[k] not in (None, "")}
    return found


def read_messages(
    place: Place, column: str, turns: Any, for_training: bool = True,
    columns: Mapping[str, str] = MappingProxyType({}),
) -> list[Message]:  # fmt: skip
    """Convert a list of turns, in any order. Raise DataError that names place and column.

    `columns`: data.columns, whose role, content, user and assistant are names inside messages.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # of a table
        turns = _parsed(f"{place}: column {column!r}", turns)
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{place}: column {column!r} should be a list of messages, got {short(turns)}"
        )
    return [
        _message(f"{place}: message {number} of {column!r}", turn, for_training, columns)
        for number, turn in enumerate(turns, 1)
    ]


def _message(where: str, turn: Any, for_training: bool, columns: Mapping[str, str]) -> Message:
    name, content = _author_and_content(where, turn, columns)
    role = ROLES.get(name) if isinstance(name, str) else None
    for ours in MAPPED_ROLES:
        if ours in columns and name == columns[ours]:
            role = ours
    if role is None:
        listed = ", ".join(dict.fromkeys([*_mapped(columns), *ROLES]))
        raise DataError(f"{where} has role {short(repr(name))}; roles are {listed}")
    if role == "call":
        role, turn, content = "assistant", {**turn, "tool_calls": _parsed(where, content)}, ""
    parts: dict[str, Any] = {}
    if calls := _calls(where, turn):
        if role != "assistant":
            raise DataError(f"{where} ({role}) has tool calls, which only the assistant makes")
        parts["tool_calls"] = calls
    if role == "tool":
        parts = {key: turn[key] for key in sorted(TOOL_KEYS) if turn.get(key) is not None}
    if role == "assistant" and (thoughts := _thoughts(where, turn)):
        parts[THOUGHTS] = thoughts
    _require_nothing_lost(where, role, turn, for_training, columns)
    text = _text(where, role, content, may_be_empty=bool(calls) or role == "tool")
    supervised = role == "assistant" and (not for_training or _is_trained(turn))
    weight = _weight(where, turn) if supervised and for_training else 1.0
    return Message(role, text, supervised=supervised, weight=weight, parts=parts)


def _thoughts(where: str, turn: Mapping[str, Any]) -> str:
    """Return the thoughts of an answer that stand beside its content."""
    for key in THINKING_KEYS:
        if turn.get(key) not in SUPERVISED:
            if not isinstance(turn[key], str):
                raise DataError(f"{where} should have text as {key}, got {short(turn[key])}")
            require_unicode(f"{where}: {key}", turn[key])
            return str(turn[key])
    return ""


def _weight(where: str, turn: Mapping[str, Any]) -> float:
    """Return the weight of an answer that is trained on. Raise DataError for what is none."""
    value = turn.get("weight")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 1.0  # `_require_nothing_lost` refuses what means something else
    if not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        raise DataError(
            f"{where} has the weight {short(value)}; it should be 0, or a number from "
            f"{LEAST_WEIGHT:g} to {MOST_WEIGHT:g}"
        )
    return float(value)


def _mapped(columns: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of roles that data.columns gives."""
    yield from (short(columns[ours]) for ours in MAPPED_ROLES if ours in columns)


def _author_and_content(where: str, turn: Any, columns: Mapping[str, str]) -> tuple[Any, Any]:
    keys = turn.keys() if isinstance(turn, dict) else set()
    role, content = columns.get("role", "role"), columns.get("content", "content")
    if {"from", "value"} <= keys and not {role, content} & keys:
        role, content = "from", "value"
    if not isinstance(turn, dict) or role not in keys:
        raise DataError(f"{where} should have {role} and content, got {short(turn)}")
    if content not in keys and not CALL_KEYS & keys:
        raise DataError(f"{where} should have role and {content}, got {short(turn)}")
    return turn[role], turn.get(content)


def _text(where: str, role: str, content: Any, may_be_empty: bool) -> str:
    """Return the text of a message; that of a list of parts is the text of all of them."""
    if isinstance(content, list) and content:
        texts = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            if not isinstance(text, str):
                kind = part.get("type") if isinstance(part, dict) else part
                raise DataError(
                    f"{where} ({role}) should have text as content, got a part of type "
                    f"{short(repr(kind))}: {short(part)}; only text can be learned"
                )
            texts.append(text)
        content = "".join(texts)
    if content is None and may_be_empty:
        content = ""
    may_be_empty = may_be_empty or role == "system"  # not the same as none: templates have defaults
    if not isinstance(content, str) or not (content.strip() or may_be_empty):
        found = "an empty one" if isinstance(content, str) else short(content)
        raise DataError(f"{where} ({role}) should have text as content, got {found}")
    require_unicode(where, content)
    return content


def require_unicode(where: str, text: str) -> None:
    """Raise DataError for half of a character, which no encoding can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise DataError(
            f"{where} holds {text[exc.start]!a}, half of a character; remove it"
        ) from exc


# -------------------------------------------------------------------------------------- tools


def read_tools(where: str, tools: Any) -> tuple[Mapping[str, Any], ...]:
    """Return the descriptions of tools: a list of objects, or JSON of one."""
    if tools in (None, "", []):
        return ()
    if isinstance(tools, str):
        tools = _parsed(where, tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where} should be a list of descriptions of tools, got {short(tools)}")
    require_unicode(where, json.dumps(tools, ensure_ascii=False, default=str))
    return tuple(_without_nulls(tool) for tool in tools)


def _without_nulls(value: Any) -> Any:
    """Drop null entries of objects: Parquet and Arrow give each row the keys of all rows."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _parsed(where: str, text: Any) -> Any:
    """Return what JSON text in a row holds, and anything else as it is."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        why = failures.parsing_reason(exc)
        raise DataError(f"{where} should be JSON, but {why}: {short(text)}; correct it") from exc


def _calls(where: str, turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tool calls of a message as templates take them: arguments are objects."""
    calls = turn.get("tool_calls")
    if turn.get("function_call"):
        calls = [turn["function_call"]]
    found = []
    if calls is None or calls == "":
        return []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(f"{where} should have tool calls with name and arguments, got "
                            f"{short(calls)}")  # fmt: skip
        arguments = _parsed(f"{where}: arguments of {short(inner['name'])}", inner.get("arguments"))
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where}: arguments of {short(inner['name'])} should be an object, got "
                f"{short(arguments)}"
            )
        function = {"name": inner["name"], "arguments": _without_nulls(arguments)}
        require_unicode(where, json.dumps(function, ensure_ascii=False, default=str))
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**kept, "type": "function", "function": function})
    return found


# ------------------------------------------------------------------------- order and supervision


def repaired(messages: list[Message]) -> tuple[list[Message], list[str]]:
    """Join turns of one role in a row, and drop what has no place; return what was changed."""
    changes, kept = [], list[Message]()
    head = 1 if messages[0].role == "system" else 0
    for message in messages:
        before = kept[-1] if kept else Message("", "")
        has_parts = bool(before.parts or message.parts)
        is_same = (before.role, before.supervised, before.weight) == (
            message.role, message.supervised, message.weight,
        )  # fmt: skip
        if is_same and not has_parts and message.role in ("user", "assistant"):
            kept[-1] = replace(before, content=f"{before.content}\n\n{message.content}")
            changes.append("turns of one role in a row joined")
        else:
            kept.append(message)
    if len(kept) > head and kept[head].role == "assistant" and not kept[head].has_calls:
        del kept[head]
        changes.append("a first turn of the assistant dropped")
    if kept and kept[-1].role == "user":
        kept.pop()
        changes.append("a last turn of the user dropped")
    return (kept, changes) if kept else (messages, [])


def require_order(place: Place, messages: list[Message], can_repair: bool = True) -> None:
    """Raise DataError unless an optional system message, then user and assistant, take turns.

    An answer may be preceded by calls of tools, each followed by results. `can_repair`: whether
    data.repair_turns works on such rows.
    """
    spoken = [message for message in messages if message.role != "system"]
    if any(message.role == "system" for message in messages[1:]):
        raise DataError(
            f"{place}: a system message stands after the first message; it can only be the first"
        )
    letters = {"user": "U", "assistant": "A", "tool": "T"}
    order = "".join("C" if m.has_calls else letters[m.role] for m in spoken)
    if _ORDER.fullmatch(order):
        return
    hint = ""
    if order.endswith("U"):
        hint = "the conversation ends with the user, so it has no last answer to learn; "
    elif order.endswith("T"):
        hint = "the conversation ends with the result of a tool, without an answer; "
    roles = ", ".join(message.role for message in spoken)
    remedy = ""
    if can_repair and "T" not in order:
        remedy = "; data.repair_turns: true joins or drops such turns"
    usual = "user, assistant, user, assistant, ..."
    if "T" in order or "C" in order:
        usual = "user, assistant with tool calls, tool, assistant, ..."
    raise DataError(f"{place}: {hint}roles should be {usual}, got {short(roles) or 'none'}{remedy}")


def require_supervised(place: Place, messages: list[Message]) -> None:
    """Raise DataError if a row says of each of its answers that it is not to be learned."""
    if not any(message.supervised for message in messages):
        raise DataError(
            f"{place}: says of every answer not to train on it ({', '.join(TRAINED_KEYS[:2])}: "
            "false, weight: 0), so it teaches nothing; remove the row"
        )


def _is_trained(turn: Mapping[str, Any]) -> bool:
    return all(turn.get(key) not in (0, False) for key in TRAINED_KEYS)


def _require_nothing_lost(
    where: str, role: str, turn: dict[str, Any], for_training: bool, columns: Mapping[str, str]
) -> None:
    """Raise DataError for a key of a message that would be lost: a rating, a mask, a part."""
    extra = tuple(sorted(map(str, turn.keys() - READ_KEYS - set(columns.values()))))
    for key in extra:
        value, words = turn.get(key), verdicts.words(key)
        if key in THINKING_KEYS and role != "assistant" and value not in SUPERVISED:
            raise DataError(
                f"{where} has {key!r}, which would be ignored; remove it, or write it into the "
                "content"
            )
        if value in (0, False) and (role != "assistant" or key in TRAINED_KEYS):
            continue  # true of all but answers, and of these read
        if (role, key) == ("assistant", "weight") and isinstance(value, (int, float)):
            continue
        usual = SUPERVISED[:3] if words & verdicts.MASKS else SUPERVISED
        if for_training and words & verdicts.LEARNING and value not in usual:
            raise DataError(
                f"{where} has {key!r}, which would be ignored ({short(value)}), and training would "
                "learn every answer; remove what should not be learned, and the key with it "
                "(train can be true or false, and weight a number); if it means something else, "
                f"rename it to '_{key}'"
            )
    for key in verdicts.verdict_columns(extra) if for_training and role == "assistant" else ():
        if not verdicts.words(key) & verdicts.LEARNING and verdicts.is_verdict(turn[key], key):
            raise DataError(
                f"{where} has {key!r}, which would be ignored ({short(turn[key])}): it says how "
                "good the answer is, but training would learn every answer as a good one; keep the "
                f"good ones and remove the key, or rename it to '_{key}' if it means something else"
            )
