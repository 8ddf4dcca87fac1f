"""The command line of a run: `train.py CONFIG [--check] [--section.field VALUE ...]` -> Config."""

import argparse
import copy
import functools
import os
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml

from finetune import failures, own_code, places
from finetune.config import help, kinds, paths
from finetune.config.fields import Config
from finetune.config.kinds import Section
from finetune.config.messages import listed, quoted, unknown_argument
from finetune.config.own import OwnObjective, own_objective, rewards_in
from finetune.config.reader import from_dict
from finetune.config.sections import (
    NUMBER,
    Sections,
    field,
    keys_of,
    kind_of,
    names_in,
    sections_of_config,
    type_name,
    types_in,
    unnumbered,
    with_inner,
)
from finetune.config.yaml_text import dump, from_yaml, read_yaml
from finetune.errors import ConfigError

# Inputs: looked for in the working directory, then beside the config. Outputs always go to the
# working directory.
BESIDE_CONFIG = (
    "model.path", "model.tokenizer", "adapter.path", "data.train", "data.eval", "data.template",
    "data.weights", "data.token_budgets", "objective.teacher",
)  # fmt: skip


Check = Literal[False, True, "strict"]
"""Whether to check alone, with --check; strict: with --strict, which makes notes errors."""


def parse(argv: list[str], needs_weights: bool = True) -> tuple[Config, Check]:
    """Return (the config, whether to check alone). Raises ConfigError with every problem.

    `needs_weights`: whether a base in a folder must have its weights.
    """
    sections = with_inner(sections_of_config())
    parser = _parser(sections, argv)
    if (asked := help.topic(argv)) is not None:
        print(help.text(parser, asked), end="")
        raise SystemExit(0)
    if not set(argv) - {"--check", "--strict"}:  # `finetune check` adds the first
        raise ConfigError(
            "nothing to do: give the path of a config, such as configs/quickstart.yaml; see --help"
        )
    known, unknown = parser.parse_known_args(argv)
    overrides = vars(known)
    path, check = overrides.pop("config", None), overrides.pop("check", False)
    strict = overrides.pop("strict", False)
    if path is None and unknown and unknown[0].endswith((".yaml", ".yml")):
        path = unknown.pop(0)  # train.py my_run.yaml
    taken = _taken_configs(path, overrides)
    if taken and path is None:  # without the config every required setting would be missing
        problems = _problems_of_words(path, unknown, sections) + taken
        raise ConfigError(listed(problems, "the command line"))
    values = read_yaml(path) if path else {}
    folder = Path(paths.expanded(path)).parent if path else None
    places.note_config_folder(folder)
    ambiguous = _look_beside(values, folder) if folder else []
    kind = overrides.get("objective.kind", kind_of("objective", values))
    if own_code.is_own(kind) and any(word.startswith("--objective.") for word in unknown):
        own = _own_objective(kind, folder, _where(path, True))
        sections = with_inner(sections_of_config(own))
        known, unknown = _parser(sections, unknown).parse_known_args(unknown)
        overrides |= vars(known)
    where = _where(path, bool(overrides or unknown))
    problems = _problems_of_words(path, unknown, sections) + taken + ambiguous
    for problem in taken:
        overrides.pop(problem.partition(":")[0])
    problems += _override(values, overrides, sections)
    config = from_dict(
        values, where=where, problems=problems, folder=folder, needs_weights=needs_weights
    )
    return config, "strict" if strict else check


def _override(values: dict[str, Any], overrides: dict[str, str], sections: Sections) -> list[str]:
    """Put settings of the command line into `values`; return what is wrong with them."""
    problems = []
    for key in sorted(overrides, key=lambda key: key.count(".")):  # a setting, then those inside it
        raw, (*path, name) = overrides[key], key.split(".")
        try:
            value = _value_of(field(key, sections).annotation, raw)
            if (section := _opened(values, path)) is not None:
                section[name] = value
        except ConfigError as exc:
            problems.append(f"{key}: {exc}")
        except (yaml.YAMLError, ValueError, RecursionError) as exc:
            has_mark = isinstance(exc, yaml.MarkedYAMLError)
            why = "" if has_mark else f" ({failures.parsing_reason(exc)})"
            shown = quoted(raw if len(raw) <= 100 else f"{raw[:100]}...")
            how = "write lists as [a, b] and mappings as {a: b}"
            problems.append(f"{key}: {shown} cannot be read{why}; {how}")
    return problems


def _opened(values: dict[str, Any], path: list[str]) -> dict[str, Any] | None:
    """Return the section in `values` that a path of names leads to; add what is missing of it.

    None if something else than a section stands there, which from_dict reports. Raises ConfigError.
    """
    place: Any = values
    for name, following in zip(path, [*path[1:], ""]):
        key: Any = name
        if isinstance(place, list):
            key = _number(name, len(place))
            if key == len(place):
                place.append({})
        elif not isinstance(place, dict):
            return None
        elif place.get(name) is None:
            place[name] = [] if following.isdigit() or following == NUMBER else {}
        place[key] = copy.copy(place[key])  # YAML may give one object to two names
        place = place[key]
    return place if isinstance(place, dict) else None


def _number(word: str, count: int) -> int:
    """Return which section of a list a word names. Raises ConfigError."""
    if not word.isdigit():
        raise ConfigError(f"write a number for {word}: 0 for the first, 1 for the second")
    if int(word) > count:
        entries = "1 entry" if count == 1 else f"{count} entries"
        raise ConfigError(f"the list has {entries}, so the next number is {count}, not {word}")
    return int(word)


def _value_of(annotation: Any, raw: str) -> Any:
    """Read a word as YAML, but keep it as it is where the setting can be a string."""
    types = types_in(annotation)
    if str not in types:
        return from_yaml(raw)
    try:
        parsed = from_yaml(raw)
    except yaml.YAMLError:
        return raw
    as_list = isinstance(parsed, list) and any(get_origin(each) is list for each in types)
    return parsed if as_list or (parsed is None and type(None) in types) else raw


def _look_beside(values: dict[str, Any], folder: Path) -> list[str]:
    """Complete, in `values`, relative paths that exist only beside the config; return problems."""
    problems = []
    for key in BESIDE_CONFIG:
        section, name = key.split(".")
        given = values.get(section)
        if isinstance(given, dict) and name in given:
            try:
                given[name] = paths.beside_config(given[name], str(folder))
            except ValueError as exc:
                problems.append(f"{key}: {exc}")
    for key, reward in rewards_in(values.get("objective")).items():
        at_server = {"model"} if reward.get("url") else set()
        for name in ({"file", "model", "rubric"} - at_server) & reward.keys():
            try:
                reward[name] = paths.beside_config(reward[name], str(folder))
            except ValueError as exc:
                problems.append(f"{key}.{name}: {exc}")
    return problems


def _own_objective(kind: str, folder: Path | None, where: str) -> type[OwnObjective]:
    """Return the settings of a user's own objective. Raises ConfigError."""
    try:
        return own_objective(own_code.find(kind, folder))
    except ConfigError as exc:
        raise ConfigError(listed([f"objective.kind: {exc}"], where)) from exc


