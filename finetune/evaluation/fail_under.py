"""--fail-under: end with exit code 1 if the tuned model is not good enough, for CI."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from finetune.data.places import printable
from finetune.errors import ScoreTooLow, UserError
from finetune.evaluation import report
from finetune.evaluation.results_file import ResultsFile, ScoreFacts
from finetune.generation.completions import Scorer

BASE = "base"


@dataclass(frozen=True)
class Limit:
    """A value of a score; score None: of the score that decides which answers are wrong."""

    score: str | None
    value: float


def limit(text: str) -> Limit:
    """Parse VALUE or SCORE=VALUE, where 90% is 0.9; a type for argparse."""
    name, equals, number = text.rpartition("=")
    try:
        value = float(number.removesuffix("%")) / (100 if number.endswith("%") else 1)
    except ValueError:
        value = float("nan")
    if value != value or (equals and not name.strip()):
        raise argparse.ArgumentTypeError(
            f"should be a number, as 0.9 or 90%, or a score and a number, as 'token F1=0.5', "
            f"got {text!r}"
        )
    return Limit(name.strip() or None, value)


def base_or_limit(text: str) -> Limit | None:
    """Parse what `limit` does, or "base", which is None; a type for argparse."""
    return None if text == BASE else limit(text)


def require(option: str, given: Limit, scorers: Sequence[Scorer]) -> None:
    """Raise UserError for a score that no answer could be too low by. Needs no answers."""
    if given.score is None:
        return
    scorer = next((each for each in scorers if each.name == given.score), None)
    if scorer is None or not scorer.higher:
        known = ", ".join(each.name for each in scorers if each.higher)
        raise UserError(
            f"{option}: {printable(given.score)!r} is not a score of this evaluation where more is "
            f"better; choose one of {known or 'none, as it has no such score'}"
        )
    _require_share(option, given, scorer)


def _require_share(option: str, given: Limit, score: Scorer | ScoreFacts) -> None:
    if score.is_share and not 0 <= given.value <= 1:
        raise UserError(
            f"{option}: {score.name} is from 0 to 1; write {given.value:g}% or a fraction"
        )


def check(limits: Sequence[Limit | None], found: ResultsFile) -> None:
    """Raise ScoreTooLow if the tuned model is below a limit, or worse than the base.

    Raises UserError where the value is not one of the score that decides.
    """
    for each in limits:
        if each is None:
            if found.verdict.kind in ("worse", "mixed"):
                raise ScoreTooLow(f"--fail-under base: {found.verdict.sentence}")
            continue
        name = each.score or (found.decides.score if found.decides else None)
        score = found.score(name) if name else None
        if score is not None:
            _require_share("--fail-under", each, score)
        mean = score.means.get(found.tuned) if score else None
        if score is None or mean is None:
            what = f"{name} of {found.tuned}" if name else "what decides which answers are wrong"
            raise ScoreTooLow(f"--fail-under: {what} could not be computed")
        if mean.mean < each.value:
            shown = report.with_interval(mean, score.is_share)
            asked = report.shown(each.value, score.is_share)
            raise ScoreTooLow(f"--fail-under: {name} of {found.tuned} is {shown}, below {asked}")
