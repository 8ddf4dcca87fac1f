"""Scores of all answers of a model at once, as corpus BLEU, which a mean over rows is not."""

from collections.abc import Sequence

import numpy as np

from finetune.evaluation import statistics
from finetune.evaluation.results import BASE, Results
from finetune.evaluation.results_file import Change, Mean, ScoreFacts
from finetune.evaluation.scores.overlap import OfCorpus

DRAWS = 2_000  # of the bootstrap: the ends of an interval move by some 3% of its width


def of_results(results: Results) -> list[ScoreFacts]:
    """Return the corpus scores of all models, with intervals by a bootstrap over clusters."""
    scorers = [each for each in results.scorers.values() if isinstance(each, OfCorpus)]
    return [_of_scorer(each, results) for each in scorers]


def _of_scorer(scorer: OfCorpus, results: Results) -> ScoreFacts:
    scores, means, changes = results.scores[scorer.name], {}, {}
    counts: dict[str, np.ndarray] = {}
    rows: dict[str, list[int]] = {}
    for model, answers in results.answers.items():
        rows[model] = [n for n, each in enumerate(scores[model]) if each.value is not None]
        if rows[model]:
            counts[model] = scorer.counts([answers[row] for row in rows[model]])
            means[model] = _mean(scorer, counts[model], [results.clusters[n] for n in rows[model]])
    for model in counts:
        both = sorted(set(rows[model]) & set(rows.get(BASE, ())))
        if model != BASE and both:
            before, after = (
                counts[name][np.searchsorted(rows[name], both)] for name in (BASE, model)
            )
            clusters = [results.clusters[row] for row in both]
            changes[model] = _change(scorer, before, after, clusters)
    return ScoreFacts(
        name=f"{scorer.name} of the corpus", line="of all answers together, not a mean over rows",
        higher=True, is_share=True, means=means, changes=changes, missing={},
    )  # fmt: skip


def _mean(scorer: OfCorpus, counts: np.ndarray, clusters: Sequence[int]) -> Mean:
    low = high = None
    if len(set(clusters)) >= statistics.FEWEST_ROWS:
        low, high = statistics.bootstrap(
            lambda rows: scorer.of_counts(counts[rows]), len(counts), clusters, DRAWS
        )
    return Mean(mean=scorer.of_counts(counts), low=low, high=high, rows=len(counts))


def _change(
    scorer: OfCorpus, before: np.ndarray, after: np.ndarray, clusters: Sequence[int]
) -> Change:
    def change(rows: np.ndarray) -> float:
        return scorer.of_counts(after[rows]) - scorer.of_counts(before[rows])

    low = high = None
    if (num_clusters := len(set(clusters))) >= statistics.FEWEST_ROWS:
        low, high = statistics.bootstrap(change, len(before), clusters, DRAWS)
    return Change(
        mean=change(np.arange(len(before))), low=low, high=high, p=None, p_holm=None,
        rows=len(before), clusters=num_clusters, rows_needed=None,
    )  # fmt: skip
