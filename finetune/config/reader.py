"""Files and command lines -> Config, with every problem told at once; and back to YAML."""

import argparse
import codecs
import difflib
import os
import re
import stat
import sys
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NoReturn, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError

from finetune import failures, own_code, places
from finetune.config import base, help, kinds, names, paths
from finetune.config.fields import Config, OwnObjective, Section, own_format, own_objective
from finetune.config.rules import conflicts
from finetune.errors import ConfigError, RunDirectoryError

# What may differ between a run and its resumption: it changes neither the data nor the arithmetic
# of a step (micro_batch_size and checkpointing only reorder the same float operations).
# Inputs: looked for in the working directory, and beside the config. What a run writes is in the working directory.
BESIDE_CONFIG = (
    "model.path",
    "model.tokenizer",
    "adapter.path",
    "data.train",
    "data.eval",
    "data.template",
)
RESUME_MAY_CHANGE = (
    "run.dir", "data.cache_dir", "model.attention", "train.micro_batch_size", "train.gradient_checkpointing", "train.compile", "train.hang_minutes",
    "checkpoint.*", "evaluation.*", "tracking.*",
)  # fmt: skip

OWN_CODE = ("objective.kind", "data.format")
"""Settings that may name code of the user's own."""
PUT_BACK = "put back a copy of it (manifest.json of each checkpoint holds the same under config)"
MOST_BYTES = 1_000_000  # of a config; PyYAML takes half a minute for as much


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Command line -> (config, whether --check was given). Raises ConfigError with all problems at once."""
    sections = _sections()
    parser = _parser(sections)
    if (asked := help.topic(argv)) is not None:
        print(help.text(parser, asked), end="")
        raise SystemExit(0)
    if not argv:
        raise ConfigError(
            "nothing to do: give the path of a config, such as configs/quickstart.yaml; see --help"
        )
    known, unknown = parser.parse_known_args(argv)
    overrides = vars(known)
    path, check = overrides.pop("config", None), overrides.pop("check", False)
    if path is None and unknown and unknown[0].endswith((".yaml", ".yml")):
        path = unknown.pop(0)  # train.py configs/my_run.yaml
    taken = _taken_configs(path, overrides)
    if taken and path is None:  # without the config every required setting would be missing
        raise ConfigError(
            _listed(_problems_of_words(path, unknown, sections) + taken, "the command line")
        )
    values = read_yaml(path) if path else {}
    folder = Path(paths.expanded(path)).parent if path else None
    places.note_config_folder(folder)
    twice = _look_beside(values, folder) if folder else []
    kind = overrides.get("objective.kind", _kind_of("objective", values))
    if own_code.is_own(kind) and any(word.startswith("--objective.") for word in unknown):
        sections = _sections(_own_objective(kind, folder, _where(path, True)))
        known, unknown = _parser(sections).parse_known_args(unknown)
        overrides |= vars(known)
    problems = _problems_of_words(path, unknown, sections) + taken + twice
    for key, raw in overrides.items():
        if any(problem.startswith(f"{key}: ") for problem in taken):
            continue
        section, name = key.split(".")
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # if not, that is a problem of its own
            try:
                values[section][name] = _from_command_line(_field(key, sections).annotation, raw)
            except (yaml.YAMLError, ValueError, RecursionError) as exc:
                why = (
                    ""
                    if isinstance(exc, yaml.MarkedYAMLError)
                    else f" ({failures.parsing_reason(exc)})"
                )
                shown = _shown(raw if len(raw) <= 100 else f"{raw[:100]}...")
                problems.append(
                    f"{key}: {shown} cannot be read{why}; write lists as [a, b] and mappings as {{a: b}}"
                )
    where = _where(path, bool(overrides or unknown))
    return from_dict(values, where=where, problems=problems, folder=folder), check


def _look_beside(values: dict[str, Any], folder: Path) -> list[str]:
    """Give paths of a config that are not in the working directory but beside the config their place, in `values`."""
    problems = []
    for key in BESIDE_CONFIG:
        section, name = key.split(".")
        given = values.get(section)
        if isinstance(given, dict) and name in given:
            try:
                given[name] = paths.beside_config(given[name], str(folder))
            except ValueError as exc:
                problems.append(f"{key}: {exc}")
    return problems


def _own_objective(kind: str, folder: Path | None, where: str) -> type[OwnObjective]:
    """The settings of an objective of the user's own. Raises ConfigError."""
    try:
        return own_objective(own_code.find(kind, folder))
    except ConfigError as exc:
        raise ConfigError(_listed([f"objective.kind: {exc}"], where)) from exc


def _parser(sections: "Sections") -> "_Parser":
    """The command line with an option for each setting of the sections."""
    parser = _Parser(
        prog="finetune train" if places.command() == "finetune" else "train.py",
        usage="%(prog)s CONFIG [--check] [--section.field VALUE ...]",
        description="Specialise a Hugging Face language model to a task. Write the settings into a YAML file; those on the "
        "command line override it.",
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
    for section, classes in sections.items():
        group = parser.add_argument_group(
            section, Config.model_fields[section].description or classes[0].__doc__
        )
        for name in _names(classes):
            options = _options(_field(f"{section}.{name}", sections).annotation)
            metavar, text = _help(classes, name)
            bare: dict[str, Any] = {"nargs": "?", "const": "true"} if bool in options else {}
            group.add_argument(f"--{section}.{name}", metavar=metavar, help=text, **bare)
    return parser


def _help(classes: tuple[type[Section], ...], name: str) -> tuple[str, str]:
    """(what a setting takes; what it does, its default, and which kinds of its section have it)."""
    having = [cls for cls in classes if name in cls.model_fields]
    field = min((cls.model_fields[name] for cls in having), key=lambda each: each.is_required())
    metavar, text = _type_name(field.annotation), field.description or ""
    names_of_kinds = [kinds.name_of(cls) for cls in having] if len(classes) > 1 else []
    if names_of_kinds and name == "kind":
        described = zip(names_of_kinds, (str(cls.model_fields[name].description) for cls in having))
        metavar, text = (
            "|".join(names_of_kinds),
            " ".join(f"{kind}: {what}" for kind, what in described),
        )
    elif 0 < len(names_of_kinds) < len(classes):
        text = f"{', '.join(names_of_kinds)}: {text}"
    value = field.get_default(call_default_factory=True, validated_data={})
    try:
        default = "required" if field.is_required() else f"default: {_yaml(value)}"
    except yaml.YAMLError:  # of a type of the user's own
        default = f"default: {value}"
    return metavar, f"{text} ({default})".replace("%", "%%")


def _problems_of_words(path: str | None, unknown: list[str], sections: "Sections") -> list[str]:
    """What is wrong with words that are not options, and with the environment."""
    options = {"--config", "--check", *(f"--{key}" for key in _keys(sections))}
    after = [word for word in unknown if word.split("=")[0] in options]
    problems = [
        f"{word}: stands after --, so it was not read as an option; remove the --" for word in after
    ]
    rest = [word for word in unknown if word != "--" and word not in after]
    problems += [_unknown_argument(word, sections) for word in rest if word.startswith("-")]
    problems += [f"{_shown(word)}: unexpected word on the command line; {_beside(path, word)}" for word in rest[:1] if not word.startswith("-")]  # fmt: skip
    return problems + [
        f"{name} in the environment: contains half a character, or bytes that are not UTF-8; set it again"
        for name, value in os.environ.items()
        if name.startswith(("FINETUNE_", "ACCELERATE_", "WANDB_"))
        and paths.half_characters(value, name)
    ]


def _taken_configs(path: str | None, overrides: dict[str, str]) -> list[str]:
    """Settings whose value is a YAML file: a bare flag in front of the config takes it as its value."""
    problems = []
    for key, raw in overrides.items():
        options = _options(_field(key, _sections()).annotation)
        is_config = raw.lower().endswith((".yaml", ".yml"))
        if not is_config or (str in options and (path is not None or not os.path.isfile(raw))):
            continue
        config = "" if path else f"--config {_shown(raw)[1:-1]} "
        value = "true" if bool in options else "VALUE"
        problems.append(
            f"{key}: took the YAML file {_shown(raw)} as its value; write {config}--{key} {value}"
        )
    return problems


def _where(path: str | None, overridden: bool) -> str:
    return " and ".join(
        [*([path] if path else []), *(["the command line"] if overridden or not path else [])]
    )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are errors, and 1e-4 is a number."""
    if paths.half_characters(str(path)):
        raise ConfigError(
            f"--config: {_shown(str(path))} holds half a character, or bytes that are not UTF-8; rename it"
        )
    try:
        text = _text_of(Path(paths.expanded(str(path))))
    except (OSError, ValueError) as exc:
        if isinstance(exc, FileNotFoundError):
            raise ConfigError(
                f"{path}: no such file{_meant(os.path.expanduser(str(path)))}"
            ) from exc
        why = (
            "it is a folder; name a file in it"
            if isinstance(exc, IsADirectoryError)
            else getattr(exc, "strerror", None) or exc
        )
        raise ConfigError(f"{path}: cannot read the config: {why}") from exc
    try:
        values = yaml.load(text, Loader=_Loader)
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as exc:  # a number of 5,000 digits, 1,000 brackets
        raise ConfigError(f"{path}: not valid YAML: {failures.parsing_reason(exc)}") from exc
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected sections such as run: and data:, got {type(values).__name__}"
        )
    return values


def _meant(path: str) -> str:
    """What a missing config may be called: a file next to it, or in configs/."""
    folder, name = os.path.split(path)
    if folder and not os.path.isdir(folder):
        hint = f"; the folder {folder} does not exist"
    else:
        hint = f" in {os.getcwd()}" if not folder else ""
    for place in dict.fromkeys((folder, "configs")):
        if near := places.nearest(place, name):
            return f"; did you mean {paths.shown(near)}?"
    return hint


class _NoText(ValueError):
    """A file that cannot be a config, whatever it holds."""


def _text_of(path: Path) -> str:
    """The text of a config. Raises OSError, _NoText that says what it is instead. A pipe may be one, as of <(...)."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISDIR(mode)):
        raise _NoText("it is a device or a socket; name a file")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise _NoText(
            f"it is larger than {MOST_BYTES // 10**6} MB, and a config is not; name another file"
        )
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise _NoText("it is UTF-16 (or UTF-32); save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise _NoText(
            f"byte {content[exc.start]:#04x} in line {line} is not UTF-8; save it as UTF-8"
        ) from exc


def read_resolved(path: Path) -> dict[str, Any]:
    """The config.yaml that a run has written, with every section. Raises RunDirectoryError for one that is not whole."""
    problem = None
    try:
        values = read_yaml(path)
    except ConfigError as exc:
        if isinstance(cause := exc.__cause__, OSError):
            raise RunDirectoryError(
                f"{path} cannot be read: {cause.strerror}; give the directory of a run"
            ) from exc
        is_text = not isinstance(cause, _NoText)
        problem = "it is not YAML with sections such as run: and data:" if is_text else str(cause)
    else:
        wrong = [name for name in _sections() if not isinstance(values.get(name), dict)]
        problem = f"its section {wrong[0]} is missing, or cut off" if wrong else None
    if problem:
        raise RunDirectoryError(
            f"{path} is damaged: {problem}; {PUT_BACK}, or choose another run.name"
        )
    return _of_their_kinds(values)


def from_yaml(text: str) -> Any:
    """A value of the command line, by the same rules. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def from_dict(
    values: dict[str, Any],
    where: str = "config",
    problems: list[str] | None = None,
    folder: Path | None = None,
) -> Config:
    """Validate a nested mapping. Raises ConfigError that lists every problem.

    `folder`: of the config, where code of the user's own is looked for first.
    """
    problems = list(problems or [])
    problems += [
        f"{key}: contains half a character (a lone surrogate), or bytes that are not UTF-8; write it again"
        for key in dict.fromkeys(paths.half_characters(values))
    ]
    if problems and any(
        "half a character" in problem for problem in problems
    ):  # nothing could print it
        raise ConfigError(_listed(problems, where))
    config = None
    values, of_code = _with_own_code(_with_lists(values), folder)
    problems += of_code
    try:
        config = Config.model_validate(values)
        _yaml(config.objective.model_dump())  # settings of a user's own may be of any type
    except yaml.YAMLError as exc:
        problems.append(
            f"objective: these settings cannot be written to config.yaml: {exc}; use numbers, text, lists and mappings"
        )
    except ValidationError as exc:
        errors = exc.errors()
        problems += _joined(dict.fromkeys(_describe(error, values) for error in errors))
        config = _without(values, errors)
    if config is not None and not any(
        problem.startswith("objective.kind: ") for problem in of_code
    ):
        config, of_base = _beside_base(config)
        problems += of_base
        named = {problem.split(":")[0] for problem in problems}
        problems += [p for p in conflicts(config) if p.split(":")[0] not in named]
    if problems or config is None:
        raise ConfigError(_listed(problems, where))
    return config


def _with_own_code(values: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    """The values with full paths of the user's own code, which is read, and what is wrong with it."""
    problems = []
    for section, name, read in (
        ("objective", "kind", own_objective),
        ("data", "format", own_format),
    ):
        given = values.get(section)
        if not isinstance(given, dict) or not own_code.is_own(given.get(name)):
            continue
        try:
            found = own_code.find(given[name], folder)
            read(found)
            given = given | {name: found}
        except ConfigError as exc:
            problems.append(f"{section}.{name}: {exc}")
            given = (
                {}
                if name == "kind"
                else {key: value for key, value in given.items() if key != name}
            )
        values = values | {section: given}
    return values, problems


def _listed(problems: list[str], where: str) -> str:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{count} in {where}:\n" + "\n".join(f"  {problem}" for problem in problems)


def _beside_base(config: Config) -> tuple[Config, list[str]]:
    """The config as its base, where that is a folder here, lets it be, and what is wrong with that folder."""
    path, adapter = (
        config.model.path,
        None if config.adapter.kind == "full" else config.adapter.path,
    )
    of_adapter = []
    if adapter is not None and os.path.exists(adapter):
        of_adapter = (
            [f"adapter.path: {problem}"] if (problem := base.adapter_problem(adapter)) else []
        )
    if path is None or not os.path.exists(path):
        return config, of_adapter
    if problem := base.folder_problem(path, needs_weights=False):
        return config, [f"model.path: {problem}", *of_adapter]
    settled, problems = base.settled(config, base.said_by(path))
    # What a model is comes before what its files lack: a quantised one need not be downloaded again.
    if (
        config.model.init == "pretrained"
        and not problems
        and (problem := base.weights_problem(Path(path)))
    ):
        problems = [f"model.path: {problem}"]
    return settled, problems + of_adapter


def _with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """One word where a list should be is a list of one; a setting that is gone is left out where it asks for nothing."""
    listed = {}
    sections = _sections()
    for section in sections:
        given = values.get(section)
        if isinstance(given, dict):
            listed[section] = {
                name: [value]
                if isinstance(value, str | int | float)
                and _takes_only_lists(_field(f"{section}.{name}", sections))
                else value
                for name, value in given.items()
                if not _is_removed_default(f"{section}.{name}", value)
            }
    return values | listed


def _is_removed_default(key: str, value: Any) -> bool:
    """Whether an older version wrote this into its config.yaml for a setting that was left alone."""
    return key in names.REMOVED and names.REMOVED[key][0] == value


def _takes_only_lists(field: Any) -> bool:
    return field is not None and {
        get_origin(option) or option for option in _options(field.annotation)
    } <= {
        list,
        type(None),
    }


def note_repeats(parser: argparse.ArgumentParser) -> None:
    """Say which value counts where options of this parser are given twice: the last, so that a command can be extended.

    argparse takes it in silence.
    """

    class Last(argparse._StoreAction):
        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
        ) -> None:
            given = parser.__dict__.setdefault("_given", {})
            if option_string and given.setdefault(self.dest, values) != values:
                dropped, kept = _shown(str(given[self.dest])), _shown(str(values))
                print(
                    f"note: {option_string} is given twice: {kept} counts, not {dropped}",
                    file=sys.stderr,
                )
                given[self.dest] = values
            super().__call__(parser, namespace, values, option_string)

    for name in (None, "store"):
        parser.register("action", name, Last)


