"""Every score by its name, what `--scores` takes, and which scores fit the references.

scorers = table.choose(["exact-match=case,articles", "rouge-l", "score.py:polite"])
table.suitable(prompts)  # names for these references, and why
"""

import json
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from finetune import extras, own_code
from finetune.data.places import printable
from finetune.errors import ConfigError, UserError
from finetune.evaluation.scores import (
    cost,
    entailment,
    form,
    judgement,
    labels,
    matching,
    overlap,
    reasoning_tasks,
)
from finetune.evaluation.scores.base import of_reference
from finetune.evaluation.scores.code_tests import DEFAULT_COLUMN, CodeTests
from finetune.evaluation.scores.consistency import Consistency
from finetune.evaluation.scores.normalise import NORMALISATIONS, json_in, numbers_in, words
from finetune.evaluation.scores.own import own_score
from finetune.evaluation.scores.similarity import Similarity
from finetune.generation.completions import Prompt, Scorer


@dataclass(frozen=True)
class Kind:
    """A score that --scores takes as `name`, or as `name=value`.

    value: how the value is written; in brackets where it may be left out; empty: none is taken.
    make: gets the value, or None without.
    """

    line: str
    make: Callable[[str | None], Scorer]
    value: str = ""


def _exact_match(value: str | None) -> Scorer:
    names = tuple(value.split(",")) if value else ()
    if unknown := [name for name in names if name not in NORMALISATIONS]:
        raise ConfigError(
            f"--scores exact-match: {printable(unknown[0])!r} should be one of "
            f"{', '.join(NORMALISATIONS)}"
        )
    return matching.exact_match(names)


def _regex(value: str | None) -> Scorer:
    try:
        return matching.regex(re.compile(value or ""))
    except (re.error, RecursionError, OverflowError) as exc:
        raise ConfigError(
            f"--scores regex: {printable(str(value))} is not a pattern: {exc}"
        ) from exc


def _stop_words(value: str | None) -> Scorer:
    phrases = [part.strip() for part in (value or "").split(",") if part.strip()]
    return matching.stop_words(phrases)


def _number(value: str | None) -> Scorer:
    try:
        tolerance = Decimal(value or 0)
        if tolerance.is_finite() and tolerance >= 0:
            return matching.number(tolerance)
    except InvalidOperation:
        pass
    raise ConfigError(
        f"--scores number: the tolerance should be a number from 0, such as 0.01, got {value!r}"
    )


def _cost(value: str | None) -> Scorer:
    with suppress(ValueError):
        hour, *tokens = [float(part) for part in (value or "").split(",")]
        if all(0 <= price < float("inf") for price in (hour, *tokens)) and len(tokens) in (0, 2):
            return cost.cost(hour, (tokens[0], tokens[1]) if tokens else None)
    raise ConfigError(
        "--scores cost: should be the price of an hour, such as cost=2.50, or with the prices of a "
        "million tokens of prompts and of answers at a server, such as cost=2.50,0.15,0.60, got "
        f"{value!r}"
    )


def _json_schema(value: str | None) -> Scorer:
    path = Path(str(value))
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise UserError(f"--scores json-schema: {printable(str(path))}: no such file") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise UserError(
            f"--scores json-schema: {printable(str(path))}: cannot be read: {exc}"
        ) from exc
    return matching.json_schema(checked_schema(schema, f"--scores json-schema: {value}"))


def checked_schema(schema: Any, where: str) -> Any:
    """Return a JSON schema. Raises UserError if it is not one."""
    extras.require("jsonschema", where.partition(":")[0])
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if not isinstance(schema, dict):
        raise UserError(f"{where}: should be a JSON object, got a {type(schema).__name__}")
    try:
        validator_for(schema).check_schema(schema)
    except SchemaError as exc:
        raise UserError(f"{where}: not a JSON schema: {exc.message[:200]}") from exc
    return schema


# These two bring torch, which a process that scores by a rule does without.
def _moderation(value: str | None) -> Scorer:
    from finetune.evaluation.scores import moderated

    return moderated.refused(value)


def _reference_loss(_: str | None) -> Scorer:
    from finetune.evaluation.scores.reference_loss import ReferenceLoss

    return ReferenceLoss()


