"""G-Eval: a judge writes evaluation steps once, and scores each answer by them (Liu et al., 2023).

The score is the exact expectation over the judge's probabilities of the scores, not a sample. Where
too much of the probability lies outside them, the answer has no score and a reason.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from finetune.evaluation.judges import rubrics
from finetune.evaluation.judges.rubrics import Rubric
from finetune.evaluation.judges.weights import Kept, Question, Weights
from finetune.generation.completions import Completion, Score, no_answer

STEP_TOKENS = 400  # of the evaluation steps that a judge writes


def steps_of(judge: Kept, rubric: Rubric, folder: Path) -> list[str]:
    """Return the evaluation steps of a rubric: its own, those of the file, or new ones."""
    if rubric.steps:
        return list(rubric.steps)
    path = rubrics.steps_path(folder, rubric)
    known = rubrics.read_steps(path, rubric)
    if known is not None:
        return known
    written = judge.write(rubrics.steps_prompt(rubric), STEP_TOKENS)
    return rubrics.write_steps(path, rubric, judge.name, written)


class GEval:
    """Scores answers by a rubric; a Scorer.

    weights: one for each answer that the judge was asked about.
    """

    higher: bool | None = True
    is_share = False

    def __init__(self, judge: Kept, rubric: Rubric, folder: Path) -> None:
        low, high = min(rubric.scores), max(rubric.scores)
        self.name = f"judge {rubric.name}"
        self.line = f"{rubric.name} from {low} to {high}, as {judge.name} judges it (G-Eval)"
        self.weights: list[Weights] = []
        self._judge, self._rubric, self._folder = judge, rubric, folder

    @cached_property
    def steps(self) -> list[str]:
        return steps_of(self._judge, self._rubric, self._folder)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        options = tuple(map(str, sorted(self._rubric.scores)))
        questions = [
            Question(
                rubrics.score_prompt(self._rubric, self.steps, each.prompt, each.text), options
            )
            for each in completions
            if each.finish_reason != "failed"
        ]
        found = self._judge.weigh(questions)
        self.weights += found
        weights = iter(found)
        return [
            no_answer(each) if each.finish_reason == "failed" else _score(next(weights))
            for each in completions
        ]

    def summary(self) -> str:
        """Return a line on the mass outside the scores, and on answers without a score."""
        outside = [each.outside for each in self.weights if not each.reason]
        gaps = sum(bool(each.problem) for each in self.weights)
        without = f"{gaps:,} of {len(self.weights):,} answers have no score"
        if not outside:
            return f"{self.name}: {without}"
        return (
            f"{self.name}: {np.mean(outside):.1%} of the probability lies outside the scores, at "
            f"most {max(outside):.1%}; {without}"
        )


def _score(weights: Weights) -> Score:
    if weights.problem:
        return Score(None, weights.problem)
    return Score(weights.expectation())
