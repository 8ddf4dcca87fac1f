"""The request for more data: what evaluation asks for, and `finetune data generate` makes.

A JSON file of slices, groups of rows that the tuned model answers wrongly. configs/request.json is
its JSON schema, which `make schema` writes.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from finetune import failures
from finetune.data.places import printable, short
from finetune.errors import DataError

MOST_PROBLEMS = 10
Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Example(_Strict):
    """A row that the model answers wrongly."""

    prompt: Text = Field(description="what the model was asked")
    reference: Text | None = Field(None, description="the right answer")
    answer: str | None = Field(None, description="what the model answered")
    score: float | None = Field(None, description="score of the answer")


class Slice(_Strict):
    """Rows that have something in common, of which more are wanted."""

    name: Text = Field(description="short name, which the new rows carry")
    description: str = Field("", description="what the rows have in common, in a sentence or two")
    count: int = Field(ge=1, description="how many rows are wanted")
    examples: list[Example] = Field(min_length=1, description="rows of this slice")
    topics: list[Text] = Field([], description="what new rows may be about")
    constraints: list[Text] = Field([], description="what each new row must keep to")


class DataRequest(_Strict):
    """More rows like those that a tuned model answers wrongly."""

    version: Literal[1] = Field(1, description="of this format")
    model: str | None = Field(None, description="the model that was evaluated")
    data: str | None = Field(None, description="the rows that it was evaluated on")
    slices: list[Slice] = Field(min_length=1, description="what is wanted")


def read(path: str) -> DataRequest:
    """Read a request. Raise DataError that names the file and every key that is wrong."""
    shown = printable(path)
    try:
        data = Path(path).read_bytes()
    except OSError as exc:
        failures.reraise(exc, f"{shown}: cannot be read now")
        raise DataError(f"{shown}: cannot be read ({exc.strerror}); is it the right file?") from exc
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{shown}: broken JSON: {failures.parsing_reason(exc)}") from exc
    try:
        request = DataRequest.model_validate_json(json.dumps(values))
    except ValidationError as exc:
        what = "is not a request for more data (configs/request.json)"
        raise DataError(f"{shown}: {problems(exc, what)}") from exc
    names = [each.name for each in request.slices]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{shown}: two slices have the name {short(twice[0])!r}; rename one")
    return request


def problems(exc: ValidationError, what: str) -> str:
    """Say what is wrong, and where: `slices[0].count: Input should be ..., got 0`."""
    found = exc.errors(include_url=False)
    listed = []
    for each in found[:MOST_PROBLEMS]:
        parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in each["loc"]]
        where = "".join(parts).removeprefix(".") or "the whole"
        has_no_input = each["type"] in ("missing", "json_invalid")
        got = "" if has_no_input else f", got {short(each['input'])}"
        listed.append(f"\n  {short(where)}: {each['msg']}{got}")
    more = len(found) - len(listed)
    rest = f"\n  and {more:,} more" if more else ""
    return what + "".join(listed) + rest


if __name__ == "__main__":
    print(json.dumps(DataRequest.model_json_schema(), indent=2))