def _simple(make: Callable[[], Scorer]) -> Callable[[str | None], Scorer]:
    return lambda _: make()


_LISTED = ", ".join(NORMALISATIONS)
KINDS = {
    "exact-match": Kind(
        f"the answer is the reference; ignoring what you list: {_LISTED}", _exact_match, "[LIST]"
    ),
    "word-accuracy": Kind(
        "words of the reference at their places",
        lambda _: of_reference(
            "word accuracy", "share of the reference's words at their places",
            overlap.word_accuracy,
        ),
    ),
    "contains": Kind("the answer holds the reference, or TEXT", matching.contains, "[TEXT]"),
    "regex": Kind("PATTERN matches somewhere in the answer", _regex, "PATTERN"),
    "stop-words": Kind("the answer holds none of these words or phrases", _stop_words, "A,B"),
    "label": Kind(labels.Label.line, _simple(labels.Label)),
    "number": Kind(
        "the last number is that of the reference, within a relative TOLERANCE", _number,
        "[TOLERANCE]",
    ),
    "math": Kind(
        "the answer equals the reference as mathematics, by math-verify: 1/2 = 0.5, LaTeX",
        _simple(matching.math),
    ),
    "json-schema": Kind("the answer holds JSON that the schema accepts", _json_schema, "FILE.json"),
    "code-tests": Kind(
        "the answer's Python passes the tests in COLUMN (tests), in a sandbox",
        lambda value: CodeTests(value or DEFAULT_COLUMN), "[COLUMN]",
    ),
    "reasoning-gym": Kind(
        "what the rule of the row's task gives, of rows of `finetune data reasoning_gym`",
        _simple(reasoning_tasks.reasoning_task),
    ),
    "token-f1": Kind("words shared with the reference, in any order (SQuAD)",
                     _simple(overlap.token_f1)),
    "rouge-l": Kind("words shared with the reference, in its order", _simple(overlap.rouge_l)),
    "word-error-rate": Kind(
        "wrong, missing and added words for each word of the reference",
        _simple(overlap.word_error_rate),
    ),
    "bleu": Kind("runs of words shared with the reference, for translations (sacrebleu)",
                 _simple(overlap.bleu)),
    "chrf": Kind("runs of characters shared with the reference, for any language (sacrebleu)",
                 _simple(overlap.chrf)),
    "similarity": Kind(
        "closeness in meaning to the reference, by wordllama's vectors or a model's", Similarity,
        "[FOLDER]",
    ),
    "entailment": Kind(
        "the reference implies the answer's sentences, by an NLI model",
        lambda value: entailment.entailment(str(value)), "FOLDER",
    ),
    "contradiction": Kind(
        "a sentence of the answer contradicts the reference, by an NLI model",
        lambda value: entailment.contradiction(str(value)), "FOLDER",
    ),
    "groundedness": Kind(
        "the row's context implies the answer's sentences, by an NLI model",
        lambda value: entailment.groundedness(str(value)), "FOLDER",
    ),
    "relevancy": Kind(
        "the answer addresses the question, by a classifier of both",
        lambda value: judgement.relevancy(str(value)), "FOLDER[,LABEL]",
    ),
    "responsibility": Kind(
        "the answer is harmless, by a classifier",
        lambda value: judgement.responsibility(str(value)), "FOLDER[,LABEL]",
    ),
    "reference-loss": Kind(
        "loss of the reference under each model, in nats per token, and its perplexity",
        _reference_loss,
    ),
    "words": Kind("length of the answer in words", _simple(form.num_words)),
    "length-ratio": Kind("words of the answer for each of the reference",
                         _simple(form.length_ratio)),
    "repetition": Kind("share of runs of four words that repeat earlier ones",
                       _simple(form.repetition)),
    "spelling": Kind(
        "share of words in the word list of a language (en)",
        lambda value: form.spelling(value or "en"), "[LANGUAGE]",
    ),
    "consistency": Kind(
        "words shared with the other answers to the same messages, or to rows with the same COLUMN",
        Consistency, "[COLUMN]",
    ),
    "moderation": Kind(
        "moderation refuses the prompt or the answer, by a file of rules or a classifier",
        _moderation, "FILE|RUN",
    ),
    "seconds": Kind("seconds for an answer", _simple(cost.seconds)),
    "cost": Kind(
        "price of 1,000 such answers, by the PRICE of an hour, or at a server of 10^6 tokens",
        _cost, "PRICE[,IN,OUT]",
    ),
}  # fmt: skip
"""Name -> score, in the order of the list."""


