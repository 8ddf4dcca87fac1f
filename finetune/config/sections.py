"""The sections of a config: their classes, one for each kind, and their settings. No torch."""

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from finetune import own_code
from finetune.config import kinds
from finetune.config.fields import Config
from finetune.config.kinds import Section
from finetune.config.own import OwnObjective, own_objective

Sections = dict[str, tuple[type[Section], ...]]
"""Section -> its classes: one, or one for each kind."""
NUMBER = "N"
"""Stands in a key for the place of a section in a list, as in objective.rewards.N."""


def sections_of_config(own: type[OwnObjective] | None = None) -> Sections:
    """Return the sections of any config. `own`: the section of a user's own objective."""
    found: Sections = {
        name: get_args(field.annotation) or (cast(type[Section], field.annotation),)
        for name, field in Config.model_fields.items()
    }
    if own:
        found["objective"] = (*found["objective"][:-1], own)
    return found


def sections_of(values: dict[str, Any]) -> Sections:
    """Return the sections of one config, whose own code was read before."""
    kind = kind_of("objective", values)
    return sections_of_config(own_objective(kind) if own_code.is_own(kind) else None)


def with_inner(sections: Sections) -> Sections:
    """Return the sections and those inside their settings: objective.rollouts, and so on."""
    found = dict(sections)
    for section, classes in sections.items():
        for cls in classes:
            for name, inner in cls.model_fields.items():
                for key, each in _classes_in(f"{section}.{name}", inner.annotation):
                    before = found.get(key, ())
                    if not any(issubclass(each, known) for known in before):  # other defaults
                        found[key] = (*before, each)
    return found if len(found) == len(sections) else with_inner(found)


def _classes_in(key: str, annotation: Any) -> list[tuple[str, type[Section]]]:
    found = []
    for each in types_in(annotation):
        if get_origin(each) is list:
            found += _classes_in(f"{key}.{NUMBER}", get_args(each)[0])
        elif isinstance(each, type) and issubclass(each, Section):
            found.append((key, each))
    return found


def names_in(classes: tuple[type[Section], ...]) -> list[str]:
    """Return the settings of a section, of all its kinds."""
    return list(dict.fromkeys(name for cls in classes for name in cls.model_fields))


def field(key: str, sections: Sections) -> Any:
    """Return a setting of the first kind that has it; None if no kind has it.

    `key`: with the number of a section in a list, or with NUMBER.
    """
    section, _, name = unnumbered(key).rpartition(".")
    having = (cls for cls in sections[section] if name in cls.model_fields)
    return next((cls.model_fields[name] for cls in having), None)


def unnumbered(key: str) -> str:
    """Return a key with NUMBER in place of its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", f".{NUMBER}", key)


def keys_of(sections: Sections) -> list[str]:
    """Return every `section.name`."""
    return [f"{section}.{name}" for section in sections for name in names_in(sections[section])]


def kind_of(section: str, values: dict[str, Any]) -> Any:
    """Return the kind that a config gives a section, or its default."""
    default = getattr(Config.model_fields[section].default, "kind", None)
    given = values.get(section)
    return given.get("kind", default) if isinstance(given, dict) else default


def kinds_with(section: str, name: str) -> list[str]:
    """Return the kinds that have a setting; empty if the section has no kinds."""
    classes = sections_of_config().get(section, ())
    having = [cls for cls in classes if name in cls.model_fields]
    return [kinds.name_of(cls) for cls in having] if len(classes) > 1 else []


def type_name(annotation: Any) -> str:
    """Describe the values of a type for --help: INT, LIST of INT, a|b|c."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "|".join(map(str, options))
    if origin is Annotated:
        title = getattr(options[1], "title", None)
        return str(title) if title else type_name(options[0])
    if origin in (UnionType, Union):
        types = (type_name(option) for option in options if option is not type(None))
        return " or ".join(dict.fromkeys(types))
    if origin is list:
        return f"LIST of {type_name(options[0])}"
    return "MAP" if origin is dict or annotation is dict else annotation.__name__.upper()


def types_in(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union, or the one type; Annotated or not."""
    if get_origin(annotation) is Annotated:
        return types_in(get_args(annotation)[0])
    if get_origin(annotation) in (UnionType, Union):
        return tuple(inner for option in get_args(annotation) for inner in types_in(option))
    return (annotation,)


def takes_only_lists(field: Any) -> bool:
    """Return whether a setting takes a list, perhaps null, and nothing else."""
    if field is None:
        return False
    return {get_origin(each) or each for each in types_in(field.annotation)} <= {list, type(None)}
