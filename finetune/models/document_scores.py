"""Scores of whole documents by a reward model: as training reads them, and as transformers does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finetune.models.attention_choice import own_attention
from finetune.models.head import Question


@dataclass(frozen=True)
class Scored:
    """documents: int32 [tokens] each; scores: float32 [D]."""

    documents: Sequence[np.ndarray]
    scores: torch.Tensor


def padded(
    documents: Sequence[np.ndarray], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Return documents as inputs of a model, int64 [D, longest], padded on the right."""
    shape = (len(documents), max(map(len, documents)))
    ids, mask = np.full(shape, pad_id, np.int64), np.zeros(shape, np.int64)
    for row, document in enumerate(documents):
        ids[row, : len(document)], mask[row, : len(document)] = document, 1
    made = {"input_ids": ids, "attention_mask": mask}
    return {name: torch.from_numpy(values).to(device) for name, values in made.items()}


def plain(model: Any, documents: Sequence[np.ndarray], device: torch.device) -> torch.Tensor:
    """Return what the class of transformers gives, float32 [D]: by the last token not padding.

    `documents`: int32 or int64 [tokens] each; none may end with the pad token.
    """
    pad_id: int = model.config.get_text_config().pad_token_id
    inputs = padded(documents, pad_id, device)
    with torch.inference_mode():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits
    return logits[:, 0].float().cpu()


def trained(model: Any, documents: Sequence[np.ndarray], device: torch.device) -> Scored:
    """Score documents as training does, at their ends. `model`: after `head.install`.

    Collective if weights are sharded. The attention is the model's own, which a user has.
    """
    inputs = padded(documents, 0, device)
    longest = inputs["input_ids"].shape[1]
    ends = [row * longest + len(each) - 1 for row, each in enumerate(documents)]
    none = torch.zeros(0, dtype=torch.long, device=device)
    want, places = frozenset({"scores"}), torch.tensor(ends, device=device)
    question = Question(none, none, want, ends=places)
    base = model.get_base_model() if hasattr(model, "peft_config") else model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), own_attention(base):
            scores = model(**inputs, use_cache=False, question=question)["scores"]
    finally:
        model.train(was_training)
    return Scored(documents, scores.cpu())
