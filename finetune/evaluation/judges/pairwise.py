"""A judge compares two answers in both orders: a win only if it survives the swap.

Judges favour a place: many name the first answer whatever it says. A choice that changes with the
order counts as a tie, and the share of such flips is reported.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path

from finetune.evaluation.judges import rubrics
from finetune.evaluation.judges.g_eval import steps_of
from finetune.evaluation.judges.rubrics import FIRST, SECOND, TIE, Rubric
from finetune.evaluation.judges.weights import Kept, Question, Weights
from finetune.evaluation.votes import MODEL, Better, Vote
from finetune.generation.completions import Completion, Prompt, Score

NAMES: dict[str, Better] = {FIRST: "first", SECOND: "second", TIE: "tie"}
SWAPPED: dict[Better, Better] = {"first": "second", "second": "first", "tie": "tie"}


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt, compared.

    orders: the better one as shown, and as shown the other way round; each names the same answers.
    better: None for a gap, with its reason.
    """

    orders: tuple[Better, ...]
    better: Better | None
    reason: str = ""

    @property
    def is_flip(self) -> bool:
        """Whether each order prefers another answer."""
        return set(self.orders) == {"first", "second"}


class Pairwise:
    """Compares the answers of models by pairs; as a Scorer, the share of points of each answer.

    A win is 1 point, a tie half a point. Only answers that `compare` has seen have a score.
    """

    higher: bool | None = True
    is_share = True

    def __init__(self, judge: Kept, rubric: Rubric, folder: Path) -> None:
        self.name = f"judge wins {rubric.name}"
        self.line = f"share of comparisons won by {rubric.name}, as {judge.name} judges; ties half"
        self.rater = f"{judge.name}, {rubric.name}"
        self.comparisons: list[Comparison] = []
        self.votes: list[Vote] = []
        self._points: dict[tuple[str, str], list[float]] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        self._judge, self._rubric, self._folder = judge, rubric, folder

    @cached_property
    def steps(self) -> list[str]:
        return steps_of(self._judge, self._rubric, self._folder)

    def compare(self, answers: Mapping[str, Sequence[Completion]]) -> list[Vote]:
        """Compare each model's answers with each other's; return the votes of the judge."""
        pairs = [
            (models, one, other)
            for models in combinations(answers, 2)
            for one, other in zip(answers[models[0]], answers[models[1]])
        ]
        asked = [
            Question(rubrics.pair_prompt(self._rubric, self.steps, one.prompt, a, b), tuple(NAMES))
            for _, one, other in pairs
            if _differ(one, other)
            for a, b in ((one.text, other.text), (other.text, one.text))
        ]
        weights = iter(self._judge.weigh(asked))
        for models, one, other in pairs:
            found = _without_asking(one, other) or _compared(next(weights), next(weights))
            self.comparisons.append(found)
            self._count(one, other, found)
            if found.better is not None:
                self.votes.append(_vote(models, one, other, found.better, self.rater))
        return self.votes

    def _count(self, one: Completion, other: Completion, found: Comparison) -> None:
        for each, won in ((one, "first"), (other, "second")):
            key = (each.prompt.place, each.text)
            if found.better is None:
                self._reasons[key] = found.reason
            else:
                points = 0.5 if found.better == "tie" else float(found.better == won)
                self._points.setdefault(key, []).append(points)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        scores = []
        for each in completions:
            key = (each.prompt.place, each.text)
            if points := self._points.get(key):
                scores.append(Score(sum(points) / len(points)))
            else:
                scores.append(Score(None, self._reasons.get(key, "was not compared")))
        return scores

    def summary(self) -> str:
        """Return a line on flips, on the place that the judge favours, and on gaps."""
        asked = [each for each in self.comparisons if each.orders]
        flips = sum(each.is_flip for each in asked)
        # In the second order the answer that is shown first is the second one.
        ahead = sum((a == "first") + (b == "second") for a, b in (each.orders for each in asked))
        named = sum(order != "tie" for each in asked for order in each.orders)
        gaps = sum(each.better is None for each in self.comparisons)
        share = flips / len(asked) if asked else 0.0
        place = f"{ahead / named:.0%}" if named else "none"
        return (
            f"{self.name}: {share:.0%} of {len(asked):,} comparisons flip with the order, and "
            f"count as ties; {place} of the choices are the answer shown first (50% would be "
            f"fair); {gaps:,} of {len(self.comparisons):,} comparisons are not usable"
        )


def _differ(one: Completion, other: Completion) -> bool:
    return _without_asking(one, other) is None


def _without_asking(one: Completion, other: Completion) -> Comparison | None:
    """Return the result of answers that need no judge: missing or equal ones."""
    if "failed" in (one.finish_reason, other.finish_reason):
        return Comparison((), None, "no answer came")
    return Comparison((), "tie") if one.text == other.text else None


def _compared(shown: Weights, swapped: Weights) -> Comparison:
    if reason := shown.problem or swapped.problem:
        return Comparison((), None, reason)
    orders = (NAMES[shown.best], SWAPPED[NAMES[swapped.best]])
    return Comparison(orders, orders[0] if orders[0] == orders[1] else "tie")


def messages_of(prompt: Prompt) -> tuple[Mapping[str, str], ...]:
    """Return the messages of a prompt as votes hold them, each with its context."""
    return tuple(
        {"role": each.role, "content": f"{each.content}\n\n{each.context}".strip()}
        for each in prompt.messages
    )


def _vote(
    models: tuple[str, str], one: Completion, other: Completion, better: Better, rater: str
) -> Vote:
    texts = (one.text, other.text)
    return Vote(one.prompt.place, messages_of(one.prompt), models, texts, better, rater, MODEL)
