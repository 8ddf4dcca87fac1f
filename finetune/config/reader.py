"""Files and command lines -> Config, with every problem told at once; and back to YAML."""

import argparse
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

import yaml
from pydantic import ValidationError

from finetune.config.fields import Config, Section
from finetune.config.rules import conflicts
from finetune.errors import ConfigError

# What may differ between a run and its resumption: it changes neither the data nor the arithmetic
# of a step (micro_batch_size and checkpointing only reorder the same float operations).
RESUME_MAY_CHANGE = (
    "run.dir", "data.cache_dir", "model.attention", "train.micro_batch_size", "train.gradient_checkpointing", "train.compile", "train.hang_minutes",
    "checkpoint.*", "evaluation.*", "tracking.*",
)  # fmt: skip


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Command line -> (config, whether --check was given). Raises ConfigError with all problems at once."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s --config FILE [--check] [--section.field VALUE ...]",
        description="Specialise a Hugging Face language model to a task. Every setting below can stand in the YAML file or on the command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML run config")
    parser.add_argument(
        "--check", action="store_true", help="preflight: everything that can be known without loading weights"
    )
    for section, model in _sections():
        group = parser.add_argument_group(section, model.__doc__)
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default: {_yaml(field.default)}"
            text = f"{field.description} ({default})".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", metavar=_type_name(field.annotation), help=text)
    if not argv:
        raise ConfigError(
            "nothing to do: give --config FILE, such as configs/quickstart.yaml; --help lists every setting"
        )
    known, unknown = parser.parse_known_args(argv)
    overrides = vars(known)
    path, check = overrides.pop("config", None), overrides.pop("check", False)
    problems = [_unknown_argument(word) for word in unknown if word.startswith("-")]
    problems += [f"{word!r}: stray word on the command line" for word in unknown[:1] if not word.startswith("-")]
    values = read_yaml(path) if path else {}
    for key, raw in overrides.items():
        section, name = key.split(".")
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # if not, that is a problem of its own
            try:
                values[section][name] = _from_command_line(_field(key).annotation, raw)
            except yaml.YAMLError:
                problems.append(f"{key}: {raw!r} cannot be read; write lists as [a, b] and mappings as {{a: b}}")
    return from_dict(values, where=_where(path, bool(overrides or unknown)), problems=problems), check


def _where(path: str | None, overridden: bool) -> str:
    return " and ".join([*([path] if path else []), *(["the command line"] if overridden or not path else [])])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are errors, and 1e-4 is a number."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot read the config: {exc}") from exc
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path}: not valid YAML: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as run: and data:, got {type(values).__name__}")
    return values


