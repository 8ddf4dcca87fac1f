"""Whether answers follow from a text, or contradict it, by a model of natural language inference.

A long answer is split into sentences, each a hypothesis. The premise is the reference, or for
groundedness the context that the row gives.
"""

import re
from collections.abc import Sequence

import numpy as np

from finetune.data.places import printable
from finetune.errors import ModelError
from finetune.evaluation.scores import nli_pairs
from finetune.evaluation.scores.base import gap_of
from finetune.evaluation.scores.classifiers import Classifier, classifier
from finetune.generation.completions import Completion, Prompt, Score

STARTS = {"entailment": ("entail",), "contradiction": ("contradict",)}
# After a sentence ends, not after "e.g. " or "3. ".
_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Za-z]\.)(?<!\d\.)\s+(?=[^\sa-z])|(?<=[\u3002\uff01\uff1f])|\n+"
)


class Inference:
    """A probability of each sentence, and the mean of an answer's, or the highest.

    label: which probability: entailment or contradiction. from_context: the premise is the row's
    context, not the reference.
    """

    is_share = True

    def __init__(
        self, name: str, line: str, folder: str, label: str, from_context: bool = False
    ) -> None:
        self.name, self.line, self._from_context = name, line, from_context
        self.higher = label == "entailment"
        setting = f"--scores {name}"
        self._model = classifier(folder, setting)
        self._label = _number(self._model, label, setting)
        self._accuracy: str | None = None

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        scores = [self._gap(each) for each in completions]
        premises, hypotheses, owners = list[str](), list[str](), list[int]()
        for number, (each, gap) in enumerate(zip(completions, scores)):
            if gap is None:
                for sentence in sentences(each.text):
                    premises.append(self._premise(each.prompt) or "")
                    hypotheses.append(sentence)
                    owners.append(number)
        found = self._model(premises, hypotheses)[:, self._label] if owners else np.zeros(0)
        of = np.array(owners, np.int64)
        return [
            gap if gap is not None else self._joined(found[of == number], completions[number])
            for number, gap in enumerate(scores)
        ]

    def _gap(self, completion: Completion) -> Score | None:
        if (gap := gap_of(completion, needs_reference=not self._from_context)) is not None:
            return gap
        if not (self._premise(completion.prompt) or "").strip():
            what = "context" if self._from_context else "reference"
            return Score(None, f"the row has no {what}")
        if not sentences(completion.text):
            return Score(None, "the answer is empty")
        return None

    def _premise(self, prompt: Prompt) -> str | None:
        return context_of(prompt) if self._from_context else prompt.reference

    def _joined(self, found: np.ndarray, completion: Completion) -> Score:
        """Return the mean probability, or of contradictions the highest: one is enough."""
        worst = int(found.argmin() if self.higher else found.argmax())
        value = found.mean() if self.higher else found.max()
        sentence = sentences(completion.text)[worst]
        return Score(float(value), sentence[:200] if len(found) > 1 else "")

    def details(self, completions: Sequence[Completion]) -> list[str]:
        """Return the model's accuracy on pairs with known labels, and how many texts were cut."""
        if self._accuracy is None:
            self._accuracy = _accuracy(self._model)
        lines = [self._accuracy]
        if self._model.num_cut:
            lines.append(f"{self._model.num_cut:,} premises were cut to the length of the model")
        return lines


def entailment(folder: str) -> Inference:
    line = "how probably the reference implies the answer's sentences, by an NLI model"
    return Inference("entailment", line, folder, "entailment")


def contradiction(folder: str) -> Inference:
    line = "how probably a sentence of the answer contradicts the reference, by an NLI model"
    return Inference("contradiction", line, folder, "contradiction")


def groundedness(folder: str) -> Inference:
    line = "how probably the row's context implies the answer's sentences, by an NLI model"
    return Inference("groundedness", line, folder, "entailment", from_context=True)


def context_of(prompt: Prompt) -> str | None:
    """Return the text that a row gives next to its question: the column context, or its input."""
    if isinstance(given := prompt.fields.get("context"), str):
        return given
    texts = [each.context for each in prompt.messages if each.context]
    return "\n".join(texts) or None


def sentences(text: str) -> list[str]:
    """Split a text into sentences and lines."""
    return [part.strip() for part in _END.split(text) if part.strip()]


def _number(model: Classifier, label: str, setting: str) -> int:
    found = model.number_of(STARTS[label])
    if found is None:
        raise ModelError(
            f"{setting}: {printable(model.folder)}: its config.json (id2label) names "
            f"{', '.join(map(printable, model.labels))}, and of these not exactly one begins with "
            f"{STARTS[label][0]}; name the labels there, or choose a model of natural language "
            "inference"
        )
    return found


def _accuracy(model: Classifier) -> str:
    """Say how often the model finds the label of a pair that people gave it."""
    pairs = nli_pairs.pairs()
    found = model([each.premise for each in pairs], [each.hypothesis for each in pairs])
    entails = found.argmax(1) == model.number_of(STARTS["entailment"])
    right = [bool(given) == (each.label == "entailment") for given, each in zip(entails, pairs)]
    known = f"tells what follows from what does not in {sum(right) / len(right):.1%}"
    contradicts = model.number_of(STARTS["contradiction"])
    if contradicts is not None:
        named = np.where(entails, "entailment", "neutral")
        named = np.where(found.argmax(1) == contradicts, "contradiction", named)
        hits = sum(given == each.label for given, each in zip(named, pairs))
        known = f"is right in {hits / len(pairs):.1%} of three labels, and {known}"
    return f"the model {known} of {len(pairs)} pairs with known labels; chance is 33%, or 67%"
