"""How much of the reference's words an answer has: F1, ROUGE-L, word error rate, BLEU, chrF."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from finetune import extras
from finetune.data import clusters
from finetune.evaluation.scores.base import OfAnswer, Value, gap_of, of_reference
from finetune.evaluation.scores.normalise import squad_words
from finetune.generation.completions import Completion, Score
from finetune.preparation.rouge import rouge_l as rouge_l_of

NO_WORDS = Score(None, "the reference has no words")


def token_f1() -> OfAnswer:
    """Score words in common, in any order, by the harmonic mean of precision and recall (SQuAD)."""
    return of_reference("token F1", "words shared with the reference, in any order", f1)


def f1(answer: str, reference: str) -> float:
    """Return SQuAD's F1 of two texts; 1 if neither has words, 0 if one has none."""
    given, wanted = squad_words(answer), squad_words(reference)
    if not given or not wanted:
        return float(given == wanted)
    shared = (Counter(given) & Counter(wanted)).total()
    return 2 * shared / (len(given) + len(wanted))


def rouge_l() -> OfAnswer:
    """Score words in common in the same order: F-measure of the longest common subsequence."""

    def of(answer: str, reference: str) -> Value:
        wanted = clusters.words(reference)
        return rouge_l_of(clusters.words(answer), wanted) if wanted else NO_WORDS

    return of_reference("ROUGE-L", "words shared with the reference, in its order", of)


def word_error_rate() -> OfAnswer:
    """Score changed, missing and additional words for each word of the reference."""

    def of(answer: str, reference: str) -> Value:
        wanted = clusters.words(reference)
        return edit_distance(clusters.words(answer), wanted) / len(wanted) if wanted else NO_WORDS

    line = "wrong, missing and added words for each word of the reference"
    return of_reference("word error rate", line, of, higher=False, is_share=False)


def edit_distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return Levenshtein's distance: the fewest items to replace, remove or add.

    A row of the usual table at once. Additions are the only dependence inside a row: with place i
    subtracted they are a running minimum.
    """
    numbers: dict[Any, int] = {}
    first, second = (
        np.array([numbers.setdefault(item, len(numbers)) for item in items], np.int64)
        for items in (one, other)
    )
    place = np.arange(len(second) + 1)
    row = place
    for item in first:
        below = np.concatenate(([row[0] + 1], np.minimum(row[1:] + 1, row[:-1] + (second != item))))
        row = np.minimum.accumulate(below - place) + place
    return int(row[-1])


def word_accuracy(answer: str, wanted: str) -> float:
    """Return the share of the wanted words that stand at the same place of the answer.

    Additional words of the answer count as wrong.
    """
    given, words = answer.split(), wanted.split()
    right = sum(a == b for a, b in zip(given, words))
    return right / max(len(given), len(words), 1)


class OfCorpus:
    """BLEU or chrF of sacrebleu: of each answer, and of all together, not as their mean."""

    higher, is_share = True, True

    def __init__(self, name: str, line: str) -> None:
        extras.require("sacrebleu", f"--scores {name.lower()}")
        from sacrebleu.metrics import BLEU, CHRF

        self.name, self.line = name, line
        # force: no advice in the log on how the answers end.
        self._all: Any = BLEU(force=True) if name == "BLEU" else CHRF()
        # Of a single sentence: without n-grams that it is too short for.
        self._one: Any = BLEU(effective_order=True) if name == "BLEU" else self._all

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        return [self._of(each) for each in completions]

    def _of(self, completion: Completion) -> Score:
        if (gap := gap_of(completion, needs_reference=True)) is not None:
            return gap
        found = self._one.sentence_score(completion.text, [completion.prompt.reference])
        return Score(min(1.0, found.score / 100))

    def counts(self, completions: Sequence[Completion]) -> np.ndarray:
        """Return what sacrebleu counts in each answer, [answers, counts]; each has a reference.

        Sums over answers give a corpus score. Its own bootstrap reads them, too, without clusters.
        """
        references = [[each.prompt.reference for each in completions]]
        texts = [each.text for each in completions]
        return np.array(self._all._extract_corpus_statistics(texts, references), np.int64)

    def of_counts(self, counts: np.ndarray) -> float:
        """Return the corpus score of answers with these `counts`, from 0 to 1."""
        found = self._all._compute_score_from_stats(counts.sum(0).tolist())
        return min(1.0, float(found.score) / 100)


def bleu() -> OfCorpus:
    return OfCorpus("BLEU", "runs of up to four words shared with the reference, for translations")


def chrf() -> OfCorpus:
    return OfCorpus("chrF", "runs of up to six characters shared with the reference")
