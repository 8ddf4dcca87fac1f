"""Right or wrong by a rule: exact match, contains, regex, stop words, numbers, JSON."""

import re
import threading
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from finetune import extras
from finetune.evaluation.scores.base import OfAnswer, Value, of_reference
from finetune.evaluation.scores.normalise import (
    canonical,
    json_in,
    normalised,
    numbers_in,
    words,
)
from finetune.generation.completions import Completion, Score


def exact_match(names: Sequence[str] = ()) -> OfAnswer:
    """Score 1 if answer and reference are equal after the named normalisations."""

    def of(answer: str, reference: str) -> Value:
        wanted = normalised(reference, names)
        if wanted is None:
            return Score(None, "the reference holds no JSON")
        return float(normalised(answer, names) == wanted)

    name = " ".join(["exact match", *([f"without {', '.join(names)}"] if names else [])])
    if tuple(names) == ("json",):
        name = "JSON match"
    return of_reference(name, "1 if the answer is the reference", of)


def holds(text: str, part: str) -> bool:
    """Return whether a text holds a part: its words in a row, without case and punctuation."""
    wanted = words(part)
    if not wanted:  # signs alone
        return bool(part.strip()) and part.strip().casefold() in text.casefold()
    return f" {' '.join(wanted)} " in f" {' '.join(words(text))} "


def contains(part: str | None = None) -> OfAnswer:
    """Score 1 if the answer holds the reference, or `part`, as whole words."""
    line = "1 if the answer holds the reference's words in a row"
    if part is None:
        return of_reference("contains", line, lambda answer, reference: holds(answer, reference))
    line = line.replace("the reference's words", "these words")
    return OfAnswer(f"contains {part}", line, lambda each: holds(each.text, part))


def regex(pattern: "re.Pattern[str]") -> OfAnswer:
    """Score 1 if a pattern matches anywhere in the answer."""
    line = "1 if the pattern matches somewhere in the answer"
    return OfAnswer(
        f"regex {pattern.pattern}", line, lambda each: pattern.search(each.text) is not None
    )


def stop_words(phrases: Sequence[str]) -> OfAnswer:
    """Score 1 if the answer holds none of the phrases."""
    return OfAnswer(
        f"without {', '.join(phrases)}", "1 if the answer holds none of these words or phrases",
        lambda each: not any(holds(each.text, phrase) for phrase in phrases),
    )  # fmt: skip


def number(tolerance: Decimal = Decimal(0)) -> OfAnswer:
    """Score 1 if the last number of the answer is the last number of the reference.

    tolerance: of the difference, relative to the reference.
    """

    def of(answer: str, reference: str) -> Value:
        wanted, given = numbers_in(reference), numbers_in(answer)
        if not wanted:
            return Score(None, "the reference holds no number")
        return bool(given) and abs(given[-1] - wanted[-1]) <= tolerance * abs(wanted[-1])

    return of_reference("number", "1 if the last number is that of the reference", of)


def math() -> OfAnswer:
    """Score 1 if math-verify finds the answer equal to the reference: 1/2 = 0.5, LaTeX, sets."""
    extras.require("math-verify", "--scores math")
    from math_verify import parse, verify

    def of(answer: str, reference: str) -> Value:
        # Its limits of seconds are by signal, which only the main thread may ask for.
        limit = 5 if threading.current_thread() is threading.main_thread() else None
        wanted = parse(reference, parsing_timeout=limit)
        if not wanted:
            return Score(None, "math-verify finds no value in the reference")
        given = parse(answer, parsing_timeout=limit)
        return bool(verify(wanted, given, timeout_seconds=limit))

    return of_reference("math", "1 if the answer equals the reference as mathematics", of)


def json_schema(schema: Mapping[str, Any]) -> OfAnswer:
    """Score 1 if the answer holds JSON that a schema accepts. The schema was checked before."""
    extras.require("jsonschema", "--scores json-schema")
    from jsonschema.validators import validator_for

    validator = validator_for(schema)(schema)

    def of(completion: Completion) -> Value:
        found = json_in(completion.text)
        if found is None:
            return Score(0.0, "holds no JSON")
        problem = next(validator.iter_errors(found[0]), None)
        return Score(1.0) if problem is None else Score(0.0, str(problem.message)[:200])

    return OfAnswer("JSON schema", "1 if the answer holds JSON that the schema accepts", of)


def is_json_equal(answer: str, reference: Any) -> bool:
    """Return whether an answer holds this JSON value."""
    found = json_in(answer)
    return found is not None and canonical(found[0]) == canonical(reference)
