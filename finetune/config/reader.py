"""A nested mapping -> Config, reporting every problem at once; and Config -> YAML."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from finetune import own_code
from finetune.config import base, names, paths
from finetune.config.fields import Config
from finetune.config.messages import NESTED, describe, joined, listed
from finetune.config.own import (
    ENVIRONMENT,
    environment_in,
    own_environment,
    own_format,
    own_objective,
    own_reward,
    rewards_in,
)  # fmt: skip
from finetune.config.rules import conflicts
from finetune.config.sections import field, kinds_with, sections_of_config, takes_only_lists
from finetune.config.yaml_text import NotText, dump, read_yaml
from finetune.errors import ConfigError, RunDirectoryError

# What may differ between a run and its resumption: it changes neither the data nor the arithmetic
# of a step (micro_batch_size and checkpointing only reorder the same float operations).
RESUME_MAY_CHANGE = (
    "run.dir", "data.cache_dir", "data.shards", "model.attention", "train.micro_batch_size",
    "train.gradient_checkpointing", "train.activation_offload", "train.compile",
    "train.hang_minutes",
    "checkpoint.*", "evaluation.*", "tracking.*",
)  # fmt: skip
OWN_CODE = ("objective.kind", "data.format")
"""Settings that may name code of the user's own."""
PUT_BACK = "put back a copy of it (manifest.json of each checkpoint holds the same under config)"


def own_names(settings: dict[str, Any]) -> dict[str, str]:
    """Return `section.name` -> code of the user's own that flattened settings name there."""
    named: dict[str, Any] = {key: settings.get(key) for key in OWN_CODE}
    rewards = rewards_in({"rewards": settings.get("objective.rewards")})
    named |= {key: each.get("kind") for key, each in rewards.items()}
    named[ENVIRONMENT] = environment_in({"rollouts": settings.get("objective.rollouts")})
    return {key: str(name) for key, name in named.items() if own_code.is_own(name)}


def from_dict(
    values: dict[str, Any],
    where: str = "config",
    problems: list[str] | None = None,
    folder: Path | None = None,
    needs_weights: bool = True,
) -> Config:
    """Validate a nested mapping. Raises ConfigError that lists every problem.

    `folder`: of the config; code of the user's own is looked for there first. `needs_weights`:
    whether a base in a folder must have its weights.
    """
    halves = dict.fromkeys(paths.half_characters(values))
    what = "contains half a character (a lone surrogate), or bytes that are not UTF-8"
    problems = [*(problems or []), *(f"{key}: {what}; write it again" for key in halves)]
    if any("half a character" in problem for problem in problems):  # nothing else could be printed
        raise ConfigError(listed(problems, where))
    config, left_out = None, set[str]()
    values, of_code = _with_own_code(_without_other_kinds(_with_lists(values)), folder)
    problems += of_code
    try:
        config = Config.model_validate(values)
        dump(config.objective.model_dump())  # settings of a user's own may be of any type
    except yaml.YAMLError as exc:
        problems.append(
            f"objective: these settings cannot be written to config.yaml: {exc}; use numbers, "
            "text, lists and mappings"
        )
    except ValidationError as exc:
        errors = exc.errors()
        problems += joined(dict.fromkeys(describe(error, values) for error in errors))
        config = _without(values, errors)
        left_out = {".".join(map(str, error["loc"][:2])) for error in errors}
    except Exception as exc:
        if not isinstance(values.get("objective"), dict) or not own_code.is_own(
            values["objective"].get("kind")
        ):
            raise
        code = own_code.get(values["objective"]["kind"])  # its Settings check in code of its own
        raise ConfigError(listed([*problems, f"objective: {code.blame(exc)}"], where)) from exc
    if config is not None and not any(each.startswith("objective.kind: ") for each in of_code):
        config, of_base = _beside_base(config, needs_weights)
        problems += of_base
        named = {problem.split(":")[0] for problem in problems}
        problems += [
            each for each in conflicts(config)
            if each.split(":")[0] not in named and not any(name in each for name in left_out)
        ]  # fmt: skip
    if problems or config is None:
        raise ConfigError(listed(problems, where))
    return config


