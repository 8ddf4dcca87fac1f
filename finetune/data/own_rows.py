"""Call the user's own function that formats rows, and check what it returns."""

from collections.abc import Iterator
from typing import Any

from finetune import failures, own_code
from finetune.data.column_names import SHAPES, fitting
from finetune.data.places import Place, Row, list_columns, short
from finetune.errors import DataError

# Of a field, which is float32: the largest number, and the largest exact whole number.
MOST, WHOLE = 3.4028234663852886e38, 1 << 24
Fields = dict[str, tuple[float, ...]]
Formatted = tuple[list[Row], Fields]
"""A row of each conversation of a sample, and the sample's fields."""


def formatted(row: Row, format: str) -> Formatted | None:
    """Return the rows and fields that the user's own function `format` makes of a row.

    None where it skips the row. Any other format leaves the row as it is. Raises DataError that
    names the row and the line of the function.
    """
    if not own_code.is_own(format):
        return [row], {}
    code = own_code.get(format)
    try:
        values = code.value(dict(row.values))
    except (Exception, SystemExit) as exc:
        if isinstance(exc, Exception):
            failures.reraise(exc)
        raise DataError(f"{row.place}: data.format: {code.blame(exc)}") from exc
    if values is None:
        return None
    where = f"{row.place}: data.format: {code}"
    fields, documents = {}, [values]
    if isinstance(values, dict):
        fields = values.get("fields", {})
        documents = [{name: value for name, value in values.items() if name != "fields"}]
        if isinstance(given := values.get("documents"), Iterator):
            raise DataError(f"{where}: documents should be a list, got a {type(given).__name__}")
        if isinstance(given, list | tuple):
            others, documents = documents[0].keys() - {"documents"}, list(given)
            if others:
                raise DataError(
                    f"{where} returns {list_columns(sorted(map(str, others)))} beside documents, "
                    "which would be ignored; move them into each document, or numbers into fields"
                )
    made = [_document(row.place, where, each) for each in documents]
    if not made:
        raise DataError(f"{where} returns no documents; return None to skip the row")
    return made, _fields(where, fields, len(made))


def _document(place: Place, where: str, values: Any) -> Row:
    """Check what a user's function returned for one conversation."""
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise DataError(
            f"{where} should return a dict with messages, or prompt and completion, or text, or "
            f"documents (a list of such dicts), or None to skip the row, got {short(values)}"
        )
    if "fields" in values:
        raise DataError(f"{where} returns fields inside a document; return them beside documents")
    made = Row(place, values)
    if fitting(made, {}) is None:
        raise DataError(
            f"{where} gives columns {list_columns(sorted(made.values))}, which fit no format "
            f"({SHAPES})"
        )
    return made


def _fields(where: str, fields: Any, count: int) -> dict[str, tuple[float, ...]]:
    """Check the fields of `count` conversations; a single number belongs to each of them."""
    found = {}
    for name, value in fields.items() if isinstance(fields, dict) else [(None, fields)]:
        numbers = value if isinstance(value, list | tuple) else [value] * count
        if (
            not isinstance(name, str)
            or len(numbers) != count
            or not all(isinstance(n, int | float) and abs(n) <= MOST for n in numbers)
        ):
            what = "fields" if name is None else f"fields: {short(name)}"
            raise DataError(
                f"{where}: {what} should be a finite number, or a list with one for each document "
                f"({count}), by name, got {value!r:.80}"
            )
        if inexact := next((n for n in numbers if isinstance(n, int) and abs(n) > WHOLE), None):
            raise DataError(
                f"{where}: fields: {short(name)} is {inexact:,}, but fields are float32, which "
                f"holds whole numbers up to {WHOLE:,}; make it smaller, such as a difference"
            )
        found[name] = tuple(map(float, numbers))
    return found


def shown(format: str) -> str:
    return str(own_code.get(format)) if own_code.is_own(format) else format