def _parser(sections: Sections, argv: list[str]) -> "_Parser":
    """Make a parser with an option for each setting of the sections, with the numbers in `argv`."""
    parser = _Parser(
        prog=places.train_command(),
        usage="%(prog)s CONFIG [--check] [--strict] [--section.field VALUE ...]",
        description="Specialise a Hugging Face language model to a task. Write the settings into a "
        "YAML file; those on the command line override it.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    note_repeats(parser)
    parser.add_argument(
        "--config", metavar="FILE", help="YAML run config; its path alone will do as well"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="check settings, rows and model without loading weights, and end",
    )
    parser.add_argument("--strict", action="store_true", help="--check, and notes are errors")
    keys = (word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--"))
    numbered = {key for key in keys if unnumbered(key) != key}
    for section, classes in sections.items():
        group = parser.add_argument_group(section, _about(section, sections))
        for name in names_in(classes):
            key = f"{section}.{name}"
            is_switch = bool in types_in(field(key, sections).annotation)
            metavar, text = _help(classes, name)
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if is_switch else {}
            group.add_argument(f"--{key}", metavar=metavar, help=text, **bare)
            for each in sorted(each for each in numbered if unnumbered(each) == key):
                parser.add_argument(f"--{each}", help=argparse.SUPPRESS, **bare)
    return parser


def _about(section: str, sections: Sections) -> str | None:
    """Return what a section is, or the setting that it stands in."""
    if section in Config.model_fields:
        found = Config.model_fields[section]
    else:
        found = field(section.removesuffix(f".{NUMBER}"), sections)
    return found.description or sections[section][0].__doc__


@functools.cache
def _help(classes: tuple[type[Section], ...], name: str) -> tuple[str, str]:
    """Return (what a setting takes; what it does, its default, and which kinds have it)."""
    having = [cls for cls in classes if name in cls.model_fields]
    field = min((cls.model_fields[name] for cls in having), key=lambda each: each.is_required())
    types = dict.fromkeys(type_name(cls.model_fields[name].annotation) for cls in having)
    metavar, text = " or ".join(types), field.description or ""
    with_it = [kinds.name_of(cls) for cls in having] if len(classes) > 1 else []
    if with_it and name == "kind":
        descriptions = [cls.model_fields[name].description for cls in having]
        metavar = "|".join(with_it)
        text = " ".join(f"{kind}: {what}" for kind, what in zip(with_it, descriptions))
    elif 0 < len(with_it) < len(classes):
        meanings: dict[str, list[str]] = {}  # kinds may mean different things by one name
        for cls in having:
            meanings.setdefault(cls.model_fields[name].description or "", []).append(
                kinds.name_of(cls)
            )
        text = " ".join(f"{', '.join(each)}: {what}" for what, each in meanings.items())
    defaults: dict[str, list[str]] = {}
    for cls in [field_of for field_of in having if name != "kind"]:
        kind = kinds.name_of(cls) if with_it else ""
        defaults.setdefault(_default(cls.model_fields[name]), []).append(kind)
    if len(defaults) > 1:
        listed = "; ".join(f"{', '.join(each)}: {value}" for value, each in defaults.items())
        default = f"defaults: {listed}"
    else:
        default = next(iter(defaults), _default(field))
        default = default if default == "required" else f"default: {default}"
    return metavar, f"{text} ({default})".replace("%", "%%")


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, Section):
        return "those of its settings"
    value = field.get_default(call_default_factory=True, validated_data={})
    try:
        return dump(value)
    except yaml.YAMLError:  # of a type of the user's own
        return str(value)


def _problems_of_words(path: str | None, unknown: list[str], sections: Sections) -> list[str]:
    """Return what is wrong with words that are not options, and with the environment."""
    options = {"--config", "--check", "--strict", *(f"--{key}" for key in keys_of(sections))}
    after = [word for word in unknown if word.split("=")[0] in options]
    rest = [word for word in unknown if word != "--" and word not in after]
    problems = [
        f"{word}: stands after --, so it was not read as an option; remove the --" for word in after
    ]
    problems += [unknown_argument(word, sections) for word in rest if word.startswith("-")]
    if rest and not rest[0].startswith("-"):
        word = rest[0]
        how = (
            f"the config is already {path}; give only one"
            if word.endswith((".yaml", ".yml"))
            else "write settings as --section.field VALUE, lists in quotes as '[a, b]', and the "
            "config as --config FILE"
        )
        problems.append(f"{quoted(word)}: unexpected word on the command line; {how}")
    for name, value in os.environ.items():
        ours = name.startswith(("FINETUNE_", "ACCELERATE_", "WANDB_"))
        if ours and paths.half_characters(value, name):
            what = "contains half a character, or bytes that are not UTF-8; set it again"
            problems.append(f"{name} in the environment: {what}")
    return problems


def _taken_configs(path: str | None, overrides: dict[str, str]) -> list[str]:
    """Report settings that took a YAML file as their value: a bare flag in front of the config."""
    problems = []
    for key, raw in overrides.items():
        types = types_in(field(key, with_inner(sections_of_config())).annotation)
        is_config = raw.lower().endswith((".yaml", ".yml"))
        if not is_config or (str in types and (path is not None or not os.path.isfile(raw))):
            continue
        config = "" if path else f"--config {quoted(raw)[1:-1]} "
        value = "true" if bool in types else "VALUE"
        how = f"write {config}--{key} {value}"
        problems.append(f"{key}: took the YAML file {quoted(raw)} as its value; {how}")
    return problems


def _where(path: str | None, overridden: bool) -> str:
    """Name what the settings come from: the file, the command line, or both."""
    return " and ".join(
        [*([path] if path else []), *(["the command line"] if overridden or not path else [])]
    )


def note_repeats(parser: argparse.ArgumentParser) -> None:
    """Let the last value of an option count, so that a command can be extended, and say so.

    argparse takes the last in silence.
    """

    class Last(argparse._StoreAction):
        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
        ) -> None:
            given = parser.__dict__.setdefault("_given", {})
            if option_string and given.setdefault(self.dest, values) != values:
                dropped, kept = quoted(str(given[self.dest])), quoted(str(values))
                note = f"note: {option_string} is given twice: {kept} counts, not {dropped}"
                print(note, file=sys.stderr)
                given[self.dest] = values
            super().__call__(parser, namespace, values, option_string)

    for name in (None, "store"):
        parser.register("action", name, Last)


class _Parser(argparse.ArgumentParser):
    """Raise errors of argparse as ours."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        name, _, what = message.partition(": ")
        if what == "expected one argument":
            value = "FILE" if name == "--config" else "VALUE"
            message = f"{name}: has no value; write {name} {value}"
        raise ConfigError(message)
