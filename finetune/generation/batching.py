"""Answers by transformers' continuous batching: requests join and leave the batch at each token.

A request that has ended makes room for the next at once, and nothing is padded, with the same
tokens as `generate` in float32 (benchmarks/LOG.md has times).
"""

import math
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from finetune.models import families

PAGE = 32  # tokens of a page on a CPU; a GPU's kernels read 256, the library's own number
STEP_TOKENS = 512  # of prompts, at most, that join a step on a CPU
# A step on a CPU reads the cache of all requests for each of them: its work grows with the square.
# The quickstart's model answered 256 prompts in 7.9 s of one core at 64, 5.6 at 32, 6.5 at 16.
MOST_ON_CPU = 32
GPU_MEMORY = 0.5  # of what is free, for the cache
WAIT_SECONDS = 1.0
SERVED = ("sdpa", "eager")


class NotServed(Exception):
    """Continuous batching cannot serve this model; `generate` may."""


def serves(model: Any) -> bool:
    """Return whether a model may be tried: an unsharded one that continues text."""
    attention = str(getattr(model.config, "_attn_implementation", ""))
    return (
        not families.is_encoder_decoder(model.config)
        and hasattr(model, "init_continuous_batching")
        and (attention in SERVED or "flash" in attention)
    )


def complete(
    model: Any, prompts: Sequence[Sequence[int]], limits: Sequence[int], *, ends: Set[int],
    pad: int, at_once: int,
) -> Iterator[tuple[int, list[int], float]]:  # fmt: skip
    """Yield (number of the prompt, greedy tokens with the one that ended them, seconds).

    In the order in which answers end. limits: most new tokens of each. at_once: requests in a
    batch. Raises NotServed, also after some answers, if the engine fails.
    """
    if not prompts:
        return
    config = GenerationConfig(
        do_sample=False, eos_token_id=sorted(ends) or -1, pad_token_id=pad,
        max_new_tokens=max(limits),
    )  # fmt: skip
    sizes = _sizes(model.device, prompts, limits, at_once)
    with _unchanged(model):
        manager, last = None, time.monotonic()
        left = set(range(len(prompts)))
        try:
            try:
                manager = model.init_continuous_batching(
                    generation_config=config, continuous_batching_config=sizes
                )
                for number in left:  # all before the start: what joins a step is then no race
                    manager.add_request(
                        list(prompts[number]), request_id=str(number),
                        max_new_tokens=limits[number], eos_token_id=sorted(ends) or -1,
                    )  # fmt: skip
                if model.device.type == "cuda":
                    manager.warmup()
                manager.start()
            except (AttributeError, ValueError, TypeError, KeyError, RuntimeError) as exc:
                raise NotServed(f"{type(exc).__name__}: {exc}") from exc
            while left:
                found = manager.get_result(timeout=WAIT_SECONDS)
                if found is None:
                    if not manager.is_running():
                        raise NotServed(f"it ended: {manager.background_thread_status.fatal_error}")
                    continue
                if found.error is not None:
                    raise NotServed(str(found.error))
                now, number = time.monotonic(), int(found.request_id)
                left.discard(number)
                yield number, list(found.generated_tokens), now - last
                last = now
        finally:
            if manager is not None and manager.is_running():
                manager.stop(block=True, hard_stop=bool(left))
            if manager is not None:
                manager.destroy()


def _sizes(
    device: torch.device, prompts: Sequence[Sequence[int]], limits: Sequence[int], at_once: int
) -> ContinuousBatchingConfig:
    """Return how much is cached and batched: on a CPU what the requests need, not 90% of memory."""
    at_once = min(at_once, len(prompts))
    # The attention of the model stays: flash kernels would be fetched, and round otherwise.
    if device.type == "cuda":
        return ContinuousBatchingConfig(
            max_requests_per_batch=at_once, seed=0, max_memory_percent=GPU_MEMORY,
            auto_switch_to_flash=False,
        )  # fmt: skip
    at_once = min(at_once, MOST_ON_CPU)
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits))
    blocks = at_once * math.ceil(longest / PAGE)
    return ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=blocks + 1, max_requests_per_batch=at_once, seed=0,
        max_batch_tokens=max(STEP_TOKENS, at_once, PAGE), allow_block_sharing=False,
        auto_switch_to_flash=False,
    )  # fmt: skip


@contextmanager
def _unchanged(model: Any) -> Iterator[None]:
    """Put back what the engine changes: attention, training mode, and PyTorch's generators.

    It seeds the one global generator, also for greedy answers.
    """
    attention, was_training = model.config._attn_implementation, model.training
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if _on_gpu(model) else ())]
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        if states[1:]:
            torch.cuda.set_rng_state_all(states[1:])
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        model.train(was_training)


def _on_gpu(model: Any) -> bool:
    return bool(model.device.type == "cuda")
