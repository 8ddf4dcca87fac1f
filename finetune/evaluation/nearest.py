"""The rows that were trained on and resemble a row most: what the model could have learned."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.evaluation import trained_rows
from finetune.evaluation.trained_run import TrainedRun
from finetune.preparation import embeddings

AT_ONCE = 256  # rows compared at once
NEAREST = 3
MISSING = (
    "the nearest rows that were trained on are not shown: pip install 'finetune[data]' brings "
    "vectors of words"
)


@dataclass(frozen=True)
class TrainingRow:
    """A row that was trained on."""

    place: str
    question: str
    answer: str


def of_run(run: TrainedRun) -> list[TrainingRow]:
    """Return the rows that a run was trained on; none if they cannot be read any more."""
    try:
        return [TrainingRow(place, *text) for place, text in trained_rows.training(run)]
    except trained_rows.Unread:  # which the search for trained rows has noted
        return []


def is_possible() -> bool:
    return importlib.util.find_spec("wordllama") is not None


def of_questions(
    questions: Sequence[str], trained: Sequence[TrainingRow], count: int = NEAREST
) -> list[list[tuple[TrainingRow, float]]]:
    """Return the nearest rows of each question, with the cosine of the vectors of both."""
    if not questions or not trained:
        return [[] for _ in questions]
    embed = embeddings.embedder(None)
    known = embed([each.question for each in trained])
    asked = embed(questions)
    found = []
    for start in range(0, len(asked), AT_ONCE):
        cosines = asked[start : start + AT_ONCE] @ known.T
        most = min(count, len(known))
        best = np.argpartition(-cosines, most - 1, axis=1)[:, :most]
        for row, chosen in zip(cosines, best):
            nearest = sorted(chosen.tolist(), key=lambda number: (-row[number], number))
            found.append([(trained[number], float(row[number])) for number in nearest])
    return found
