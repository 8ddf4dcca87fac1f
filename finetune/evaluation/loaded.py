"""The models of an evaluation, loaded one after another; a base and its adapter at once."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from finetune.config.base import is_adapter, recorded_base
from finetune.evaluation.candidates import Candidate, same_model
from finetune.export.load import load, load_tokenizer
from finetune.models import base_identity


class Loaded(NamedTuple):
    """A model, ready to answer, and its tokenizer. name: as in tables."""

    name: str
    model: Any
    tokenizer: Any


def each(candidates: Sequence[Candidate], trust_remote_code: bool = False) -> Iterator[Loaded]:
    """Yield the models in their order; drop each before the next, and one at a time is in memory.

    A base whose adapter follows is that adapter's, switched off: it is not loaded twice.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source: Candidate | None = None
    model: Any = None
    for candidate in candidates:
        if source is not candidate:
            model = None  # free the last before the next comes
            source = next((other for other in candidates if _holds(other, candidate)), candidate)
            model = load(
                source.model, trust_remote_code=trust_remote_code, base=source.base,
                revision=source.revision,
            )  # fmt: skip
            model = model.to(device).eval()
        tokenizer = load_tokenizer(candidate.model, trust_remote_code, candidate.revision)
        with nullcontext() if source is candidate else model.disable_adapter():
            yield Loaded(candidate.name, model, tokenizer)


def _holds(candidate: Candidate, base: Candidate) -> bool:
    """Return whether a candidate is an adapter on exactly this base, as it would be loaded."""
    if not is_adapter(candidate.model) or is_adapter(base.model):
        return False
    record = base_identity.read(Path(candidate.model))
    where = candidate.base or recorded_base(candidate.model)
    differs = record.get("quantization") or record.get("new_token_ids") or record.get("labels")
    return bool(record) and not differs and where is not None and same_model(where, base.model)
