"""The rewards of a config as scorers: which scorer each kind is, and what it asks of a row."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from finetune import extras, own_code
from finetune.config import reward_fields as fields
from finetune.config.reward_fields import RewardPart
from finetune.data.places import printable
from finetune.errors import ConfigError, UserError
from finetune.evaluation.scores import matching, reasoning_tasks, table
from finetune.evaluation.scores.base import NO_REFERENCE, OfAnswer, without_limit
from finetune.evaluation.scores.code_tests import CodeTests
from finetune.generation.completions import Completion, Prompt, Score
from finetune.rollouts.apart import Apart
from finetune.rollouts.judged import JudgeReward
from finetune.rollouts.kept import Folders
from finetune.rollouts.model_reward import ModelReward
from finetune.rollouts.own_rewards import OwnReward
from finetune.rollouts.own_rewards import made as own_made

Scoring = Callable[[Sequence[Completion]], list[Score]]
# Scores of `finetune evaluate` that are rewards of their own kind, and those that need more than
# an answer and its row.
OF_OWN_KIND = (
    "exact-match",
    "contains",
    "regex",
    "number",
    "math",
    "json-schema",
    "code-tests",
    "reasoning-gym",
)
NOT_OF_AN_ANSWER = ("label", "consistency", "reference-loss", "seconds", "cost")


def _has_all(prompt: Prompt) -> str:
    return ""


def _nothing(*_: Any) -> None:
    """Open, check or close what needs none of these."""


@dataclass(frozen=True)
class Part:
    """A reward of the config.

    problem: returns what a row lacks, or "". identity: what its scores depend on, beside prompt and
    answer. is_kept: its scores cost, so they are kept in a file. require: raises ConfigError if it
    cannot score now. open: gets folders for what it keeps, and whether the run was asked to stop;
    before the first call. prepare: makes what the scores of all processes depend on; once it is
    open, on the main process.
    """

    settings: RewardPart
    scorer: Scoring
    problem: Callable[[Prompt], str] = _has_all
    identity: str = ""
    is_kept: bool = False
    require: Callable[[], None] = _nothing
    open: Callable[[Folders, Callable[[], bool]], None] = _nothing
    prepare: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing

    @property
    def title(self) -> str:
        return self.settings.title


def made(settings: RewardPart, setting: str, log: Callable[[str], None]) -> Part:
    """Return a reward by its settings. Raises ConfigError. setting: its name in messages."""
    try:
        return MAKE[type(settings)](settings, log)
    except UserError as exc:
        raise ConfigError(f"{setting}: {exc}") from exc


# -------------------------------------------------------------------------------- what rows lack


def _lacks_reference(prompt: Prompt) -> str:
    return NO_REFERENCE.reason if prompt.reference is None else ""


def _by_reference(scorer: Scoring) -> Callable[[Prompt], str]:
    """Return a check that scores the reference as an answer: where that fails, any answer does."""

    def problem(prompt: Prompt) -> str:
        [score] = scorer([Completion(prompt, prompt.reference or "")])
        return score.reason if score.value is None else ""

    return problem


# ------------------------------------------------------------------------------------- the kinds


def _rule(scorer: OfAnswer, settings: RewardPart) -> Part:
    """Return a rule whose time is linear in the answer."""
    return Part(settings, scorer, _by_reference(scorer) if scorer.needs_reference else _has_all)


def _exact_match(settings: fields.ExactMatch, _: Any) -> Part:
    return _rule(matching.exact_match(settings.ignore), settings)


def _contains(settings: fields.Contains, _: Any) -> Part:
    return _rule(matching.contains(settings.text), settings)


def _number(settings: fields.Number, _: Any) -> Part:
    return _rule(matching.number(Decimal(str(settings.tolerance))), settings)


def _length(settings: fields.Length, _: Any) -> Part:
    def scorer(completions: Sequence[Completion]) -> list[Score]:
        over = [len(each.token_ids) - settings.most_tokens for each in completions]
        return [Score(-min(max(0, each) / settings.grace_tokens, 1.0) + 0.0) for each in over]

    return Part(settings, scorer)


def _score(settings: fields.ByScore, _: Any) -> Part:
    name = settings.score.partition("=")[0].strip().lower().replace("_", "-")
    if name in OF_OWN_KIND:
        raise ConfigError(f"score: {name} is a reward of its own: kind: {name.replace('-', '_')}")
    if name in NOT_OF_AN_ANSWER or own_code.is_own(settings.score):
        why = "needs more than an answer and its row" if name in NOT_OF_AN_ANSWER else "is code"
        raise ConfigError(f"score: {settings.score} {why}; name another, or kind: FILE.py:NAME")
    try:
        [scorer] = table.choose([settings.score])
    except UserError as exc:
        raise ConfigError(f"score: {str(exc).removeprefix('--scores: ')}") from exc
    if isinstance(scorer, OfAnswer):
        return _rule(scorer, settings)
    return Part(settings, scorer)


def _code_tests(settings: fields.CodeTests, _: Any) -> Part:
    scorer = CodeTests(settings.column, "it")

    def problem(prompt: Prompt) -> str:
        what = f"no text of tests in its column {settings.column}"
        return "" if scorer.tests_of(prompt) else f"the row has {what}"

    return Part(settings, scorer, problem, settings.column, is_kept=True)


def _regex(settings: fields.Regex, _: Any) -> Part:
    return _in_process(settings, without_limit, matching.regex, re.compile(settings.pattern))


def _math(settings: fields.Math, _: Any) -> Part:
    extras.require("math-verify", "it (kind: number does not)")
    return _in_process(settings, without_limit, matching.math, problem=_lacks_reference)


def _json_schema(settings: fields.JsonSchema, _: Any) -> Part:
    where = f"file: {printable(settings.file)}"
    try:
        text = Path(settings.file).read_text(encoding="utf-8")
        schema = table.checked_schema(json.loads(text), where)
    except FileNotFoundError as exc:
        raise UserError(f"{where}: no such file") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise UserError(f"{where}: cannot be read: {exc}") from exc
    return _in_process(settings, without_limit, matching.json_schema, schema, identity=text)


def _in_process(
    settings: fields.TimedReward, make: Callable[..., Scoring], *arguments: Any,
    problem: Callable[[Prompt], str] = _has_all, identity: str = "", whole: bool = False,
) -> Part:  # fmt: skip
    # `make` is in a module without torch, so that its process starts in half a second.
    apart = Apart(
        make, arguments, partial(Score, None), seconds=settings.seconds,
        call_seconds=settings.call_seconds, whole=whole,
    )  # fmt: skip
    return Part(
        settings, apart, problem, identity, open=lambda _, stop: apart.open(stop), close=apart.close
    )


def _judge(settings: fields.Judge, log: Callable[[str], None]) -> Part:
    judge = JudgeReward(settings, log)
    return Part(
        settings, judge, identity=judge.identity, require=judge.require_reachable,
        open=judge.open, prepare=judge.prepare, close=judge.close,
    )  # fmt: skip


def _reasoning_gym(settings: fields.ReasoningGym, _: Any) -> Part:
    extras.require("reasoning-gym", "it")
    return _in_process(
        settings, without_limit, reasoning_tasks.reasoning_task,
        problem=reasoning_tasks.lacks_task,
    )  # fmt: skip


def _reward_model(settings: fields.RewardModel, _: Any) -> Part:
    scorer = ModelReward(settings.model)
    return Part(settings, scorer, identity=scorer.identity, is_kept=True)


def _environment(settings: fields.FromEnvironment, _: Any) -> Part:
    def scorer(completions: Sequence[Completion]) -> list[Score]:
        return [Score(each.environment, "no environment gave a reward") for each in completions]

    return Part(settings, scorer)


def _own(settings: fields.OwnReward, _: Any) -> Part:
    code = own_code.get(settings.kind)
    whole = OwnReward(code).is_of_all
    return _in_process(settings, own_made, code.name, code.sha256, whole=whole)


MAKE: Mapping[type[RewardPart], Callable[[Any, Callable[[str], None]], Part]] = {
    fields.ExactMatch: _exact_match,
    fields.Contains: _contains,
    fields.Regex: _regex,
    fields.Number: _number,
    fields.Math: _math,
    fields.JsonSchema: _json_schema,
    fields.CodeTests: _code_tests,
    fields.Length: _length,
    fields.ByScore: _score,
    fields.Judge: _judge,
    fields.RewardModel: _reward_model,
    fields.ReasoningGym: _reasoning_gym,
    fields.FromEnvironment: _environment,
    fields.OwnReward: _own,
}
