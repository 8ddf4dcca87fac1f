"""Qualities of an answer that a trained classifier knows: relevancy and responsibility."""

from collections.abc import Sequence

from finetune.data.places import printable
from finetune.errors import ModelError
from finetune.evaluation.scores.base import gap_of
from finetune.evaluation.scores.classifiers import Classifier, classifier
from finetune.generation.completions import Completion, Score

RELEVANT = ("relevant", "answer", "positive")
HARMLESS = ("safe", "harmless", "non toxic", "nontoxic", "not toxic", "not hate", "neutral", "ok")


class ByClassifier:
    """The probability of a label of the answer, or of the question with the answer.

    folder: as FOLDER or FOLDER,LABEL. Without a label it is the one that a name in `known` begins;
    of a model of one label that one; of independent kinds of harm (`of_harm`) none of them.
    """

    higher, is_share = True, True

    def __init__(
        self, name: str, line: str, value: str, known: Sequence[str], with_question: bool,
        of_harm: bool,
    ) -> None:  # fmt: skip
        folder, _, label = value.partition(",")
        setting = f"--scores {name}"
        self.name, self.line, self._with_question = name, line, with_question
        self._model = classifier(folder, setting)
        self._label = _label(self._model, label.strip(), known, of_harm, setting)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        gaps = [self._gap(each) for each in completions]
        usable = [each for each, gap in zip(completions, gaps) if gap is None]
        answers = [each.text for each in usable]
        questions = [each.prompt.question for each in usable]
        found = self._model(questions, answers) if self._with_question else self._model(answers)
        values = 1 - found.max(1) if self._label is None else found[:, self._label]
        scores = iter(values.tolist())
        return [Score(next(scores)) if gap is None else gap for gap in gaps]

    def _gap(self, completion: Completion) -> Score | None:
        if (gap := gap_of(completion, needs_reference=False)) is not None:
            return gap
        return None if completion.text.strip() else Score(None, "the answer is empty")

    def details(self, completions: Sequence[Completion]) -> list[str]:
        """Return which label is scored."""
        label = "none of its labels" if self._label is None else self._model.labels[self._label]
        return [f"probability of: {label}"]


def relevancy(value: str) -> ByClassifier:
    line = "how probably the answer addresses the question, by a classifier of both"
    return ByClassifier("relevancy", line, value, RELEVANT, with_question=True, of_harm=False)


def responsibility(value: str) -> ByClassifier:
    line = "how probably the answer is harmless, by a classifier"
    return ByClassifier("responsibility", line, value, HARMLESS, with_question=False, of_harm=True)


def _label(
    model: Classifier, label: str, known: Sequence[str], of_harm: bool, setting: str
) -> int | None:
    """Return the number of the label to score; None: that none of them holds."""
    if label:
        if label in model.labels:
            return model.labels.index(label)
    elif (found := model.number_of(known)) is not None:
        return found
    elif len(model.labels) == 1 and not of_harm:
        return 0
    elif model.is_independent and of_harm:
        return None
    problem = f"has no label {printable(label)}" if label else "names none that says so by itself"
    raise ModelError(
        f"{setting}: {printable(model.folder)}: its config.json (id2label) {problem}: "
        f"{', '.join(map(printable, model.labels))}; name one as "
        f"{setting.removeprefix('--scores ')}={printable(model.folder)},LABEL"
    )