def _with_own_code(values: dict[str, Any], folder: Path | None) -> tuple[dict[str, Any], list[str]]:
    """Read the user's own code; return (`values` with its full paths, what is wrong with it)."""
    problems = []
    for key, read in zip(OWN_CODE, (own_objective, own_format)):
        section, name = key.split(".")
        given = values.get(section)
        if not isinstance(given, dict) or not own_code.is_own(given.get(name)):
            continue
        try:
            found = own_code.find(given[name], folder)
            read(found)
            given = given | {name: found}
        except ConfigError as exc:
            problems.append(f"{key}: {exc}")
            # Without its kind, no other setting of an objective can be checked.
            given = {} if name == "kind" else {each: given[each] for each in given if each != name}
        values = values | {section: given}
    values = _with_own_rewards(values, folder, problems)
    return _with_own_environment(values, folder, problems), problems


def _with_own_rewards(
    values: dict[str, Any], folder: Path | None, problems: list[str]
) -> dict[str, Any]:
    """Read the user's own rewards, of which a config may list several; note what is wrong."""
    objective: Any = values.get("objective")
    for key, reward in rewards_in(objective).items():
        if not own_code.is_own(reward.get("kind")):
            continue
        try:
            found = own_code.find(reward["kind"], folder)
            own_reward(found)
        except ConfigError as exc:
            problems.append(f"{key}.kind: {exc}")
            continue
        completed = reward | {"kind": found}
        rewards = [completed if each is reward else each for each in objective["rewards"]]
        objective = objective | {"rewards": rewards}
    return values | {"objective": objective} if isinstance(objective, dict) else values


def _with_own_environment(
    values: dict[str, Any], folder: Path | None, problems: list[str]
) -> dict[str, Any]:
    objective: Any = values.get("objective")
    name = environment_in(objective)
    if name is None:
        return values
    try:
        found = own_code.find(name, folder)
        own_environment(found)
    except ConfigError as exc:
        problems.append(f"{ENVIRONMENT}: {exc}")
        return values
    rollouts = objective["rollouts"] | {"environment": found}
    return values | {"objective": objective | {"rollouts": rollouts}}


def _beside_base(config: Config, needs_weights: bool) -> tuple[Config, list[str]]:
    """Settle what a base in a folder decides; return (the config, problems of the folders)."""
    path = config.model.path
    adapter = None if config.adapter.kind == "full" else config.adapter.path
    of_adapter = []
    if adapter is not None and os.path.exists(adapter) and (found := base.adapter_problem(adapter)):
        of_adapter = [f"adapter.path: {found}"]
    if path is None or not os.path.exists(path):
        return config, of_adapter
    if problem := base.folder_problem(path, needs_weights=False):
        return config, [f"model.path: {problem}", *of_adapter]
    settled, problems = base.settled(config, base.config_of(path))
    # Files are checked last: a model that cannot be trained need not be downloaded again.
    if not problems and needs_weights and config.model.init == "pretrained":
        problem = base.weights_problem(Path(path))
        problems = [f"model.path: {problem}"] if problem else []
    return settled, problems + of_adapter


