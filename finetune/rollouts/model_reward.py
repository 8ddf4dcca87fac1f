"""The score of a reward model as a reward; the model is loaded when it is first asked."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.config import base
from finetune.data.conversations import Message
from finetune.errors import DataError, ModelError
from finetune.generation.completions import Completion, Score, no_answer


class ModelReward:
    """Scores answers by a model of `objective.kind: reward`. Raises ModelError without a model."""

    def __init__(self, path: str) -> None:
        from finetune.export.load import commit_of  # brings torch

        self._folder = base.model_in(path)
        base.require_model(self._folder, "model")
        self._commit = commit_of(self._folder)  # of a model on the Hub
        self._require_scores()
        self._model: Any = None

    def _require_scores(self) -> None:
        """Raise ModelError where config.json already says that the model gives no scores."""
        path = Path(self._folder, "config.json")
        try:
            names = json.loads(path.read_bytes()).get("architectures") or []
        except (OSError, ValueError, AttributeError):  # an adapter, a Hub id; or loading says why
            return
        if names and not any(str(name).endswith("ForSequenceClassification") for name in names):
            raise ModelError(
                f"model: {self._folder}: {str(names[0])[:80]} gives no single score; "
                "give the model of a run with objective.kind: reward"
            )

    @cached_property
    def identity(self) -> str:
        """A hash of its files; of a model on the Hub its commit."""
        if self._commit is not None:
            return f"{self._folder} {self._commit}"
        found = hashlib.sha256()
        for path in sorted(each for each in Path(self._folder).glob("*") if each.is_file()):
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            found.update(f"{path.name} {content}\n".encode())
        return found.hexdigest()

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        if self._model is None:
            from finetune.generation.reward_model import RewardModel  # brings torch

            self._model = RewardModel(self._folder, revision=self._commit)
        asked = [each for each in completions if each.finish_reason != "failed"]
        found = iter(self._scores(asked))
        return [
            no_answer(each) if each.finish_reason == "failed" else next(found)
            for each in completions
        ]

    def _scores(self, completions: Sequence[Completion]) -> list[Score]:
        """Score all at once, or one by one where one of them cannot be scored."""
        answered = [
            each.prompt.conversation.with_messages(
                (*each.prompt.messages, Message("assistant", each.text))
            )
            for each in completions
        ]
        try:
            return [Score(value) for value in self._model(answered)] if answered else []
        except DataError as exc:
            if len(completions) == 1:
                return [Score(None, str(exc))]
            return [score for each in completions for score in self._scores([each])]
