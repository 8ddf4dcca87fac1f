"""Scores of answers: rules, comparisons with the reference, models, code; all as `Scorer`s.

found = scores.of(scores.choose(["rouge-l"]), {"base": completions, "tuned": others})
found["ROUGE-L"]["base"]  # a Score for each answer
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from finetune.evaluation.scores.base import Detailed
from finetune.evaluation.scores.options import add_arguments, fitting, named
from finetune.evaluation.scores.overlap import word_accuracy
from finetune.evaluation.scores.table import KINDS, choose, listing, suitable
from finetune.generation.completions import Completion, Score, Scorer

__all__ = [
    "KINDS", "Detailed", "add_arguments", "choose", "details", "details_of", "fitting", "gaps",
    "listing", "named", "of", "suitable", "word_accuracy",
]  # fmt: skip


def of(
    scorers: Sequence[Scorer], answers: Mapping[str, Sequence[Completion]]
) -> dict[str, dict[str, list[Score]]]:
    """Return score -> model -> a score for each answer."""
    found = {}
    for scorer in scorers:
        known = getattr(scorer, "by_model", {})  # of ReferenceLoss, whose module brings torch
        found[scorer.name] = {
            model: [_finite(each) for each in known.get(model) or scorer(given)]
            for model, given in answers.items()
        }
    return found


def _finite(score: Score) -> Score:
    """Return a score, or a gap in place of one that cannot be averaged."""
    if score.value is None or math.isfinite(score.value):
        return score
    return Score(None, f"came out as {score.value}, not a finite number")


def gaps(scores: Sequence[Score]) -> dict[str, int]:
    """Return why scores could not be computed, the most frequent reason first, and how often."""
    return dict(Counter(each.reason for each in scores if each.value is None).most_common())


def details(scorers: Sequence[Scorer], answers: Mapping[str, Sequence[Completion]]) -> list[str]:
    """Return what scores have to show besides a number of each answer, model by model."""
    lines = []
    for scorer in scorers:
        for model, shown in details_of(scorer, answers).items():
            lines += [f"{scorer.name}{f' of {model}' * bool(model)}:"]
            lines += [f"  {line}" for line in shown]
    return lines


def details_of(scorer: Scorer, answers: Mapping[str, Sequence[Completion]]) -> dict[str, list[str]]:
    """Return model -> lines, or "" -> lines where those of all models are equal."""
    if not isinstance(scorer, Detailed):
        return {}
    found = {model: scorer.details(given) for model, given in answers.items()}
    if all(each == next(iter(found.values())) for each in found.values()):
        found = {"": next(iter(found.values()), [])}
    return {model: lines for model, lines in found.items() if lines}
