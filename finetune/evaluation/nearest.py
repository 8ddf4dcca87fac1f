"""The rows that were trained on and resemble a row most: what the model could have learned."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from finetune.errors import UserError
from finetune.evaluation import held_out
from finetune.evaluation.trained_run import TrainedRun
from finetune.preparation import embeddings

MOST_ROWS = 100_000  # of those trained on: 100 MB of vectors
AT_ONCE = 256  # rows compared at once
NEAREST = 3
MISSING = (
    "the nearest rows that were trained on are not shown: pip install 'finetune[data]' brings "
    "vectors of words"
)


@dataclass(frozen=True)
class Trained:
    """A row that was trained on."""

    place: str
    question: str
    answer: str


def of_run(run: TrainedRun) -> list[Trained]:
    """Return the first MOST_ROWS rows that a run was trained on; none if they have no answers."""
    try:
        prompts = held_out.read(run.trained_on, run.reading, MOST_ROWS)
    except UserError:  # moved since, or plain text
        return []
    return [Trained(each.place, each.question, each.reference or "") for each in prompts]


def is_possible() -> bool:
    return importlib.util.find_spec("wordllama") is not None


def of_questions(
    questions: Sequence[str], trained: Sequence[Trained], count: int = NEAREST
) -> list[list[tuple[Trained, float]]]:
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
