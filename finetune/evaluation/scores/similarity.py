"""Whether an answer means what the reference means, by vectors of both."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from finetune.errors import ConfigError, ModelError
from finetune.evaluation.scores.base import gap_of
from finetune.generation.completions import Completion, Score
from finetune.preparation import embeddings


class Similarity:
    """The cosine of the vectors of answer and reference; below 0 counts as 0.

    folder: a model of vectors on this machine; None: the vectors of words that wordllama ships.
    """

    higher, is_share = True, True
    line = "closeness in meaning to the reference, by vectors (wordllama, or a model)"

    def __init__(self, folder: str | None = None) -> None:
        self.name = "similarity" + (f" by {folder}" if folder else "")
        self._embed = _embedder(folder)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        gaps = [gap_of(each, needs_reference=True) for each in completions]
        usable = [each for each, gap in zip(completions, gaps) if gap is None]
        found = iter(self._cosines(usable))
        return [next(found) if gap is None else gap for gap in gaps]

    def _cosines(self, completions: Sequence[Completion]) -> list[Score]:
        if not completions:
            return []
        answers = self._embed([each.text for each in completions])
        references = self._embed([each.prompt.reference or "" for each in completions])
        known = (np.abs(answers).sum(1) > 0) & (np.abs(references).sum(1) > 0)
        cosines = np.clip((answers * references).sum(1), 0, 1)
        unknown = Score(None, "the answer or the reference has no word with a vector")
        return [Score(float(c)) if is_known else unknown for c, is_known in zip(cosines, known)]


@cache
def _embedder(folder: str | None) -> Any:
    try:
        return embeddings.embedder(folder)
    except (ConfigError, ModelError) as exc:  # its message names an option of another command
        message = str(exc).replace("--embedding:", "--scores similarity:")
        raise type(exc)(message.replace("--semantic", "--scores similarity")) from exc
