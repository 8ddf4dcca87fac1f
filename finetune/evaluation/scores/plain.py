"""The two scores of `finetune evaluate` before it had others: strict, from 0 to 1."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from finetune.generation.completions import Completion, Score, Scorer


def exact_match(answer: str, wanted: str) -> float:
    """Return 1 if the answer is the wanted text, but for white space at both ends; else 0."""
    return float(answer.strip() == wanted.strip())


def word_accuracy(answer: str, wanted: str) -> float:
    """Return the share of the wanted words that stand at the same place of the answer.

    Additional words of the answer count as wrong.
    """
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


@dataclass(frozen=True)
class ByReference:
    """A score from 0 to 1 of each answer beside its reference; more is better."""

    name: str
    line: str
    rule: Callable[[str, str], float]
    higher: bool | None = True
    is_share: bool = True

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        return [self._score(each) for each in completions]

    def _score(self, completion: Completion) -> Score:
        if completion.prompt.reference is None:
            return Score(None, "the row has no reference")
        return Score(self.rule(completion.text, completion.prompt.reference))


SCORERS: dict[str, Scorer] = {
    "exact match": ByReference("exact match", "1 for the reference's text, else 0", exact_match),
    "word accuracy": ByReference(
        "word accuracy", "the share of its words at their places", word_accuracy
    ),
}
