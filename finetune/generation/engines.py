"""What answers prompts: a model on this machine, or a server; all by one interface.

    for number, completion in engine.complete(prompts, Decoding(max_new_tokens=64)):
        ...  # in the order in which answers end

Greedy answers do not depend on the other prompts. Drawn ones (`temperature`) do, as a batch shares
one generator: they are drawn in shards of SHARD prompts, each with a seed of its own, and a shard
is drawn whole or not at all.
"""

import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Protocol

import torch

from finetune.generation import batching, generate
from finetune.generation.completions import Completion, FinishReason, Prompt

SHARD = 32  # prompts that are drawn together


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen. temperature 0: always the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0

    def seed_of(self, shard: int) -> int | None:
        """Return the seed of a shard; None for greedy answers."""
        if not self.temperature:
            return None
        text = f"{self.seed}:{shard}".encode()
        return int.from_bytes(blake2b(text, digest_size=6).digest(), "big")


class Engine(Protocol):
    """identity: another model has another one, so that saved answers are never mixed."""

    identity: str

    def asked(self, prompt: Prompt) -> str:
        """Return what the model gets of a prompt, as text: a saved answer belongs to it."""
        ...

    def complete(
        self, prompts: Sequence[Prompt], decoding: Decoding, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Yield (number of the prompt, its completion) of the `wanted` prompts; None: of all."""
        ...


class Local:
    """A model of this process. ends: the tokens that end answers; None: those of the model.

    at_once: prompts in a batch. asked: what makes the text of a prompt; None: the tokenizer's chat
    template. Plain `generate` serves encoder-decoders, drawn answers, and models
    that continuous batching cannot serve.
    """

    def __init__(
        self, model: Any, tokenizer: Any, identity: str, *, ends: Set[int] | None = None,
        at_once: int = 64, title: str = "generating", log: Callable[[str], None] = generate.log,
        batches: bool = True, asked: Callable[[Prompt], str] | None = None,
    ) -> None:  # fmt: skip
        self.identity, self._model, self._tokenizer = identity, model, tokenizer
        self._at_once, self._title, self._log = at_once, title, log
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._inner = inner
        self._batches = batches and batching.serves(inner)
        self._ends = set(generate.ends_of(inner) if ends is None else ends)
        self._asked = asked or self._rendered(generate.Prompts(tokenizer))
        self._pad = generate.pad_of(tokenizer)
        self._is_finite = False

    @staticmethod
    def _rendered(prompts: generate.Prompts) -> Callable[[Prompt], str]:
        return lambda prompt: prompts.of(prompt.conversation)

    @cached_property
    def _opening(self) -> str:
        return generate.opening_of(self._tokenizer)

    def asked(self, prompt: Prompt) -> str:
        return self._asked(prompt)

    def complete(
        self, prompts: Sequence[Prompt], decoding: Decoding, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        chosen = list(range(len(prompts)) if wanted is None else wanted)
        missing = set(chosen)
        with generate.progress(self._title, len(chosen), self._log) as note:
            for seed, part in _parts(chosen, len(prompts), decoding):
                texts = [self.asked(prompts[number]) for number in part]
                for place, ids, seconds in self._tokens(texts, decoding, seed):
                    number = part[place]
                    if number in missing:
                        note(1)
                        yield number, self._completion(prompts[number], ids, seed, seconds)

    def _completion(
        self, prompt: Prompt, ids: list[int], seed: int | None, seconds: float
    ) -> Completion:
        place = next((place for place, token in enumerate(ids) if token in self._ends), None)
        kept = ids if place is None else ids[:place]
        text = generate.without_opening(generate.decode(self._tokenizer, kept), self._opening)
        reason: FinishReason = "length" if place is None else "stop"
        return Completion(prompt, text, reason, tuple(kept), seed, seconds)

    def _tokens(
        self, texts: Sequence[str], decoding: Decoding, seed: int | None
    ) -> Iterator[tuple[int, list[int], float]]:
        """Yield (place in `texts`, tokens, seconds) by the engine that serves."""
        encoded, context = generate.encoded(
            self._inner, self._tokenizer, texts, decoding.max_new_tokens, self._log
        )
        if not self._is_finite and encoded[0]:
            generate.require_finite(self._model, encoded[0], self._title)
            self._is_finite = True
        left = set(range(len(encoded)))
        if self._batches and seed is None:
            limits = [min(decoding.max_new_tokens, context - len(ids)) for ids in encoded]
            try:
                for found in batching.complete(
                    self._inner, encoded, limits, ends=self._ends, pad=self._pad,
                    at_once=self._at_once,
                ):  # fmt: skip
                    left.discard(found[0])
                    yield found
            except batching.NotServed as exc:
                self._log(f"note: continuous batching cannot serve this model ({exc}); slower")
                self._batches = False
        if left:
            yield from self._padded(encoded, context, sorted(left), decoding, seed)

    def _padded(
        self, encoded: Sequence[list[int]], context: int, left: Sequence[int],
        decoding: Decoding, seed: int | None,
    ) -> Iterator[tuple[int, list[int], float]]:  # fmt: skip
        last = time.monotonic()
        with seeded(seed, self._inner.device):
            for batch in generate.padded(
                self._model, [encoded[place] for place in left], context=context, pad=self._pad,
                ends=self._ends, max_new_tokens=decoding.max_new_tokens,
                batch_size=self._at_once, temperature=decoding.temperature,
            ):  # fmt: skip
                now = time.monotonic()
                for place, ids in batch:
                    yield left[place], ids, (now - last) / len(batch)
                last = now


def _parts(
    chosen: Sequence[int], count: int, decoding: Decoding
) -> Iterator[tuple[int | None, Sequence[int]]]:
    """Yield (seed, prompts that are answered together): all, or of drawn answers whole shards."""
    if not decoding.temperature:
        yield None, chosen
        return
    for shard in sorted({number // SHARD for number in chosen}):
        part = range(shard * SHARD, min((shard + 1) * SHARD, count))
        yield decoding.seed_of(shard), part


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed PyTorch's generators inside the block, and put their state back; None: do nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
