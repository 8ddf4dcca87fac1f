"""The settings of each reward of `objective.rewards`, a class for each `kind`. No torch."""
# ruff: noqa: RUF012, as pydantic copies mutable defaults

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from finetune.config.kinds import Kind, by_kind, name_of
from finetune.config.own import OwnName
from finetune.config.paths import PathString

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Tokens = Annotated[int, Field(gt=0)]


class RewardPart(Kind):
    """What all rewards have."""

    weight: Finite = 1.0
    """Factor of its value in the sum.
    0: it is only logged, and an answer that it cannot score keeps its reward.
    """
    name: Annotated[str, Field(pattern=r"^[\w -]{1,40}$")] | None = None
    """Name in logs. null: its kind, or NAME of your own."""

    @property
    def title(self) -> str:
        return self.name or self.kind.rpartition(":")[2]


class TimedReward(RewardPart):
    """What rewards have whose time is not known before."""

    seconds: Seconds = 10.0
    """Time limit for an answer, in seconds; an answer over it has no reward."""
    call_seconds: Seconds = 600.0
    """Time limit for all answers of a call, in seconds."""


class ExactMatch(RewardPart):
    """1 if the answer is the reference."""

    kind: Literal["exact_match"]
    """Give 1 to the answer that is the reference, else 0."""
    ignore: list[Literal["json", "numbers", "case", "punctuation", "articles"]] = []
    """Differences to ignore, as in --scores exact-match=LIST; spaces at the ends always are."""


class Contains(RewardPart):
    """1 if the answer holds the reference, or a text."""

    kind: Literal["contains"]
    """Give 1 to the answer that holds these words in a row, else 0."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """The words. null: those of the reference."""


class Regex(TimedReward):
    """1 if a pattern matches."""

    kind: Literal["regex"]
    """Give 1 to the answer in which a pattern matches somewhere, else 0."""
    pattern: Annotated[str, Field(min_length=1)]
    r"""Regular expression of Python; \A and \Z are the ends of the answer."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as exc:
            raise ValueError(f"should be a regular expression ({exc})") from exc
        return pattern


class Number(RewardPart):
    """1 if the last number is right."""

    kind: Literal["number"]
    """Give 1 to the answer whose last number is the last one of the reference, else 0."""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """How far it may be from that, as a fraction of it."""


class Math(TimedReward):
    """1 if the answer is right as mathematics."""

    kind: Literal["math"]
    """Give 1 to the answer that math-verify finds equal to the reference, else 0."""


class JsonSchema(TimedReward):
    """1 if the answer holds JSON that a schema accepts."""

    kind: Literal["json_schema"]
    """Give 1 to the answer with JSON that a schema accepts, else 0."""
    file: PathString
    """File of the schema."""


class CodeTests(RewardPart):
    """1 if the answer's Python passes tests."""

    kind: Literal["code_tests"]
    """Give 1 to the answer whose Python passes the tests of its row, else 0.
    They run in a sandbox: no network, no files, 512 MB, 5 seconds.
    """
    column: str = "tests"
    """Column of the tests, Python that raises where the code is wrong."""


class Length(RewardPart):
    """A penalty of long answers."""

    kind: Literal["length"]
    """Give 0 up to a length, then less, down to -1 (Yu et al., 2025, equation 13)."""
    most_tokens: Tokens
    """Length in tokens up to which the answer gets 0."""
    grace_tokens: Tokens
    """Tokens beyond, over which the value falls to -1."""


class ByScore(RewardPart):
    """A score of evaluations."""

    kind: Literal["score"]
    """Give what a score of `finetune evaluate` gives."""
    score: Annotated[str, Field(min_length=1)]
    """Its name, with a value as there: rouge-l, repetition, words, label, spelling=de.
    `finetune evaluate --scores list` shows all.
    """


class Judge(TimedReward):
    """The score of a judge."""

    kind: Literal["judge"]
    """Give the score of a model that judges by a rubric (G-Eval): from 0 to 1 for a rubric's
    lowest to its highest.
    """
    model: Annotated[str, Field(min_length=1)]
    """Folder or Hub id of the judge, or with `url` its name at the server."""
    url: str | None = None
    """URL of an OpenAI-compatible server, which gets prompts, answers and references."""
    key_variable: str | None = None
    """Environment variable that holds the server's key."""
    rubric: str = "quality"
    """What to judge by: a YAML file, or quality, relevancy, responsibility."""
    seconds: Seconds = 120.0
    """Time limit for an answer, in seconds; an answer over it has no reward."""


class ReasoningGym(TimedReward):
    """What the rule of a row's task gives."""

    kind: Literal["reasoning_gym"]
    """Give what the rule of the row's task gives; rows come from `finetune data reasoning_gym`."""


class RewardModel(RewardPart):
    """The score of a reward model."""

    kind: Literal["reward_model"]
    """Give the score of a model that was trained with objective.kind: reward."""
    model: PathString
    """Folder of its run, or of the model; or its name on the Hub."""


class FromEnvironment(RewardPart):
    """What the environment gave."""

    kind: Literal["environment"]
    """Give the sum of the rewards that objective.rollouts.environment gave over the turns."""


class OwnReward(TimedReward):
    """A reward of your own."""

    kind: OwnName
    """A function of (text, reference, row), or of `completions` (docs/reinforcement.md)."""


BUILT_IN = (
    ExactMatch, Contains, Regex, Number, Math, JsonSchema, CodeTests, Length, ByScore, Judge,
    RewardModel, ReasoningGym, FromEnvironment,
)  # fmt: skip
AnyReward = Annotated[
    ExactMatch | Contains | Regex | Number | Math | JsonSchema | CodeTests | Length | ByScore
    | Judge | RewardModel | ReasoningGym | FromEnvironment | OwnReward,
    Field(title="REWARD"), by_kind(*BUILT_IN, own=lambda kind: OwnReward),
]  # fmt: skip


def _add_up(rewards: list[AnyReward]) -> list[AnyReward]:
    titles = [each.title for each in rewards]
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"should have different names, and two are {twice[0]}; give each a `name`")
    if "std" in titles:
        raise ValueError("should not be named std: the logs have a reward_std of all of them")
    if not any(each.weight for each in rewards):
        raise ValueError("should have one whose weight is not 0")
    return rewards


RewardList = Annotated[list[AnyReward], Field(min_length=1), AfterValidator(_add_up)]
"""What an answer is worth: the sum of weight x value."""


def settings_of(kind: str) -> list[str]:
    """Return the settings of a kind of reward."""
    found = (cls for cls in BUILT_IN if name_of(cls) == kind)
    return list(next(found, OwnReward).model_fields)
