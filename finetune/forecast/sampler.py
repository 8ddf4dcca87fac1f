"""Trace what sampling holds: keys and values of all tokens, and what draws the next ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.forecast import layers
from finetune.forecast.layers import Mark, Row, Segment
from finetune.forecast.trace import Ledger, Rehearsal, Trace, added
from finetune.models.attention_choice import own_attention
from finetune.rollouts import sampling


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
        with (
            made.mode, own_attention(made.base), layers.shortened(made.base, rows, ledger),
            torch.no_grad(), ledger, arithmetic,
        ):  # fmt: skip
            begin = _pass(made, ledger, shard.count, shard.prompt)[0]
            # Only what is kept of it counts: there is never a pass over that many tokens.
            filled, cache = _pass(made, ledger, shard.count, shard.length - 1)
            last = _pass(made, ledger, shard.count, shard.length, cache)[0]
            del cache
    finally:
        made.model.train(was_training)
    begin, filled, last = (layers.whole(each, rows) for each in (begin, filled, last))
    kept = sum(segment.passing for _, segment in filled)
    end = added([(Mark("cache"), Segment(kept, most_passing=kept, most=kept)), *last]).passing
    return Trace(max(added(begin).passing, end), end, 0, kept)


Segments = Sequence[tuple[Mark, Segment]]


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
