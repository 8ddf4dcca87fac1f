"""Masked language modelling: the tokens that masks hide, given those around them."""

from typing import Any

import numpy as np

from finetune.config import MaskedLm
from finetune.data.views import Masked, View
from finetune.errors import ModelError
from finetune.objectives.base import Encoding
from finetune.objectives.sft import Sft


class Mlm(Sft):
    """Cross-entropy of a fixed number of tokens of each document, drawn anew in each epoch."""

    Settings = MaskedLm
    has_turns = False

    def supervises(self, loss_on: str) -> str:
        return "all"

    def view(self, settings: Any, encoding: Encoding) -> View:
        """Return what hides tokens. Raise ModelError for a tokenizer without a mask token."""
        tokenizer = encoding.tokenizer
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "objective.kind: mlm hides tokens behind the tokenizer's mask token, and this "
                "tokenizer has none; take the tokenizer that belongs to the encoder"
            )
        ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        ordinary = np.array(ids, np.int64)
        return Masked(tokenizer.mask_token_id, ordinary, settings.mlm_probability, encoding.seed)
