"""Encoder-decoders: answers to prompts, spans of text, and text with gaps."""

import re
from typing import Any

import numpy as np
from pydantic import BaseModel

from finetune.config import Seq2Seq, SpanCorruption, TextInfilling
from finetune.data import frames
from finetune.data.views import Infilling, Pairs, Spans, View
from finetune.errors import ModelError
from finetune.objectives.base import Encoding
from finetune.objectives.sft import Sft

_SENTINEL = re.compile(r"<extra_id_(\d+)>")


class Answers(Sft):
    """Cross-entropy of the answer to each prompt, which the encoder reads."""

    Settings: type[BaseModel] = Seq2Seq
    has_turns = False

    def view(self, settings: Any, encoding: Encoding) -> View:
        return Pairs(encoding.start_id)


class CorruptedSpans(Answers):
    """Cross-entropy of spans that sentinels hide, drawn anew in each epoch."""

    Settings: type[BaseModel] = SpanCorruption

    def supervises(self, loss_on: str) -> str:
        return "all"

    def view(self, settings: Any, encoding: Encoding) -> View:
        """Raise ModelError for a tokenizer without sentinels."""
        found = {
            int(match[1]): number
            for token, number in encoding.tokenizer.get_vocab().items()
            if (match := _SENTINEL.fullmatch(token))
        }
        if not found:
            raise ModelError(
                "objective.kind: span_corruption hides spans behind sentinel tokens, <extra_id_0> "
                "and so on, which this tokenizer lacks; take objective.kind: text_infilling, or a "
                "T5"
            )
        return Spans(
            encoding.start_id, np.array([found[n] for n in sorted(found)], np.int64),
            _end(encoding.tokenizer).tail.astype(np.int64), settings.noise_density,
            settings.mean_noise_span_length, encoding.seed,
        )  # fmt: skip


class Infilled(CorruptedSpans):
    """Cross-entropy of whole texts, of which the encoder reads some spans as one mask each."""

    Settings = TextInfilling

    def view(self, settings: Any, encoding: Encoding) -> View:
        """Raise ModelError for a tokenizer without a mask token."""
        tokenizer = encoding.tokenizer
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "objective.kind: text_infilling hides spans behind the tokenizer's mask token, and "
                "this tokenizer has none; take objective.kind: span_corruption, or a BART"
            )
        added = len(_end(tokenizer).tail) - len(frames.frame_of(tokenizer).tail)
        end = np.full(added, tokenizer.eos_token_id, np.int64)
        return Infilling(
            encoding.start_id, tokenizer.mask_token_id, end, settings.mask_ratio,
            settings.poisson_lambda, encoding.seed,
        )  # fmt: skip


def _end(tokenizer: Any) -> frames.Frame:
    return frames.ended(frames.frame_of(tokenizer), tokenizer)
