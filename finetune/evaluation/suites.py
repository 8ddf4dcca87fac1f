"""Test suites: prompts with rules that an answer must keep, in YAML (docs/evaluation.md).

    suite = suites.read("suite.yaml")
    suite.prompts, suite.scorer  # 1 for an answer that keeps all rules of its row

`python -m finetune.evaluation.suites` prints the JSON schema, for editors.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)  # fmt: skip

from finetune import failures, sandbox
from finetune.config import from_yaml, paths
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place, printable, short
from finetune.errors import ConfigError, DataError
from finetune.evaluation.scores import KINDS, choose
from finetune.evaluation.scores.base import Value
from finetune.evaluation.scores.code_tests import code_in
from finetune.evaluation.scores.matching import holds, is_json_equal, json_schema, regex
from finetune.evaluation.scores.normalise import NORMALISATIONS, normalised, number_of, numbers_in
from finetune.evaluation.scores.table import checked_schema
from finetune.generation.completions import Completion, Prompt, Score, Scorer, no_answer

MOST_BYTES = 10_000_000
MOST_PROBLEMS = 10


def _texts(value: Any) -> Any:
    """Make a list of a single text; whatever else is left for the error."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ValueError(f"should be text or a list of texts, got {short(value)}; quote numbers")
    return value


Strings = Annotated[
    list[str],
    BeforeValidator(_texts),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, alias_generator=lambda name: name.replace("_", "-"),
        populate_by_name=False, use_attribute_docstrings=True,
    )  # fmt: skip


