"""Turn problems of a config into messages: which key is wrong, what it should be, what is near."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal, get_origin

from finetune import own_code
from finetune.config import engine_fields, kinds, names, paths, reward_fields
from finetune.config.rollout_fields import NOT_HERE, Rollouts
from finetune.config.sections import (
    Sections,
    field,
    keys_of,
    kind_of,
    kinds_with,
    names_in,
    sections_of,
    types_in,
    unnumbered,
    with_inner,
)
from finetune.config.yaml_text import dump
from finetune.errors import either


def listed(problems: list[str], where: str) -> str:
    """Return one message with a line for each problem. `where`: the file, the command line."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {where}:\n" + "\n".join(f"  {problem}" for problem in problems)


def quoted(text: str) -> str:
    """Quote a word of the command line, which may hold bytes that no terminal can show."""
    return repr(paths.shown(text))


def describe(error: Any, values: dict[str, Any]) -> str:
    """Describe one error of pydantic, as `key: what is wrong, got value; what to do`."""
    inner = ("list[", "function")
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(inner))
    problem, got, sections = error["type"], error["input"], sections_of(values)
    if error["loc"][:2] in NESTED and len(error["loc"]) > 2:
        return _nested(key, error, values)
    if problem == "extra_forbidden":
        return _unknown_key(key, error["loc"], got, values)
    if problem == "missing":
        return f"{key}: is required" + ("" if "." in key else f" (section {key}:)")
    if problem == "model_type":
        return f"{key}: a section with keys of its own, got {dump(got)}"
    key = ".".join(key.split(".")[:2])  # deeper parts name pydantic's branches of unions and lists
    types = types_in(field(key, sections).annotation) if key in keys_of(sections) else ()
    if problem.endswith("_type") and str in types:
        given = [each for each in types if each is not type(None)]
        expected = " or ".join(getattr(each, "__name__", str(each)) for each in given)
        if any(get_origin(each) is Literal for each in given):  # another error lists its words
            expected = own_code.EXPECTED
        return f"{key}: should be {expected}, got {got!r}"
    if problem == "string_pattern_mismatch" and key != "run.name":
        return f"{key}: should be {own_code.EXPECTED}, got {got!r}"
    if problem == "string_pattern_mismatch":
        return f"{key}: letters, digits, dots, dashes and underscores only, got {got!r}"
    if problem == "string_too_long":
        most = error["ctx"]["max_length"]
        return f"{key}: at most {most} letters, got {len(got)}; choose a shorter one"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    advice = names.not_yet(key, got)
    return f"{key}: {message}, got {got!r}" + (f"; {advice}" if advice else "")


def _unknown_key(key: str, location: tuple[Any, ...], got: Any, values: dict[str, Any]) -> str:
    """Describe a key that no section has, or that another kind of its section has."""
    sections = sections_of(values)
    section, _, name = key.partition(".")
    if key in location and key in keys_of(with_inner(sections)):  # as on the command line
        for each in reversed(key.split(".")):
            got = {each: got}
        return f"{key}: unknown key; nest it: {dump(got).removeprefix('{').removesuffix('}')}"
    if name and (inner := _inside_kind(section, name, values)):
        return f"{key}: unknown key; did you mean {inner}?"
    if having := kinds_with(section, name):
        kind = kind_of(section, values)
        others = either(having, "and")
        instead = f"remove it, or set {section}.kind"
        return f"{key}: {section}.kind is {kind}; it belongs to {others}; {instead}"
    return f"{key}: {_removed(key) or f'unknown key; {_nearest(key, sections)}'}"


def _inside_kind(section: str, name: str, values: dict[str, Any]) -> str | None:
    """Return the setting of this name inside another one of the section's kind."""
    classes = sections_of(values).get(section, ())
    if len(classes) < 2:
        return None
    kind = kind_of(section, values)
    having = tuple(cls for cls in classes if kinds.name_of(cls) == kind)
    inner = keys_of(with_inner({section: having}))[len(names_in(having)) :]
    return next((each for each in inner if each.endswith(f".{name}")), None)