def from_dict(values: dict[str, Any], where: str = "config", problems: list[str] | None = None) -> Config:
    """Validate a nested mapping. Raises ConfigError that lists every problem."""
    problems = list(problems or [])
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        errors = exc.errors()
        problems += _joined(dict.fromkeys(_describe(error) for error in errors))
        config = _without(values, errors)
    if config is not None:
        named = {problem.split(":")[0] for problem in problems}
        problems += [p for p in conflicts(config) if p.split(":")[0] not in named]
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in {where}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def to_yaml(config: Config) -> str:
    """The resolved config, every field written out; reads back as the same config."""
    return _yaml(config.model_dump(), flow=False)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"name": "a"}} -> {"run.name": "a"}; two levels, as the config has."""
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """What of a saved resolved config differs so that its checkpoints are not this run's."""
    before, now = flatten(old), flatten(new.model_dump())
    free = tuple(pattern.removesuffix("*") for pattern in RESUME_MAY_CHANGE)
    return [
        f"{key}: was {_yaml(before.get(key))}, now {_yaml(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]


def json_schema() -> dict[str, Any]:
    """JSON schema of the run config, for editors."""
    return Config.model_json_schema() | {"title": "finetune run config"}


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 numbers (PyYAML reads 1e-4 as a string) and without silent duplicate keys."""

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


def _sections() -> list[tuple[str, type[Section]]]:
    return [(name, cast(type[Section], field.annotation)) for name, field in Config.model_fields.items()]


def _field(key: str) -> Any:
    section, name = key.split(".")
    return dict(_sections())[section].model_fields[name]


def _keys() -> list[str]:
    return [f"{section}.{name}" for section, model in _sections() for name in model.model_fields]


def _yaml(value: Any, flow: bool = True) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def _type_name(annotation: Any) -> str:
    """What a value looks like, for --help: INT, LIST of INT, a|b|c."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, options))
    if origin is Annotated:
        return _type_name(options[0])
    if origin in (UnionType, Union):
        return " or ".join(dict.fromkeys(_type_name(option) for option in options if option is not type(None)))
    if origin is list:
        return f"LIST of {_type_name(options[0])}"
    return "MAP" if origin is dict or annotation is dict else annotation.__name__.upper()


def _from_command_line(annotation: Any, raw: str) -> Any:
    """A word of the command line is YAML, except that what can be a string stays one."""
    options = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    if str in options:
        try:
            parsed = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:
            return raw
        as_list = isinstance(parsed, list) and any(get_origin(option) is list for option in options)
        return parsed if as_list or (parsed is None and type(None) in options) else raw
    return yaml.load(raw, Loader=_Loader)


# What other tools call a setting.
ELSEWHERE = {
    "learning_rate": "optimizer.lr", "optim": "optimizer.kind", "lr_scheduler_type": "schedule.kind", "warmup_ratio": "schedule.warmup_steps",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.global_batch_size",
    "max_seq_length": "data.max_length", "sequence_len": "data.max_length", "cutoff_len": "data.max_length",
    "model_name_or_path": "model.path", "base_model": "model.path", "dataset": "data.train", "output_dir": "run.dir",
    "lora_r": "adapter.r", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "load_in_4bit": "adapter.kind",
}  # fmt: skip


def _nearest(key: str) -> str:
    leaf = key.split(".")[-1]
    if leaf in ELSEWHERE:
        return f"did you mean {ELSEWHERE[leaf]}?"
    same_leaf = difflib.get_close_matches(key, [k for k in _keys() if k.split(".")[1] == leaf], n=1, cutoff=0)
    sections = difflib.get_close_matches(key, dict(_sections()), n=1) if "." not in key else []
    inside = [
        k for k in _keys() if len(min(leaf, own := k.split(".")[1], key=len)) > 3 and (leaf in own or own in leaf)
    ]
    near = same_leaf or sections or difflib.get_close_matches(key, inside, n=1, cutoff=0)
    near = near or difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5)
    if not near:
        leaves = difflib.get_close_matches(leaf, [k.split(".")[1] for k in _keys()], n=1, cutoff=0.6)
        near = [k for k in _keys() if leaves and k.split(".")[1] == leaves[0]]
    if near:
        return f"did you mean {near[0]}?"
    section = key.split(".")[0]
    names = dict(_sections())
    if section in names:
        return f"{section} has {', '.join(names[section].model_fields)}"
    return f"the sections are {', '.join(names)}"


def _unknown_argument(word: str) -> str:
    key = word.lstrip("-").split("=")[0]
    return f"--{key}: unknown option; {_nearest(key)}"


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("list[", "function")))
    kind, got = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key)}"
    if kind == "missing":
        return f"{key}: required and not given" + ("" if "." in key else f" (section {key}:)")
    if kind == "model_type":
        return f"{key}: a section with keys of its own, got {_yaml(got)}"
    key = ".".join(key.split(".")[:2])  # inside a union or a list the rest of the path names pydantic's branches
    options = get_args(_field(key).annotation) if key in _keys() else ()
    if kind.endswith("_type") and str in options:
        return f"{key}: should be {' or '.join(getattr(o, '__name__', str(o)) for o in options if o is not type(None))}, got {got!r}"
    if kind == "string_pattern_mismatch":
        return f"{key}: letters, digits, dots, dashes and underscores only, got {got!r}"
    message = error["msg"].removeprefix("Input ")
    return f"{key}: {message}, got {got!r}"


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
        if not rest or not isinstance(kept.get(section), dict):
            kept.pop(section, None)
        else:
            kept[section].pop(rest[0], None)
    for section, name in (("run", "name"), ("data", "train")):  # required: any value lets the rest be checked
        if isinstance(kept.setdefault(section, {}), dict):
            kept[section].setdefault(name, "missing")
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return None
