"""Sample completions of token ids by the policy, with the log-probability of each token.

A token is the inverse of the cumulative distribution at a number between 0 and 1 that was drawn
before, for this completion and this place alone. So a completion does not depend on which others
are sampled beside it, but for rounding, and PyTorch's generators stay as they are.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from finetune.errors import TrainingDiverged
from finetune.generation import generate
from finetune.generation.completions import FinishReason
from finetune.models.attention_choice import DOCUMENTS, own_attention
from finetune.rollouts import unpadded

HELD_OUT = 8  # times as many held-out prompts as shard_size are sampled at once, each once


@dataclass(frozen=True)
class Drawn:
    """A completion as tokens.

    ids: with the one that ended it. logprobs: float32 [ids], of the distributions that they were
    drawn from, at the temperature.
    """

    ids: tuple[int, ...]
    logprobs: np.ndarray
    finish_reason: FinishReason


class Stopped(Exception):
    """A request to stop came while completions were sampled."""


def numbers_of(seed: int, *of: int, count: int, places: int) -> np.ndarray:
    """Draw what completions are made of: float64 [count, places], by seed and what they are of."""
    return np.stack(
        [np.random.default_rng([seed, 0x5A3, *of, each]).random(places) for each in range(count)]
    )


def seed_of(seed: int, *of: int) -> int:
    """Return the seed of a group at a server: 31 bits, by what `numbers_of` takes."""
    return int(np.random.default_rng([seed, 0x5A3, *of]).integers(1 << 31))


@torch.no_grad()
def draw(
    model: Any, prompts: Sequence[Sequence[int]], numbers: np.ndarray, *, temperature: float,
    ends: Set[int], pad: int, together: bool, beat: Callable[[], None],
    anyone: Callable[[bool], bool] = bool,
) -> list[Drawn]:  # fmt: skip
    """Return a completion of each prompt, of at most as many tokens as `numbers` has.

    `numbers`: float64 [prompts, tokens], from 0 to 1, and NaN behind the limit of a completion;
    `generate` may go on behind it. `ends`: tokens that end a completion. `together`: processes that
    share the weights call this at once; `anyone` tells whether any of them has a pass left. `beat`
    is called before each token, and may raise. Raises TrainingDiverged if the model says NaN.
    """
    if not why_padded(model):
        found = unpadded.complete(
            model, prompts, numbers, temperature=temperature, ends=ends, beat=beat, anyone=anyone
        )
        return [_cut(ids, np.array(logprobs, np.float32), ends) for ids, logprobs in found]
    device = next(model.parameters()).device
    inputs = generate._padded([list(each) for each in prompts], pad, device)
    width = inputs["input_ids"].shape[1]
    drawing = Drawing(torch.from_numpy(numbers).to(device), width, temperature, beat)
    with _prepared(model, pad, ends):
        out = model.generate(
            **inputs, max_new_tokens=numbers.shape[1], synced_gpus=together,
            logits_processor=LogitsProcessorList([drawing]),
        )  # fmt: skip
    logprobs = torch.stack(drawing.logprobs, 1).float().cpu().numpy()
    return [_cut(row, logprobs[number], ends) for number, row in enumerate(out[:, width:].tolist())]


def why_padded(model: Any) -> str:
    """Return why completions are drawn by `generate` in padded batches; "" if they are not."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = str(inner.config._attn_implementation)
    return "" if attention == DOCUMENTS else f"model.attention is {attention}"


def _cut(ids: list[int], logprobs: np.ndarray, ends: Set[int]) -> Drawn:
    """Return a completion up to the token that ends it. Raises TrainingDiverged for NaN."""
    place = next((place for place, token in enumerate(ids) if token in ends), None)
    kept = ids if place is None else ids[: place + 1]
    if not np.isfinite(logprobs[: len(kept)]).all():
        raise TrainingDiverged(
            "the policy's logits are NaN while it samples: its weights have diverged, or numbers "
            "overflow in 16 bits; lower optimizer.lr under another run.name, or set "
            "train.precision to bf16 or fp32"
        )
    return Drawn(tuple(kept), logprobs[: len(kept)], "length" if place is None else "stop")


class Drawing(LogitsProcessor):
    """Leaves the drawn token alone possible, so that greedy decoding takes it."""

    def __init__(
        self, numbers: torch.Tensor, start: int, temperature: float, beat: Callable[[], None]
    ) -> None:
        self.numbers, self.start, self.temperature, self.beat = numbers, start, temperature, beat
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.beat()
        numbers = self.numbers[:, input_ids.shape[1] - self.start]
        token, logprobs = unpadded.choose(scores, numbers, self.temperature)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


@contextmanager
def _prepared(model: Any, pad: int, ends: Set[int]) -> Iterator[None]:
    """Let a model in training generate inside the block, and leave it as it was."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    before = [(each, each.generation_config) for each in (model, inner)]
    try:
        with own_attention(inner):
            generate._configure(model, pad, ends, temperature=0.0)
            yield
    finally:
        for each, config in before:
            each.generation_config = config
        model.train(was_training)