def listing() -> str:
    """Return one line for each score, as `--scores list` prints them."""
    written = {name: f"{name}{_value_shown(kind)}" for name, kind in KINDS.items()}
    written[own_code.EXPECTED] = own_code.EXPECTED
    lines = {name: kind.line for name, kind in KINDS.items()}
    lines[own_code.EXPECTED] = "a function of your own: a completion -> a number"
    width = max(map(len, written.values()))
    return "\n".join(f"{written[name]:<{width}}  {lines[name]}" for name in written)


def _value_shown(kind: Kind) -> str:
    if kind.value.startswith("["):
        return f"[={kind.value[1:]}"
    return f"={kind.value}" if kind.value else ""


def choose(names: Sequence[str]) -> list[Scorer]:
    """Return the scorers of `--scores`. Raises ConfigError for a wrong name or value."""
    found: dict[str, Scorer] = {}
    for name in dict.fromkeys(names):
        scorer = _one(name)
        if scorer.name in found:
            raise ConfigError(f"--scores: {scorer.name} is given twice; rename or remove one")
        found[scorer.name] = scorer
    return list(found.values())


def _one(text: str) -> Scorer:
    name, has_value, value = text.partition("=")
    kind = KINDS.get(re.sub(r"[ _]", "-", name.strip().lower()))
    if kind is None:
        if own_code.is_own(text):
            return own_score(own_code.find(text))
        if Path(text).exists():
            raise ConfigError(
                f"--scores: {printable(text)} is a file or a folder, not a score; name the run "
                "before --scores, or a score of your own as FILE.py:NAME"
            )
        near = get_close_matches(name.lower(), KINDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`--scores list` shows them all"
        raise ConfigError(f"--scores: no score {printable(name)}; {hint}")
    if has_value and not kind.value:
        raise ConfigError(f"--scores: {name} takes no value, got {printable(value)}")
    if not value.strip() and kind.value and not kind.value.startswith("["):
        raise ConfigError(f"--scores: {name} needs a value: {name}={kind.value}")
    return kind.make(value if value.strip() else None)


MOST_LABELS, LABEL_WORDS, ROWS_OF_A_LABEL = 50, 6, 3
SHORT_WORDS = 12
MOSTLY = 0.9


def suitable(prompts: Sequence[Prompt]) -> tuple[list[str], str]:
    """Return the scores for these references, the main one first, and why, in a few words.

    None of them gives 0 to a right answer with a sentence before it.
    """
    references = [each.reference for each in prompts if each.reference is not None]
    if not references:
        return ["words", "repetition"], "no row has a reference"

    def mostly(test: Callable[[str], object]) -> bool:
        return sum(bool(test(each)) for each in references) >= MOSTLY * len(references)

    if mostly(lambda text: isinstance((json_in(text) or (0,))[0], dict | list)
              and text.strip()[:1] in "{["):  # fmt: skip
        return ["exact-match=json", "rouge-l"], "the references are JSON"
    lengths = [len(words(each)) for each in references]
    different = {tuple(words(each)) for each in references}
    if mostly(_is_result):
        return ["number", "token-f1"], "the references end in a number"
    if (
        2 <= len(different) <= MOST_LABELS
        and len(references) >= ROWS_OF_A_LABEL * len(different)
        and max(lengths) <= LABEL_WORDS
    ):
        return ["label"], f"the references are {len(different)} short labels"
    if statistics.median(lengths) <= SHORT_WORDS:
        return ["token-f1", "contains"], "the references are short"
    return ["rouge-l", "length-ratio", "repetition"], "the references are long"


def _is_result(reference: str) -> bool:
    """Return whether a reference is a number, or marks one as GSM8K does: #### 42, \\boxed{42}."""
    marked = r"(?:####\s*|\\boxed\{|answer is\s*:?\s*)\$?[-+]?[\d.,]+[}.%]*\s*$"
    is_number = len(words(reference)) == 1 and bool(numbers_in(reference))
    return is_number or re.search(marked, reference) is not None
