"""The sections of a config: their classes, one for each kind, and their settings. No torch."""

from types import UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from finetune import own_code
from finetune.config import kinds
from finetune.config.fields import Config
from finetune.config.kinds import Section
from finetune.config.own import OwnObjective, own_objective

Sections = dict[str, tuple[type[Section], ...]]
"""Section -> its classes: one, or one for each kind."""


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


def names_in(classes: tuple[type[Section], ...]) -> list[str]:
    """Return the settings of a section, of all its kinds."""
    return list(dict.fromkeys(name for cls in classes for name in cls.model_fields))


def field(key: str, sections: Sections) -> Any:
    """Return a setting of the first kind that has it; None if no kind has it."""
    section, _, name = key.partition(".")
    having = (cls for cls in sections[section] if name in cls.model_fields)
    return next((cls.model_fields[name] for cls in having), None)


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
