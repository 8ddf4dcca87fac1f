"""Sections of the config; the `kind` of some decides which settings they have. No torch."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Annotated, Any, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WrapValidator,
)
from pydantic_core import CoreSchema, InitErrorDetails

from finetune import own_code
from finetune.errors import either

PositiveNumber = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Logits are some tens: divided by less than this they may overflow in 16 bits, and sampling takes
# the likeliest token anyway; divided by more, every token is as likely as another.
TEMPERATURES = 1e-3, 100.0
Temperature = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]


def temperature_argument(text: str) -> float:
    """Parse a sampling temperature, where 0 takes the likeliest token; a type for argparse."""
    least, most = TEMPERATURES
    with suppress(ValueError):
        if (value := float(text)) == 0 or least <= value <= most:
            return value
    raise argparse.ArgumentTypeError(f"should be 0, or from {least:g} to {most:g}, got {text!r}")


class Section(BaseModel):
    """Refuse unknown keys and wrong types; values cannot change after loading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        """Put each description on one line: editors would show the line breaks."""
        schema = handler(core)
        for setting in handler.resolve_ref_schema(schema).get("properties", {}).values():
            if "description" in setting:
                setting["description"] = " ".join(setting["description"].split())
        return schema


class Kind(Section):
    kind: str


def by_kind(
    *classes: type[BaseModel], own: Callable[[str], type[BaseModel]] | None = None
) -> WrapValidator:
    """Validate a section by the class of its `kind`; the first class is the default.

    `own`: returns the class for a kind that names a user's own code.
    """
    known = {name_of(cls): cls for cls in classes}
    listed = [repr(name) for name in known] + ([own_code.EXPECTED] if own else [])

    def validate(values: Any, union: Any) -> Any:
        if isinstance(values, BaseModel):
            return union(values)
        if not isinstance(values, Mapping):
            raise _error("model_type", (), values, {"class_name": classes[0].__name__})
        kind = values.get("kind", name_of(classes[0]))
        if own and own_code.is_own(kind):
            return own(kind).model_validate(values)
        if isinstance(kind, str) and kind in known:
            return known[kind].model_validate(values)
        raise _error("literal_error", ("kind",), kind, {"expected": either(listed)})

    return WrapValidator(validate)


def name_of(cls: type[BaseModel]) -> str:
    """Return the kind of a class; FILE.py:NAME for a user's own."""
    options = get_args(cls.model_fields["kind"].annotation)
    return str(options[0]) if options else own_code.EXPECTED


def _error(
    problem: str, place: tuple[str, ...], got: Any, context: dict[str, Any]
) -> ValidationError:
    details = InitErrorDetails(type=problem, loc=place, input=got, ctx=context)
    return ValidationError.from_exception_data("section", [details])