NESTED = (("objective", "rewards"), ("objective", "rollouts"))
"""Settings that have settings of their own."""


def _nested(key: str, error: Any, values: dict[str, Any]) -> str:
    """Describe a problem inside a setting of NESTED."""
    problem, got = error["type"], error["input"]
    if problem == "missing":
        return f"{key}: is required"
    if problem == "model_type":
        example = "exact_match" if error["loc"][1] == "rewards" else "server"
        return f"{key}: should be a mapping such as {{kind: {example}}}, got {got!r}"
    if problem != "extra_forbidden":
        message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
        return f"{key}: {message}, got {got!r}"
    place: Any = values
    for name in error["loc"][:-1]:
        place = place[name]
    where = error["loc"][1] if len(error["loc"]) > 3 else ""
    if where == "rewards":
        known = reward_fields.settings_of(place["kind"])
    else:
        known = engine_fields.settings_of(place["kind"]) if where else list(Rollouts.model_fields)
    near = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"{place.get('kind', 'it')} has "
    return f"{key}: unknown key; {hint}" + ("" if near else ", ".join(known))


def joined(problems: Iterable[str]) -> list[str]:
    """Join problems that pydantic reports for each type of a setting: should be this or that."""
    messages: dict[tuple[str, str], str] = {}
    for problem in problems:
        should, _, got = problem.partition(", got ")
        name, _, what = should.partition(": should be ")
        before = messages.get((name, got))
        messages[name, got] = f"{before} or {what}" if before and what else should
    return [should + (f", got {got}" if got else "") for (_, got), should in messages.items()]


def unknown_argument(word: str, sections: Sections) -> str:
    """Describe an option that the command line does not have."""
    key, sections = paths.shown(word.lstrip("-").split("=")[0]), with_inner(sections)
    if (classes := sections.get(unnumbered(key))) is not None:
        name = names_in(classes)[0]
        return f"--{key}: is a section; set each of its settings by itself, as --{key}.{name} VALUE"
    return f"--{key}: {_removed(key) or f'unknown option; {_nearest(key, sections)}'}"


def _removed(key: str) -> str | None:
    return f"was removed; {names.REMOVED[key][1]}" if key in names.REMOVED else None


def _nearest(key: str, sections: Sections) -> str:
    """Suggest the setting that an unknown key may mean, or list what there is."""
    leaf, keys = key.split(".")[-1], keys_of(with_inner(sections))
    if key.startswith("objective.") and leaf in NOT_HERE:
        return NOT_HERE[leaf]
    if (known := names.ELSEWHERE.get(leaf)) and leaf not in sections:
        return known if " " in known else f"did you mean {known}?"
    leaves = {each: each.rpartition(".")[2] for each in keys}
    near = _closest(key, [each for each in keys if leaves[each] == leaf], 0)
    if not near and "." not in key:
        near = _closest(key, sections, 0.75)
    near = near or _closest(key, [each for each in keys if _is_inside(leaf, leaves[each])], 0)
    near = near or _closest(key, keys, 0.7)
    if not near and (similar := _closest(leaf, leaves.values(), 0.75)):
        near = [each for each in keys if leaves[each] == similar[0]]
    if near:
        return f"did you mean {near[0]}?"
    section = key.split(".")[0]
    if section in sections:
        return f"{section} has {', '.join(names_in(sections[section]))}"
    return f"the sections are {', '.join(sections)}"


def _closest(word: str, words: Iterable[str], cutoff: float) -> list[str]:
    return difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)


def _is_inside(leaf: str, name: str) -> bool:
    """Return whether one name contains the other, which has more than three letters."""
    return len(min(leaf, name, key=len)) > 3 and (leaf in name or name in leaf)
