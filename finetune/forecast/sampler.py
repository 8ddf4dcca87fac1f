"""Trace what sampling holds: keys and values of all tokens, and what draws the next ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.forecast import layers
from finetune.forecast.layers import Mark, Row, Segment
from finetune.forecast.trace import Ledger, Rehearsal, Trace, added
from finetune.models import key_values
from finetune.models.attention_choice import DOCUMENTS, own_attention
from finetune.rollouts import sampling, unpadded


@dataclass(frozen=True)
class Shard:
    """Completions that are sampled together, as long as they may be.

    count: of them. prompt: tokens of a prompt; length: with those of its completion.
    """

    count: int
    prompt: int
    length: int


def trace(made: Rehearsal, shard: Shard) -> Trace:
    """Trace the passes over the prompts and for the last token. `kept`: keys and values.

    Raises ModelError if that fails.
    """
    return made.tried(lambda rows: _trace(made, shard, rows))


def _trace(made: Rehearsal, shard: Shard, rows: Sequence[Row]) -> Trace:
    ledger, was_training = Ledger(made.on_gpu), made.model.training
    for weight in (*made.model.parameters(), *made.model.buffers()):
        ledger.ignore(weight)
    arithmetic = torch.autocast(
        "cpu", made.dtype or torch.bfloat16, enabled=made.dtype is not None, cache_enabled=False
    )
    made.model.eval()
    try:
        with made.mode, torch.no_grad(), arithmetic:
            if made.attention == DOCUMENTS:
                with layers.shortened(made.base, rows, ledger), ledger:
                    passes = _unpadded(made, ledger, shard)
            else:
                with (
                    own_attention(made.base), layers.shortened(made.base, rows, ledger), ledger
                ):  # fmt: skip
                    passes = _padded(made, ledger, shard)
    finally:
        made.model.train(was_training)
    begin, filled, last = (layers.whole(each, rows) for each in passes)
    kept = sum(segment.passing for _, segment in filled)
    end = added([(Mark("cache"), Segment(kept, most_passing=kept, most=kept)), *last]).passing
    return Trace(max(added(begin).passing, end), end, 0, kept)


Segments = Sequence[tuple[Mark, Segment]]
"""Of a pass, since its start."""
Passes = tuple[Segments, Segments, Segments]
"""Over the prompts; over all tokens but the last, of which only what is kept counts, as there is
never a pass over that many; and for the last one."""


def _padded(made: Rehearsal, ledger: Ledger, shard: Shard) -> Passes:
    """Do the passes that `generate` makes."""
    begin = _pass(made, ledger, shard.count, shard.prompt)[0]
    filled, cache = _pass(made, ledger, shard.count, shard.length - 1)
    return begin, filled, _pass(made, ledger, shard.count, shard.length, cache)[0]


def _unpadded(made: Rehearsal, ledger: Ledger, shard: Shard) -> Passes:
    """Do the passes that `unpadded.complete` makes, of prompts that are all different."""
    once = max(1, min(shard.count, unpadded.READ_TOKENS // max(1, shard.prompt)))
    begin = _read(made, ledger, shard.count, shard.prompt, once)[0]
    # Memory grows by strides: the most is there when it has just grown.
    length = max(1, (shard.length - 1) // key_values.STRIDE * key_values.STRIDE)
    filled, batch = _read(made, ledger, shard.count, min(length, shard.length - 1), 1)
    ledger.restart()
    scores = batch.grow(torch.zeros(shard.count, dtype=torch.long))
    return begin, filled, _chosen(ledger, scores)


def _read(
    made: Rehearsal, ledger: Ledger, count: int, length: int, once: int
) -> tuple[Segments, unpadded.Batch]:
    """Read `once` prompts of a `length`, the last of which begins the other completions, too."""
    ledger.restart()
    batch = unpadded.Batch(made.model, [[number] + [0] * (length - 1) for number in range(count)])
    own = [*([number] for number in range(once - 1)), list(range(once - 1, count))]
    scores = batch.read_some(own, torch.zeros(1, once * length, dtype=torch.long), [length] * once)
    return _chosen(ledger, scores), batch


def _chosen(ledger: Ledger, scores: torch.Tensor) -> Segments:
    ledger.mark(Mark("draw"))
    unpadded.choose(scores, torch.zeros(len(scores), dtype=torch.float64), 1.0)
    del scores
    ledger.mark(Mark("end"))
    return ledger.segments


def _pass(
    made: Rehearsal, ledger: Ledger, count: int, length: int, cache: Any = None
) -> tuple[Segments, Any]:
    """Do a pass and draw a token; return what was held since its start, and keys and values.

    With the `cache` of all tokens before it reads the last of `length` tokens, else all.
    """
    ledger.restart()
    read = length if cache is None else 1
    own = {"logits_to_keep": 1} if made.base._supports_logits_to_keep() else {}
    out = made.model(
        input_ids=torch.zeros(count, read, dtype=torch.long),
        attention_mask=torch.ones(count, length, dtype=torch.long),
        past_key_values=cache, use_cache=True, **own,
    )  # fmt: skip
    ledger.mark(Mark("draw"))
    # As `generate` of transformers hands them on.
    logits = out.logits[:, -1].to(torch.float32, copy=True)
    cache, out = out.past_key_values, None
    draw = sampling.Drawing(torch.zeros(count, 1), length - 1, 1.0, lambda: None)
    draw(torch.zeros(count, length - 1, dtype=torch.long), logits)
    del draw, logits
    ledger.mark(Mark("end"))
    return ledger.segments, cache