class Rules(_Strict):
    """What an answer must keep; all rules of a row count. Words are compared without case and
    punctuation."""

    contains: Strings | None = None
    """Words, or a list: the answer holds each of them."""
    contains_any: Strings | None = None
    """The answer holds at least one of these."""
    stop_words: Strings | None = None
    """The answer holds none of these words or phrases."""
    regex: Strings | None = None
    """Each of these patterns matches somewhere in the answer."""
    exact_match: Strings | None = None
    """The answer is this text, or one of these."""
    ignoring: list[str] = Field(default_factory=list)
    """What exact-match ignores: case, punctuation, articles, numbers."""
    number: int | float | None = None
    """The last number of the answer."""
    json_value: Any = Field(default=None, alias="json")
    """The JSON value that the answer holds."""
    json_schema_of: dict[str, Any] | None = Field(default=None, alias="json-schema")
    """A JSON schema that the answer's JSON keeps."""
    fewest_words: Annotated[int, Field(ge=0)] | None = None
    """The answer has at least as many words."""
    most_words: Annotated[int, Field(ge=0)] | None = None
    """The answer has at most as many words."""
    python_tests: str | None = None
    """Python that passes after the answer's own code, in a sandbox."""
    scores: dict[str, float] | None = None
    """Scores of --scores that must be reached, or not exceeded where less is better."""

    @field_validator("regex")
    @classmethod
    def _is_pattern(cls, value: Strings | None) -> Strings | None:
        for each in value or ():
            try:
                re.compile(each)
            except (re.error, RecursionError, OverflowError) as exc:
                raise ValueError(f"{short(each)} is not a pattern: {exc}") from exc
        return value

    @field_validator("ignoring")
    @classmethod
    def _is_known(cls, value: list[str]) -> list[str]:
        known = [name for name in NORMALISATIONS if name != "json"]
        if unknown := [name for name in value if name not in known]:
            raise ValueError(f"{short(unknown[0])} should be one of {', '.join(known)}")
        return value

    @field_validator("json_schema_of")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            try:
                checked_schema(value, "json-schema")
            except ConfigError:
                raise
            except Exception as exc:
                raise ValueError(str(exc).partition(": ")[2]) from exc
        return value

    @field_validator("scores")
    @classmethod
    def _are_scores(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for name in value or {}:
            try:
                choose([name])
            except ConfigError as exc:
                raise ValueError(str(exc).removeprefix("--scores: ")) from exc
        return value

    @model_validator(mode="after")
    def _has_any(self) -> "Rules":
        if not self.model_fields_set - {"ignoring"}:
            raise ValueError("a row needs at least one rule")
        if self.ignoring and self.exact_match is None:
            raise ValueError("ignoring is of exact-match, which is missing")
        return self


class Turn(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class Row(_Strict):
    """A prompt, or messages that end with one, and the rules of its answer."""

    prompt: str | None = None
    messages: list[Turn] | None = None
    reference: str | None = None
    """A right answer, for rules in `scores`."""
    fields: dict[str, Any] = Field(default_factory=dict)
    """What is known of the row, such as a topic or a context."""
    rules: Rules

    @model_validator(mode="after")
    def _asks_once(self) -> "Row":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a row needs either prompt or messages")
        if self.messages is not None and (not self.messages or self.messages[-1].role != "user"):
            raise ValueError("messages should end with one of role user")
        return self


class SuiteFile(_Strict):
    """A test suite of `finetune evaluate --suite`."""

    name: str = "suite"
    """Of the score, as the table shows it."""
    system: str | None = None
    """A system message before every prompt."""
    rows: Annotated[list[Row], Field(min_length=1)]


Check = tuple[str, Callable[[Completion], Value]]
"""A rule in words, and what says whether an answer keeps it."""


@dataclass(frozen=True)
class Suite:
    prompts: list[Prompt]
    scorer: Scorer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "YAML file of prompts with rules that answers must keep, in place of --data"
    parser.add_argument("--suite", type=paths.argument, default=None, metavar="FILE", help=what)


class KeepsRules:
    """1 if an answer keeps all rules of its row; the reason names those it breaks."""

    higher, is_share = True, True
    line = "1 if the answer keeps every rule of its row of the suite"

    def __init__(self, name: str, checks: Mapping[str, Sequence[Check]]) -> None:
        self.name, self._checks = name, checks

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        return [self._of(each) for each in completions]

    def _of(self, completion: Completion) -> Score:
        if completion.finish_reason == "failed":
            return no_answer(completion)
        broken = []
        for what, check in self._checks.get(completion.prompt.place, ()):
            value = check(completion)
            found = value if isinstance(value, Score) else Score(float(value))
            if found.value is None:
                return Score(None, f"{what}: {found.reason}")
            if not found.value:
                broken.append(what + (f" ({found.reason})" if found.reason else ""))
        return Score(0.0, "breaks " + "; ".join(broken)) if broken else Score(1.0)


def read(path: str) -> Suite:
    """Read a suite. Raises DataError that names the lines of what is wrong."""
    shown = printable(path)
    text = _text(path)
    try:
        values, lines = from_yaml(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise DataError(f"{shown}: not valid YAML: {failures.parsing_reason(exc)}") from exc
    if not isinstance(values, dict):
        raise DataError(f"{shown}: should be a mapping with rows, got {short(values)}")
    try:
        made = SuiteFile.model_validate(values)
    except ValidationError as exc:
        raise DataError(_problems(shown, exc, values, lines)) from exc
    if any(row.rules.python_tests for row in made.rows):
        sandbox.require("--suite: python-tests")
    places = [Place(path, _line(lines, ("rows", n))) for n in range(len(made.rows))]
    prompts = [_prompt(made, row, place) for row, place in zip(made.rows, places)]
    checks = {str(place): _checks(row.rules) for row, place in zip(made.rows, places)}
    return Suite(prompts, KeepsRules(made.name, checks))


def _text(path: str) -> str:
    shown = printable(path)
    try:
        with Path(path).open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise DataError(f"{shown}: is larger than {MOST_BYTES // 10**6} MB; split it")
        return content.decode("utf-8-sig")
    except FileNotFoundError as exc:
        raise DataError(f"--suite: {shown}: no such file") from exc
    except OSError as exc:
        raise DataError(f"--suite: {shown}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        line = content.count(b"\n", 0, exc.start) + 1
        raise DataError(f"{shown}:{line}: holds bytes that are not UTF-8; save it so") from exc


def _problems(shown: str, exc: ValidationError, values: Any, lines: Any) -> str:
    """Return each problem with its line, and the first 80 characters of its row."""
    found = []
    for each in exc.errors(include_url=False):
        path = tuple(part for part in each["loc"])
        is_of_row = path[:1] == ("rows",) and len(path) > 1
        where = printable(".".join(map(str, path[2:] if is_of_row else path)))
        what = f"{where}: {_message(each)}" if where else _message(each)
        line = f"{shown}:{_line(lines, path)}: {what}"
        if is_of_row:
            line += f"; the row: {short(values['rows'][path[1]])}"
        found.append(line)
    found = list(dict.fromkeys(found))
    if len(found) == 1:
        return found[0]
    more = len(found) - MOST_PROBLEMS
    listed = "".join(f"\n  {line}" for line in found[:MOST_PROBLEMS])
    return f"{len(found):,} problems:{listed}" + (f"\n  and {more:,} more" if more > 0 else "")


def _message(problem: Any) -> str:
    if problem["type"] == "missing":
        return "is missing"
    if problem["type"] != "extra_forbidden":
        return str(problem["msg"]).removeprefix("Value error, ")
    path = problem["loc"]
    models: dict[int, type[BaseModel]] = {1: SuiteFile, 3: Row, 4: Rules}
    fields = models.get(len(path), Turn).model_fields
    known = [field.alias or name for name, field in fields.items()]
    near = get_close_matches(str(path[-1]), known, n=1)
    return "unknown key; " + (
        f"did you mean {near[0]}?" if near else f"it may be {', '.join(known)}"
    )


def _line(node: Any, path: Sequence[Any]) -> int:
    """Return the line of what a path of keys and numbers leads to, as far as it does."""
    line = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            pair = next((pair for pair in node.value if pair[0].value == str(part)), None)
            if pair is None:
                continue  # pydantic's name of one of several types
            line, node = pair[0].start_mark.line + 1, pair[1]
    return int(line)


def _prompt(suite: SuiteFile, row: Row, place: Place) -> Prompt:
    turns = [Message(each.role, each.content) for each in row.messages or ()]
    if row.prompt is not None:
        turns = [Message("user", row.prompt)]
    if suite.system is not None:
        turns.insert(0, Message("system", suite.system))
    return Prompt(Conversation(tuple(turns), place), row.reference, row.fields)


def _holding(part: str, wanted: bool = True) -> Callable[[Completion], Value]:
    return lambda completion: holds(completion.text, part) == wanted


def _of_one(scorer: Scorer) -> Callable[[Completion], Score]:
    return lambda completion: scorer([completion])[0]


def _checks(rules: Rules) -> list[Check]:
    """Return every rule of a row."""
    checks: list[Check] = []
    for each in rules.contains or ():
        checks.append((f"contains {short(each)}", _holding(each)))
    if (some := rules.contains_any) is not None:
        what = f"contains any of {short(some)}"
        checks.append((what, lambda c: any(holds(c.text, each) for each in some)))
    for each in rules.stop_words or ():
        checks.append((f"without {short(each)}", _holding(each, False)))
    for each in rules.regex or ():
        checks.append((f"regex {short(each)}", _of_one(regex(re.compile(each)))))
    if rules.exact_match is not None:
        wanted = {normalised(each, rules.ignoring) for each in rules.exact_match}
        what = f"exact match {short(rules.exact_match)}"
        checks.append((what, lambda c: normalised(c.text, rules.ignoring) in wanted))
    return checks + _checks_of_form(rules) + _checks_by_scores(rules)


def _checks_of_form(rules: Rules) -> list[Check]:
    checks: list[Check] = []
    given = rules.model_fields_set
    if rules.number is not None:
        wanted = number_of(str(rules.number))
        checks.append((f"number {rules.number}", lambda c: numbers_in(c.text)[-1:] == [wanted]))
    if "json_value" in given:
        value = rules.json_value
        checks.append((f"json {short(value)}", lambda c: is_json_equal(c.text, value)))
    if rules.json_schema_of is not None:
        checks.append(("json-schema", _of_one(json_schema(rules.json_schema_of))))
    if (fewest := rules.fewest_words) is not None:
        checks.append((f"fewest words {fewest}", lambda c: len(c.text.split()) >= fewest))
    if (most := rules.most_words) is not None:
        checks.append((f"most words {most}", lambda c: len(c.text.split()) <= most))
    if (tests := rules.python_tests) is not None:

        def passes(completion: Completion) -> Score:
            found = sandbox.run(code_in(completion.text), tests)
            return Score(float(found.passed), found.reason)

        checks.append(("python-tests", passes))
    return checks


def _checks_by_scores(rules: Rules) -> list[Check]:
    checks: list[Check] = []
    for name, limit in (rules.scores or {}).items():
        [scorer] = choose([name])
        sign = "at most" if scorer.higher is False else "at least"

        def reaches(completion: Completion, scorer: Scorer = scorer, limit: float = limit) -> Score:
            [found] = scorer([completion])
            if found.value is None:
                return found
            is_kept = found.value <= limit if scorer.higher is False else found.value >= limit
            return Score(float(is_kept), f"{found.value:.3g}")

        checks.append((f"{name} {sign} {limit:g}", reaches))
    return checks


def json_schema_of_suites() -> dict[str, Any]:
    """Return the JSON schema of a suite."""
    found: dict[str, Any] = SuiteFile.model_json_schema()
    found["$defs"]["Rules"]["properties"]["scores"]["description"] += f" Names: {', '.join(KINDS)}."
    return found


if __name__ == "__main__":
    print(json.dumps(json_schema_of_suites(), indent=2))
