"""The scores that a reward model gives to conversations: of a reward run, or any with one score."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from finetune.data import chat_templates
from finetune.data.conversations import Conversation
from finetune.data.tokenised import answered
from finetune.data.tokens import with_bos
from finetune.errors import DataError, ModelError
from finetune.export.load import load, load_tokenizer
from finetune.models import document_scores, families

BATCH_TOKENS = 16_384  # of a forward pass, padding included
MOST_AT_ONCE = 64


class RewardModel:
    """Scores whole conversations, each by its last token, as the export of a reward run does.

    path: the `model` of a run, or the run. Any class of transformers for sequence classification
    with one label, and adapters of one, serve as well. revision: of a model on the Hub. Raises
    ModelError for another model.
    """

    def __init__(
        self, path: str | Path, device: torch.device | None = None,
        trust_remote_code: bool = False, revision: str | None = None,
    ) -> None:  # fmt: skip
        inner = Path(path, "model")
        folder = str(inner if inner.is_dir() else path)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(folder, trust_remote_code, revision)
        self.model = load(
            folder, trust_remote_code=trust_remote_code, device=self.device, revision=revision
        ).eval()
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        if families.of_model(base) != families.SCORES:
            raise ModelError(
                f"{folder}: {type(base).__name__} gives no single score; give the model of a run "
                "with objective.kind: reward"
            )
        if not getattr(base, "is_quantized", False):  # such a model is where it was loaded
            self.model.to(self.device)
        config = base.config.get_text_config()
        self.pad_id: int = config.pad_token_id
        self.positions: int | None = getattr(config, "max_position_embeddings", None)
        special, vocabulary = self.tokenizer.special_tokens_map, self.tokenizer.get_added_vocab()
        source = self.tokenizer.chat_template
        template = chat_templates.load("chat", "messages", source, special, vocabulary)
        self.template = with_bos(template, self.tokenizer)

    def __call__(self, conversations: Sequence[Conversation]) -> list[float]:
        """Return the score of each conversation, which has to end with an answer.

        Raises DataError for one that does not, or that the model has too few positions for.
        """
        documents = self.documents(conversations)
        scores = [0.0] * len(documents)
        for numbers in _batches([len(each) for each in documents]):
            batch = [documents[n] for n in numbers]
            found = document_scores.plain(self.model, batch, self.device)
            for number, score in zip(numbers, found.tolist()):
                scores[number] = score
        return scores

    def documents(self, conversations: Sequence[Conversation]) -> list[np.ndarray]:
        """Return the tokens of conversations as in training, int32 each."""
        whole = [_answered(each) for each in conversations]
        documents = [ids for ids, _ in answered(whole, self.template, self.tokenizer)]
        for conversation, ids in zip(whole, documents):
            if self.positions and len(ids) > self.positions:
                raise DataError(
                    f"{conversation.place}: {len(ids):,} tokens, and the reward model has only "
                    f"{self.positions:,} positions; shorten the conversation"
                )
            if ids[-1] == self.pad_id:
                raise ModelError(
                    "the pad token of the reward model ends conversations, so its class would read "
                    "the score before it; set another pad_token_id in its config.json"
                )
        return documents


def _answered(conversation: Conversation) -> Conversation:
    *before, last = conversation.messages
    if last.role != "assistant":
        raise DataError(
            f"{conversation.place}: ends with a message of the {last.role}; a reward model scores "
            "answers of the assistant"
        )
    asked = (replace(each, supervised=False) for each in before)
    return conversation.with_messages((*asked, replace(last, supervised=True)))


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of documents in batches, the longest first."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        longest = lengths[batch[0]] if batch else 0
        if len(batch) == MOST_AT_ONCE or longest * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch
