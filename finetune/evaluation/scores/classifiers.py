"""Local classifiers of texts and of pairs of texts: probabilities by the names of labels."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from finetune import failures
from finetune.data.places import printable
from finetune.errors import ModelError

BATCH = 32


class Classifier:
    """A sequence classification model of a folder. num_cut: texts that were cut to its length."""

    def __init__(self, folder: str, setting: str) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.folder, self._torch, self.num_cut = folder, torch, 0
        where = f"{setting}: {printable(folder)}"
        if not Path(folder).is_dir():
            raise ModelError(f"{where}: no such folder; name one with a classifier")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, ImportError) as exc:
            failures.reraise(exc, f"{where}: cannot be read now")
            reason = str(exc).strip().split("\n")[0]
            raise ModelError(f"{where}: holds no classifier of texts: {reason}") from exc
        if missing := sorted(info["missing_keys"]):
            raise ModelError(
                f"{where}: its weights have no {missing[0]}, so it was not trained as a classifier"
            )
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self.labels = [str(model.config.id2label[n]) for n in range(model.config.num_labels)]
        # Each label by itself, as of several kinds of harm, where the model says so; a model of a
        # single label is a score, too.
        kind = model.config.problem_type
        self.is_independent = kind == "multi_label_classification" or len(self.labels) == 1
        positions = getattr(model.config, "max_position_embeddings", None) or 512
        self._limit = int(min(positions, self._tokenizer.model_max_length))

    def __call__(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return probabilities, float64 [texts, labels]. pairs: second texts, never cut first."""
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]) + len((pairs or texts)[n]))
        found = np.zeros((len(texts), len(self.labels)))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            first = [_whole(texts[n]) for n in chosen]
            second = None if pairs is None else [_whole(pairs[n]) for n in chosen]
            found[chosen] = self._batch(first, second)
        return found

    def _batch(self, first: list[str], second: list[str] | None) -> np.ndarray:
        texts = [first] if second is None else [first, second]
        options = {"return_tensors": "pt", "padding": True, "max_length": self._limit}
        try:  # the first text gives way, as a premise is longer than a sentence
            inputs = self._tokenizer(*texts, truncation="only_first", **options)
        except Exception as exc:  # tokenizers raises no other where the second alone is too long
            failures.reraise(exc)
            inputs = self._tokenizer(*texts, truncation="longest_first", **options)
        self.num_cut += int((inputs["attention_mask"].sum(1) == self._limit).sum())
        with self._torch.inference_mode():
            logits = self._model(**inputs.to(self._device)).logits.double()
        shares = logits.sigmoid() if self.is_independent else logits.softmax(-1)
        probabilities: np.ndarray = shares.cpu().numpy()
        return probabilities

    def number_of(self, starts: Sequence[str]) -> int | None:
        """Return the one label whose name begins with one of these words, whatever its case."""
        names = [label.lower().replace("_", " ").replace("-", " ") for label in self.labels]
        found = [n for n, name in enumerate(names) if name.startswith(tuple(starts))]
        return found[0] if len(found) == 1 else None


def _whole(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@cache
def classifier(folder: str, setting: str) -> Classifier:
    """Load a classifier once for all scores that use it. Raises ModelError."""
    return Classifier(folder, setting)
