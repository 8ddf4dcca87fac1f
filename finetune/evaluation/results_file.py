"""results.json: everything that a report shows, numbers with their intervals.

configs/results.json is its JSON schema, which `make schema` writes. A later evaluation reads the
file to compare rounds, `finetune compare` to compare runs.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune import failures, files
from finetune.data.places import printable
from finetune.errors import DataError
from finetune.evaluation import statistics
from finetune.evaluation.statistics import Difference
from finetune.preparation import request

Since = Literal["fixed", "not fixed", "new", "right"]
"""What became of a row since an earlier round: wrong and right; wrong both times; right and wrong;
right both times."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


def _about(text: str, **more: Any) -> Any:
    return Field(description=text, **more)


class Mean(_Strict):
    """A mean over rows, with its 95% interval."""

    mean: float
    low: float | None = _about("of the interval; null for too few rows")
    high: float | None = _about("of the interval; null for too few rows")
    rows: int = _about("rows that have a score")

    @classmethod
    def of(cls, values: Sequence[float], clusters: Sequence[int] | None, is_share: bool) -> "Mean":
        """Return the mean of values [rows], at least one. clusters: [rows]."""
        low, high = statistics.interval(values, clusters)
        if is_share and low is not None and high is not None:  # Student's t knows no bounds
            low, high = max(0.0, low), min(1.0, high)
        return cls(mean=math.fsum(values) / len(values), low=low, high=high, rows=len(values))


class Change(_Strict):
    """The mean of a model less that of the base, over the rows that both have a score for."""

    mean: float
    low: float | None = _about("of the 95% interval; null for too few rows")
    high: float | None = _about("of the 95% interval; null for too few rows")
    p: float | None = _about("chance of such a difference if both were equal")
    p_holm: float | None = _about("p for all scores at once, after Holm; null where none counts")
    rows: int = _about("rows that both have a score for")
    clusters: int = _about("clusters of near-duplicates, or named groups, of these rows")
    rows_needed: int | None = _about("rows that would show a difference of this size")

    @classmethod
    def of(cls, found: Difference, p_holm: float | None = None) -> "Change":
        return cls(
            mean=found.mean, low=found.low, high=found.high, p=found.p, p_holm=p_holm,
            rows=found.num_rows, clusters=found.num_clusters, rows_needed=found.rows_needed,
        )  # fmt: skip


class LabelFacts(_Strict):
    """How well the answers of a model name a label of the references."""

    label: str
    rows: int = _about("whose reference it is")
    precision: float | None = _about("right ones of the answers that name it; null without any")
    recall: float
    f1: float


class ScoreFacts(_Strict):
    """A score of all models."""

    name: str
    line: str = _about("what it measures")
    higher: bool | None = _about("whether more is better; null if neither is")
    is_share: bool = _about("whether values are from 0 to 1, shown in percent")
    means: dict[str, Mean] = _about("by model; a model without any value is left out")
    changes: dict[str, Change] = _about("against the base, by model")
    missing: dict[str, dict[str, int]] = _about("rows without a value: by model, by reason")
    labels: dict[str, list[LabelFacts]] = _about("of the score label, by model", default={})
    details: dict[str, list[str]] = _about(
        "lines of text, such as a confusion matrix: by model, or by an empty name if all have the "
        "same", default={},
    )  # fmt: skip


class MeasureFacts(ScoreFacts):
    """A benchmark of all models, or a part of what tuning should not cost."""

    chance: float | None = _about("what guessing gives")
    judged: dict[str, str] = _about("worse, better, no change seen, or too few to tell; by model")


class ModelFacts(_Strict):
    """What a model took for its answers."""

    answers: int
    cut: int = _about("answers that the limit of new tokens ended")
    failed: int = _about("prompts without an answer")
    tokens: int = _about("of all answers; 0 where a server does not say")
    seconds: float = _about("of all answers")


class ErrorFacts(_Strict):
    """A type of errors of the tuned model."""

    name: str
    definition: str
    count: int = _about("rows; a row may have several types")


class SliceFacts(_Strict):
    """Rows that have something in common."""

    column: str
    value: str
    rows: list[int] = _about("their numbers, from 0")
    clusters: int
    is_small: bool = _about("whether it has too few clusters to rely on")
    is_weak: bool = _about("whether it fails more often than other rows, by chance in 5%")
    failures: int = _about("rows that the tuned model answers wrongly")
    p: float | None = _about("of failing more often than other rows, after Holm")
    means: dict[str, Mean] = _about("of the deciding score, by model")
    change: Change | None = _about("of the tuned model against the base")

    @property
    def name(self) -> str:
        return f"{self.column}: {self.value}"


class Neighbour(_Strict):
    """A row that was trained on and resembles a row."""

    place: str
    question: str
    answer: str
    similarity: float = _about("cosine of the vectors of both questions")


