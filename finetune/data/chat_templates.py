"""Find a template by its name in the config: built in, the tokenizer's own, or in a file."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from finetune.data.built_in_templates import BUILT_IN, TOKENS, USUAL
from finetune.data.conversations import Conversation
from finetune.data.templates import PROMPT, Template
from finetune.errors import ConfigError, DataError

# Variables that each template gets from transformers.
GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}


def _is_text(source: str) -> bool:
    """Return whether a source can be encoded: half a character (a lone surrogate) cannot."""
    try:
        source.encode()
    except UnicodeEncodeError:
        return False
    return True


def load(
    name: str, format: str, chat_template: str | Mapping[str, str] | None,
    special_tokens: Mapping[str, str], vocabulary: Mapping[str, int], date: str | None = None,
    arguments: Mapping[str, Any] = MappingProxyType({}),
) -> Template:  # fmt: skip
    """Find a template by its config name. Raise DataError if it is missing or unfit.

    `chat_template`: the tokenizer's own, or several by name, of which `default` is taken as
    transformers does. `date`: the day for templates that write it. `arguments`: its further
    variables; raises ConfigError for one that it does not read.
    """
    found = _find(name, format, chat_template, special_tokens, vocabulary)
    found = replace(found, arguments=dict(arguments))
    problem = None
    if not _is_text(found.source):
        problem = "holds half of a character; correct the template"
    elif _is_random(found):
        why = "so each start would train other text; use another template"
        problem = f"uses chance (random, lipsum), {why}"
    elif date is not None and _writes_time(found):
        remedy = "take it out of the template (the date alone may stay)"
        problem = f"writes the time, so each prompt would differ from those of training; {remedy}"
    if problem:
        raise DataError(f"data.template: {found.name}: {problem}")
    if arguments:
        _require_read(found)
    return replace(found, date=date if found.writes_date else None)


def _find(
    name: str, format: str, chat_template: str | Mapping[str, str] | None,
    special_tokens: Mapping[str, str], vocabulary: Mapping[str, int],
) -> Template:  # fmt: skip
    if name == "auto":
        has_turns = format not in ("prompt_completion", "text")
        name = "chat" if chat_template and has_turns else USUAL[format]
    in_vocabulary = (token for token in vocabulary if _looks_special(token))
    turn_ends = tuple(dict.fromkeys([*special_tokens.values(), *in_vocabulary]))
    if name == "chat":
        if not chat_template:
            what = "chat, but the tokenizer has no chat template"
            listed = f"{', '.join(BUILT_IN)}, or a .jinja file"
            raise DataError(f"data.template: {what}; use one of {listed}")
        if not isinstance(chat_template, str):
            if "default" not in chat_template:
                what = f"the tokenizer has the chat templates {', '.join(chat_template)}"
                remedy = "write the one you want into a .jinja file and give that"
                raise DataError(f"data.template: {what}, but none named default; {remedy}")
            chat_template = chat_template["default"]
        return Template(name, chat_template, special_tokens, turn_ends)
    if name in BUILT_IN:
        needed = TOKENS.get(name, ())
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise DataError(
                f"data.template: {name} ends turns with the token {needed[-1]}, but the tokenizer "
                f"has no {' and '.join(missing)}; add them with model.new_tokens: "
                f"[{', '.join(missing)}], or use question_answer, alpaca or llama2"
            )
        return Template(name, BUILT_IN[name], special_tokens, turn_ends)
    if name.endswith(".jinja"):
        try:
            source = Path(name).read_text(encoding="utf-8-sig")
            return Template(name, source, special_tokens, turn_ends)
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"data.template: {name}: cannot be read: {exc}") from exc
    listed = f"auto, chat, {', '.join(BUILT_IN)}, or a .jinja file"
    raise DataError(f"data.template: {name!r} is not one of {listed}")


def _writes_time(template: Template) -> bool:
    """Return whether the template renders other text at another time of the same day."""
    if not template.writes_date:
        return False
    with contextlib.suppress(DataError):  # reported with the first row
        times = ("04:05:06.000007", "17:38:49.500000")
        clocks = [replace(template, date=f"2001-02-03T{time}") for time in times]
        early, late = (
            clock._render(Conversation(clock.probe, PROMPT), add_generation_prompt=True)
            for clock in clocks
        )
        return early != late
    return False


def _parsed(template: Template) -> Any:
    """Return the syntax tree of a template, or None if it is broken, as its first row reports."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils import chat_template_utils

    try:
        compiled = chat_template_utils._compile_jinja_template(template.source)
        return compiled.environment.parse(template.source)
    except TemplateSyntaxError:
        return None


def _require_read(template: Template) -> None:
    """Raise ConfigError for an argument that the template does not read."""
    known = _arguments_read(template)
    for name in template.arguments:
        if known is not None and name not in known:
            which = f"it reads {', '.join(known)}" if known else "it reads none"
            raise ConfigError(
                f"data.template_arguments: {name}: data.template {template.name!r} does not read "
                f"it, and {which}; correct the name, or remove it"
            )


def _arguments_read(template: Template) -> list[str] | None:
    """Return the variables that a template reads and does not get otherwise; None if broken.

    A variable that the template sets before it first reads it is its own.
    """
    from jinja2 import meta

    if (parsed := _parsed(template)) is None:
        return None
    first = dict[str, str]()
    for name, context in _names(parsed):
        first.setdefault(name, context)
    undeclared = meta.find_undeclared_variables(parsed) - GIVEN
    undeclared -= {name for name in undeclared if name.endswith("_token")}
    return sorted(name for name in undeclared if first[name] == "load")


def _names(node: Any) -> Iterator[tuple[str, str]]:
    """Yield the variables of a syntax tree, each with load or store, in the order of their use."""
    from jinja2 import nodes

    if isinstance(node, nodes.Name):
        yield node.name, node.ctx
    children = list(node.iter_child_nodes())
    if isinstance(node, (nodes.Assign, nodes.For)):  # the value is read before its name is set
        children[:2] = children[1::-1]
    for child in children:
        yield from _names(child)


def _is_random(template: Template) -> bool:
    """Return whether the template uses Jinja's sources of chance."""
    if not re.search("random|lipsum", template.source):
        return False
    from jinja2 import nodes

    if (parsed := _parsed(template)) is None:
        return False
    filters, names = parsed.find_all(nodes.Filter), parsed.find_all(nodes.Name)
    is_random = any(each.name == "random" for each in filters)
    return is_random or any(each.name == "lipsum" for each in names)


def _looks_special(token: str) -> bool:
    in_bars = token.startswith("<|") and token.endswith("|>")
    return in_bars or (token.startswith("<") and token.endswith("_of_turn>"))
