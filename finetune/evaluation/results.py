"""What an evaluation found: answers and scores of several models on the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finetune.generation.completions import Completion, Prompt, Score, Scorer

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Results:
    """Answers and scores, by the name of the model: "base", "tuned" and others.

    prompts: [P]. clusters: [P], the cluster of near-duplicates, or the named group, of each prompt.
    answers: model -> [P]. scores: score -> model -> [P]. scorers: score -> what made it. settings:
    what was asked for, as written to results.json. run_dir: the run that made the tuned model.
    """

    prompts: Sequence[Prompt]
    clusters: Sequence[int]
    answers: Mapping[str, Sequence[Completion]]
    scores: Mapping[str, Mapping[str, Sequence[Score]]]
    scorers: Mapping[str, Scorer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    run_dir: str | None = None

    @property
    def models(self) -> list[str]:
        return list(self.answers)