class AnswerFacts(_Strict):
    """An answer of a model."""

    text: str
    finish_reason: Literal["stop", "length", "failed"]
    tokens: int
    seconds: float
    seed: int | None


class MessageFacts(_Strict):
    """A message of a prompt."""

    role: str
    content: str


class RowFacts(_Strict):
    """A row: what was asked, what came, and how it scores."""

    place: str
    messages: list[MessageFacts]
    reference: str | None
    fields: dict[str, Any]
    cluster: int
    answers: dict[str, AnswerFacts]
    scores: dict[str, dict[str, float | None]] = _about("score -> model -> value")
    failed: bool | None = _about("whether the tuned model is wrong; null if none can say")
    errors: list[str] = _about("types of the error")
    nearest: list[Neighbour] = _about("rows that were trained on, the nearest first")
    since: Since | None = _about("what became of it since the earlier round")


class RoundSlice(_Strict):
    """What became of the rows of a slice."""

    column: str
    value: str
    fixed: int
    not_fixed: int
    new: int
    right: int


class Round(_Strict):
    """What became of the rows that an earlier round asked, too."""

    file: str = _about("results.json of the earlier round")
    sentence: str
    fixed: int = _about("rows that were wrong and are right")
    not_fixed: int = _about("rows that were wrong and are wrong")
    new: int = _about("rows that were right and are wrong")
    right: int = _about("rows that were right and are right")
    most_broken: float = _about("upper end of the 95% interval of new / (new + right)")
    only_before: int = _about("rows of the earlier round alone")
    only_now: int = _about("rows of this round alone")
    slices: list[RoundSlice]


class RunFacts(_Strict):
    """The run that made the tuned model."""

    directory: str
    state: str = _about("of outcome.json")
    seconds: float | None = _about("of training: tokens of each logged stretch by its speed")
    settings: dict[str, Any] = _about("section.field -> value of config.yaml")
    curves: dict[str, list[tuple[int, float]]] = _about("name -> (step, value)")
    facts: dict[str, Any] = _about("of receipt.json, by its keys joined with dots")
    data_card: str | None = _about("the card beside the rows that were trained on")


class Decides(_Strict):
    """What makes an answer wrong."""

    score: str
    below: float = _about("an answer that scores less is wrong")


class Verdict(_Strict):
    """What the evaluation found, in a sentence."""

    kind: str = _about("better, worse, mixed, no difference, too few rows, or no scores")
    sentence: str


class ResultsFile(_Strict):
    """What an evaluation found."""

    version: Literal[1] = _about("of this format", default=1)
    verdict: Verdict
    tuned: str = _about("name of the model whose errors these are")
    base: str | None = _about("name of the model that others are compared with")
    decides: Decides | None = _about("null if no score can")
    settings: dict[str, Any] = _about("what was asked for")
    models: dict[str, ModelFacts]
    scores: list[ScoreFacts]
    corpus_scores: list[ScoreFacts] = _about("of all answers together", default=[])
    benchmarks: list[MeasureFacts] = _about("of --benchmarks", default=[])
    forgetting: list[MeasureFacts] = _about("of --forgetting", default=[])
    error_types: list[ErrorFacts]
    slices: list[SliceFacts] = _about("the weakest first")
    round: Round | None
    run: RunFacts | None
    notes: list[str] = _about("what could not be said, and why")
    rows: list[RowFacts]

    @property
    def failures(self) -> list[RowFacts]:
        return [row for row in self.rows if row.failed]

    def score(self, name: str) -> ScoreFacts | None:
        return next((each for each in self.scores if each.name == name), None)


def read(path: Path) -> ResultsFile:
    """Read results.json. Raise DataError that names the file and what is wrong."""
    shown = printable(str(path))
    try:
        data = path.read_bytes()
    except OSError as exc:
        failures.reraise(exc, f"{shown}: cannot be read now")
        raise DataError(f"{shown}: cannot be read ({exc.strerror}); is it the right file?") from exc
    try:
        return ResultsFile.model_validate_json(data)
    except ValidationError as exc:
        what = "is not what an evaluation wrote (configs/results.json)"
        raise DataError(f"{shown}: {request.problems(exc, what)}") from exc
    except RecursionError as exc:
        raise DataError(f"{shown}: broken JSON: it is nested too deeply") from exc


def write(path: Path, found: ResultsFile) -> None:
    """Write results.json, whole or not at all. Raise Outage for a full disk."""
    with failures.writing(path):
        files.write_whole(path, found.model_dump_json(indent=1) + "\n")


def schema() -> str:
    return json.dumps(ResultsFile.model_json_schema(), indent=2)


if __name__ == "__main__":
    print(schema())
