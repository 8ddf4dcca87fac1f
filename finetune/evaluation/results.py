"""What an evaluation found: answers and scores of several models on the same prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from finetune.evaluation import statistics
from finetune.evaluation.results_file import MeasureFacts, ScoreFacts
from finetune.evaluation.statistics import Difference
from finetune.generation.completions import Completion, Prompt, Score, Scorer

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True)
class Beside:
    """What was measured beside the scores of answers, as results.json has it."""

    benchmarks: Sequence[MeasureFacts] = ()
    forgetting: Sequence[MeasureFacts] = ()
    corpus_scores: Sequence[ScoreFacts] = ()


@dataclass(frozen=True)
class Results:
    """Answers and scores, by the name of the model: "base", "tuned" and others.

    prompts: [P]. clusters: [P], the cluster of near-duplicates, or the named group, of each prompt.
    answers: model -> [P]. scores: score -> model -> [P]. scorers: score -> what made it. settings:
    what was asked for, as written to results.json. run_dir: the run that made the tuned model.
    beside: what was measured besides.
    """

    prompts: Sequence[Prompt]
    clusters: Sequence[int]
    answers: Mapping[str, Sequence[Completion]]
    scores: Mapping[str, Mapping[str, Sequence[Score]]]
    scorers: Mapping[str, Scorer]
    settings: Mapping[str, Any] = field(default_factory=dict)
    run_dir: str | None = None
    beside: Beside = Beside()

    @property
    def models(self) -> list[str]:
        return list(self.answers)

    def subset(self, rows: Sequence[int]) -> "Results":
        """Return the results of some of the rows."""
        return replace(
            self,
            prompts=[self.prompts[row] for row in rows],
            clusters=[self.clusters[row] for row in rows],
            answers={name: [given[row] for row in rows] for name, given in self.answers.items()},
            scores={
                score: {name: [given[row] for row in rows] for name, given in by_model.items()}
                for score, by_model in self.scores.items()
            },
        )

    def values(self, score: str, model: str) -> list[float]:
        """Return the scores that could be computed."""
        return [each.value for each in self.scores[score][model] if each.value is not None]

    def mean(self, score: str, model: str) -> float | None:
        """Return the mean of the scores that could be computed; None without any."""
        values = self.values(score, model)
        return sum(values) / len(values) if values else None

    def paired(
        self, score: str, before: str = BASE, after: str = TUNED
    ) -> tuple[list[float], list[float], list[int]]:
        """Return the scores of both models, and the clusters, of rows that have both scores."""
        by_model, ones, others, clusters = self.scores[score], [], [], []
        for one, other, cluster in zip(by_model[before], by_model[after], self.clusters):
            if one.value is not None and other.value is not None:
                ones.append(one.value)
                others.append(other.value)
                clusters.append(cluster)
        return ones, others, clusters

    def difference(self, score: str, before: str = BASE, after: str = TUNED) -> Difference | None:
        """Return the difference over rows that have the score of both models; None without any."""
        paired = self.paired(score, before, after)
        return statistics.difference(*paired) if paired[0] else None