class _Parser(argparse.ArgumentParser):
    """Errors of argparse as ours."""

    def error(self, message: str) -> NoReturn:
        name, _, what = message.removeprefix("argument ").partition(": ")
        if what == "expected one argument":
            raise ConfigError(
                f"{name}: has no value; write {name} {'FILE' if name == '--config' else 'VALUE'}"
            )
        raise ConfigError(message.removeprefix("argument "))


def _beside(path: str | None, word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"the config is already {path}; give only one"
    return "write settings as --section.field VALUE, lists in quotes as '[a, b]', and the config as --config FILE"


def _shown(text: str) -> str:
    return repr(paths.shown(text))


def to_yaml(config: Config) -> str:
    """The resolved config, every field written out; reads back as the same config."""
    return _yaml(config.model_dump(), flow=False)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"name": "a"}} -> {"run.name": "a"}; two levels, as the config has."""
    return {
        f"{section}.{name}": value
        for section, fields in values.items()
        for name, value in fields.items()
    }


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """What of a saved resolved config differs so that its checkpoints are not this run's."""
    before = {
        name: value
        for name, value in flatten(_of_their_kinds(old)).items()
        if not _is_removed_default(name, value)
    }
    now = flatten(new.model_dump())
    for values in (before, now):
        values |= {
            key: own_code.without_folder(values[key])
            for key in OWN_CODE
            if own_code.is_own(values.get(key))
        }
    free = tuple(pattern.removesuffix("*") for pattern in RESUME_MAY_CHANGE)
    return [
        f"{key}: was {_yaml(before.get(key))}, now {_yaml(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]


def _of_their_kinds(old: dict[str, Any]) -> dict[str, Any]:
    """A saved config without the settings of other kinds, which earlier versions wrote out, too."""
    sections = _sections()
    return {
        section: {
            name: value
            for name, value in fields.items()
            if len(sections.get(section, ())) < 2 or _belongs(section, name, fields.get("kind"))
        }
        for section, fields in old.items()
    }


def _belongs(section: str, name: str, kind: Any) -> bool:
    """Whether a kind has a setting, or none of the other kinds that are built in has it."""
    having = _kinds_with(section, name)
    return not having or kind in having or own_code.is_own(kind)


def json_schema() -> dict[str, Any]:
    """JSON schema of the run config, for editors."""
    return Config.model_json_schema() | {"title": "finetune run config"}


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 numbers (PyYAML reads 1e-4 as a string) and without silent duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            node = self.anchors.get(event.anchor)
            if node is not None and node.end_mark is None:  # still being read: it would hold itself
                raise yaml.YAMLError(
                    f"line {event.start_mark.line + 1}: *{event.anchor} refers to itself; write it out"
                )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(
                    f"line {key_node.start_mark.line + 1}: a key should be a word; quote {{{{ ... }}}}"
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


Sections = dict[str, tuple[type[Section], ...]]
"""Section -> its classes: one, or one for each kind."""


def _sections(own: type[OwnObjective] | None = None) -> Sections:
    """Those of the config. `own`: of an objective of the user's own."""
    found: Sections = {
        name: get_args(field.annotation) or (cast(type[Section], field.annotation),)
        for name, field in Config.model_fields.items()
    }
    if own:
        found["objective"] = (*found["objective"][:-1], own)
    return found


def _sections_of(values: dict[str, Any]) -> Sections:
    """Those of a config, whose code was read before."""
    kind = _kind_of("objective", values)
    return _sections(own_objective(kind) if own_code.is_own(kind) else None)


def _names(classes: tuple[type[Section], ...]) -> list[str]:
    return list(dict.fromkeys(name for cls in classes for name in cls.model_fields))


def _field(key: str, sections: Sections) -> Any:
    """A setting, of the first kind that has it; None if there is none of this name."""
    section, _, name = key.partition(".")
    return next(
        (cls.model_fields[name] for cls in sections[section] if name in cls.model_fields), None
    )


def _keys(sections: Sections) -> list[str]:
    return [
        f"{section}.{name}" for section, classes in sections.items() for name in _names(classes)
    ]


def _kind_of(section: str, values: dict[str, Any]) -> Any:
    """The kind that a section is given, or has by default."""
    given, default = (
        values.get(section),
        getattr(Config.model_fields[section].default, "kind", None),
    )
    return given.get("kind", default) if isinstance(given, dict) else default


def _kinds_with(section: str, name: str) -> list[str]:
    """The kinds that have a setting, where a section has several."""
    classes = _sections().get(section, ())
    return (
        [kinds.name_of(cls) for cls in classes if name in cls.model_fields]
        if len(classes) > 1
        else []
    )


def _yaml(value: Any, flow: bool = True) -> str:
    text = yaml.dump(
        value,
        Dumper=_Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=10_000,
    )
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def _type_name(annotation: Any) -> str:
    """What a value looks like, for --help: INT, LIST of INT, a|b|c."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, options))
    if origin is Annotated:
        title = getattr(options[1], "title", None)
        return str(title) if title else _type_name(options[0])
    if origin in (UnionType, Union):
        return " or ".join(
            dict.fromkeys(_type_name(option) for option in options if option is not type(None))
        )
    if origin is list:
        return f"LIST of {_type_name(options[0])}"
    return "MAP" if origin is dict or annotation is dict else annotation.__name__.upper()


def _options(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type; Annotated or not."""
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return tuple(inner for option in get_args(annotation) for inner in _options(option))
    return (annotation,)


def _from_command_line(annotation: Any, raw: str) -> Any:
    """A word of the command line is YAML, except that what can be a string stays one."""
    options = _options(annotation)
    if str in options:
        try:
            parsed = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:
            return raw
        as_list = isinstance(parsed, list) and any(get_origin(option) is list for option in options)
        return parsed if as_list or (parsed is None and type(None) in options) else raw
    return yaml.load(raw, Loader=_Loader)


def _nearest(key: str, known_sections: Sections) -> str:
    leaf = key.split(".")[-1]
    if (known := names.ELSEWHERE.get(leaf)) and leaf not in known_sections:
        return known if " " in known else f"did you mean {known}?"
    same_leaf = difflib.get_close_matches(
        key, [k for k in _keys(known_sections) if k.split(".")[1] == leaf], n=1, cutoff=0
    )
    sections = (
        difflib.get_close_matches(key, known_sections, n=1, cutoff=0.75) if "." not in key else []
    )
    inside = [
        k
        for k in _keys(known_sections)
        if len(min(leaf, own := k.split(".")[1], key=len)) > 3 and (leaf in own or own in leaf)
    ]
    near = same_leaf or sections or difflib.get_close_matches(key, inside, n=1, cutoff=0)
    near = near or difflib.get_close_matches(key, _keys(known_sections), n=1, cutoff=0.7)
    if not near:
        leaves = difflib.get_close_matches(
            leaf, [k.split(".")[1] for k in _keys(known_sections)], n=1, cutoff=0.75
        )
        near = [k for k in _keys(known_sections) if leaves and k.split(".")[1] == leaves[0]]
    if near:
        return f"did you mean {near[0]}?"
    section = key.split(".")[0]
    if section in known_sections:
        return f"{section} has {', '.join(_names(known_sections[section]))}"
    return f"the sections are {', '.join(known_sections)}"


def _removed(key: str) -> str | None:
    return f"was removed; {names.REMOVED[key][1]}" if key in names.REMOVED else None


def _unknown_argument(word: str, sections: Sections) -> str:
    key = paths.shown(word.lstrip("-").split("=")[0])
    if (classes := sections.get(key)) is not None:
        name = _names(classes)[0]
        return f"--{key}: is a section; set each of its settings by itself, as --{key}.{name} VALUE"
    return f"--{key}: {_removed(key) or f'unknown option; {_nearest(key, sections)}'}"


def _describe(error: Any, values: dict[str, Any]) -> str:
    key = ".".join(
        str(part) for part in error["loc"] if not str(part).startswith(("list[", "function"))
    )
    kind, got, sections = error["type"], error["input"], _sections_of(values)
    if kind == "extra_forbidden":
        if key in error["loc"] and key in _keys(
            sections
        ):  # written with a dot, as on the command line
            section, name = key.split(".")
            return f"{key}: unknown key; nest it: {_yaml({section: {name: got}}).removeprefix('{').removesuffix('}')}"
        section, _, name = key.partition(".")
        if having := _kinds_with(section, name):
            kind, others = _kind_of(section, values), " and ".join(having)
            instead = f"remove it, or set {section}.kind"
            return f"{key}: {section}.kind is {kind}; it belongs to {others}; {instead}"
        return f"{key}: {_removed(key) or f'unknown key; {_nearest(key, sections)}'}"
    if kind == "missing":
        return f"{key}: is required" + ("" if "." in key else f" (section {key}:)")
    if kind == "model_type":
        return f"{key}: a section with keys of its own, got {_yaml(got)}"
    key = ".".join(
        key.split(".")[:2]
    )  # inside a union or a list the rest of the path names pydantic's branches
    options = _options(_field(key, sections).annotation) if key in _keys(sections) else ()
    advice = names.not_yet(key, got)
    if kind.endswith("_type") and str in options:
        return f"{key}: should be {' or '.join(getattr(o, '__name__', str(o)) for o in options if o is not type(None))}, got {got!r}"
    if kind == "string_pattern_mismatch" and key != "run.name":
        return f"{key}: should be {own_code.EXPECTED}, got {got!r}"
    if kind == "string_pattern_mismatch":
        return f"{key}: letters, digits, dots, dashes and underscores only, got {got!r}"
    if kind == "string_too_long":
        return f"{key}: at most {error['ctx']['max_length']} letters, got {len(got)}; choose a shorter one"
    message = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"{key}: {message}, got {got!r}" + (f"; {advice}" if advice else "")


def _joined(problems: Iterable[str]) -> list[str]:
    """What pydantic says of each type that a setting may have, in one line: should be this or that."""
    said: dict[tuple[str, str], str] = {}
    for problem in problems:
        should, _, got = problem.partition(", got ")
        name, _, what = should.partition(": should be ")
        before = said.get((name, got))
        said[name, got] = f"{before} or {what}" if before and what else should
    return [should + (f", got {got}" if got else "") for (_, got), should in said.items()]


def _without(values: dict[str, Any], errors: Any) -> Config | None:
    """The config without its wrong keys, so that its other problems can be found too."""
    kept = {s: dict(v) if isinstance(v, dict) else v for s, v in values.items()}
    for error in errors:
        section, *rest = error["loc"]
        if not rest or rest[0] == "kind" or not isinstance(kept.get(section), dict):
            kept.pop(section, None)
        else:
            kept[section].pop(rest[0], None)
    for section, name in (
        ("run", "name"),
        ("data", "train"),
    ):  # required: any value lets the rest be checked
        if isinstance(kept.setdefault(section, {}), dict):
            kept[section].setdefault(name, "missing")
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return None