def _with_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Put a word into a list where a list is expected; drop removed settings at their default."""
    sections = sections_of_config()
    result = dict(values)
    for section in sections:
        given = values.get(section)
        if not isinstance(given, dict):
            continue
        kept = {}
        for name, value in given.items():
            if _is_removed_default(f"{section}.{name}", value):
                continue
            is_word = isinstance(value, str | int | float)
            is_listed = is_word and takes_only_lists(field(f"{section}.{name}", sections))
            kept[name] = [value] if is_listed else value
        result[section] = kept
    return result


def _is_removed_default(key: str, value: Any) -> bool:
    """Return whether an older version wrote this for a setting that its user left alone."""
    return key in names.REMOVED and names.REMOVED[key][0] == value


def _without(values: dict[str, Any], errors: Any) -> Config | None:
    """Return the config without its wrong keys, so that its other problems can be found too."""
    kept = {s: dict(v) if isinstance(v, dict) else v for s, v in values.items()}
    for error in errors:
        section, *rest = error["loc"]
        if not rest or rest[0] == "kind" or not isinstance(kept.get(section), dict):
            kept.pop(section, None)
        else:
            kept[section].pop(rest[0], None)
    # Required settings: with any value the others can be checked.
    for section, name in (("run", "name"), ("data", "train")):
        if isinstance(kept.setdefault(section, {}), dict):
            kept[section].setdefault(name, "missing")
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return None


def read_resolved(path: Path) -> dict[str, Any]:
    """Return the config.yaml that a run wrote. Raises RunDirectoryError if a section is missing."""
    problem = None
    try:
        values = read_yaml(path)
    except ConfigError as exc:
        if isinstance(cause := exc.__cause__, OSError):
            why = f"{cause.strerror}; give the directory of a run"
            raise RunDirectoryError(f"{path} cannot be read: {why}") from exc
        is_text = not isinstance(cause, NotText)
        problem = "it is not YAML with sections such as run: and data:" if is_text else str(cause)
    else:
        wrong = [name for name in sections_of_config() if not isinstance(values.get(name), dict)]
        problem = f"its section {wrong[0]} is missing, or cut off" if wrong else None
    if problem:
        what = f"is damaged: {problem}; {PUT_BACK}, or choose another run.name"
        raise RunDirectoryError(f"{path} {what}")
    return _of_their_kinds(values)


def to_yaml(config: Config) -> str:
    """Write the resolved config with every field; it reads back as the same config."""
    return dump(config.model_dump(), flow=False)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"name": "a"}} -> {"run.name": "a"}; two levels, as the config has."""
    return {
        f"{section}.{name}": value
        for section, fields in values.items()
        for name, value in fields.items()
    }


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """List the differences to a saved config that forbid to resume from its checkpoints."""
    saved = flatten(_of_their_kinds(old))
    before = {key: saved[key] for key in saved if not _is_removed_default(key, saved[key])}
    now = flatten(new.model_dump())
    for values in (before, now):
        own = [key for key in OWN_CODE if own_code.is_own(values.get(key))]
        values |= {key: own_code.without_folder(values[key]) for key in own}
        if isinstance(rollouts := values.get("objective.rollouts"), dict):
            rollouts = {name: value for name, value in rollouts.items() if name != "engine"}
            if name := rollouts.get("environment"):
                rollouts["environment"] = own_code.without_folder(name)
            values["objective.rollouts"] = rollouts
        if isinstance(rewards := values.get("objective.rewards"), list):
            values["objective.rewards"] = [
                each | {"kind": own_code.without_folder(each["kind"])} for each in rewards
            ]
    free = tuple(pattern.removesuffix("*") for pattern in RESUME_MAY_CHANGE)
    return [
        f"{inner}: was {dump(was)}, now {dump(is_now)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
        for inner, was, is_now in _parted(key, before.get(key), now.get(key))
    ]


def _parted(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (key, before, now) of what differs, one by one inside the settings of NESTED."""
    is_nested = tuple(key.split(".")[:2]) in NESTED
    if is_nested and isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = (dict(enumerate(each)) for each in (old, new))
    if not (is_nested and isinstance(old, dict) and isinstance(new, dict)):
        yield key, old, new
        return
    for name in dict.fromkeys((*old, *new)):
        if old.get(name) != new.get(name):
            yield from _parted(f"{key}.{name}", old.get(name), new.get(name))


def _of_their_kinds(old: dict[str, Any]) -> dict[str, Any]:
    """Drop the settings of other kinds from a saved config; earlier versions wrote them too."""
    return {
        section: {
            name: value
            for name, value in fields.items()
            if _belongs(section, name, fields.get("kind"))
        }
        for section, fields in old.items()
    }


def _without_other_kinds(values: dict[str, Any]) -> dict[str, Any]:
    """Drop defaults of other kinds: the config.yaml of an earlier version wrote them, too."""
    kept = {}
    for section, given in values.items():
        classes = sections_of_config().get(section, ())
        if len(classes) < 2 or not isinstance(given, dict) or own_code.is_own(given.get("kind")):
            continue
        defaults = {n: f.default for cls in classes for n, f in cls.model_fields.items()}
        if not set(defaults) <= set(given):  # a user wrote it
            continue
        kept[section] = {
            name: value
            for name, value in given.items()
            if name not in defaults
            or _belongs(section, name, given.get("kind"))
            or value != defaults[name]
        }
    return values | kept


def _belongs(section: str, name: str, kind: Any) -> bool:
    """Return whether a kind has a setting, or no other built-in kind has it."""
    having = kinds_with(section, name)
    return not having or kind in having or own_code.is_own(kind)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of the run config, for editors."""
    return Config.model_json_schema() | {"title": "finetune run config"}
