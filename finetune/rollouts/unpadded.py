"""Completions of a batch without padding, by the attention of training.

Prompts are read end to end, those of a group once, and each pass continues the completions that
have not ended. Products have rows enough to round as those of training, so that log-probabilities
in float32 differ less from the training pass than those of padded batches.
"""

from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
import torch

from finetune.models import attention_probe
from finetune.models.key_values import FEWEST, KeyValues

READ_TOKENS = 8192  # of prompts, in a pass, unless one alone is longer


def choose(
    scores: torch.Tensor, numbers: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token for each row: scores [B, V], numbers float64 [B] -> tokens, log-probabilities.

    The token is where the cumulative distribution reaches the number.
    """
    logprobs = torch.log_softmax(scores.float() / temperature, -1)
    reached = logprobs.double().exp().cumsum(-1)
    whole = reached[:, -1:].contiguous()  # 1, but for rounding
    tokens = torch.searchsorted(reached, numbers[:, None] * whole, right=True)
    # Rounding may reach the whole, behind which no token has a probability. NaN is above all
    # numbers: a place that does not exist would end a GPU's process, without a reason.
    tokens = torch.minimum(tokens, torch.searchsorted(reached, whole))
    tokens = tokens.clamp(max=reached.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


@torch.no_grad()
def complete(
    model: Any, prompts: Sequence[Sequence[int]], numbers: np.ndarray, *, temperature: float,
    ends: Set[int], beat: Callable[[], None], anyone: Callable[[bool], bool] = bool,
) -> list[tuple[list[int], list[float]]]:  # fmt: skip
    """Return (tokens with the one that ended them, their log-probabilities) for each prompt.

    The model, which attends by `documents`, evaluates meanwhile. `anyone`: whether any process has
    a pass left, of those that share the weights. The rest as in `sampling.draw`.
    """

    def before_pass() -> None:
        beat()
        anyone(True)

    count, most = numbers.shape
    lengths = np.isfinite(numbers).sum(1)
    rows = [*range(count), *[count - 1] * (FEWEST - count)]
    """The completion of each row. Of fewer completions than rows one has several."""
    found: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        batch = Batch(model, [prompts[number] for number in rows])
        drawn_by = torch.from_numpy(numbers).to(batch.device)
        scores = batch.read(before_pass)
        for place in range(most):
            chosen = drawn_by[torch.tensor(rows, device=batch.device), place]
            tokens, logprobs = choose(scores, chosen, temperature)
            on_host = torch.stack((tokens.double(), logprobs.double()), 1)
            ended = set[int]()
            for number, (token, logprob) in zip(rows, on_host.tolist()):  # waits for the device
                if len(found[number][0]) == place:
                    found[number][0].append(int(token))
                    found[number][1].append(logprob)
                    if int(token) in ends or place + 1 == lengths[number]:
                        ended.add(number)
            if ended.issuperset(rows):
                break
            if ended:
                kept = _kept([number in ended for number in rows])
                batch.keep(kept)
                rows, tokens = [rows[row] for row in kept], tokens[kept]
            before_pass()
            scores = batch.grow(tokens)
        while anyone(False):
            beat()
            batch.idle()
    finally:
        model.train(was_training)
    return found


def _kept(has_ended: Sequence[bool]) -> list[int]:
    """Return the rows that stay: each where it is, or in the place of one that has ended.

    One of them fills the places up to FEWEST: a row that has ended would grow beyond its limit.
    """
    staying = [row for row, ended in enumerate(has_ended) if not ended]
    count = max(FEWEST, len(staying))
    others = [row for row in staying if row >= count]
    return [
        (others.pop() if others else staying[0]) if has_ended[row] else row for row in range(count)
    ]


class Batch:
    """The passes of a model over rows that grow."""

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        self.base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.device = next(model.parameters()).device
        self._rows: dict[tuple[int, ...], list[int]] = {}
        """The rows of each prompt."""
        for row, prompt in enumerate(prompts):
            self._rows.setdefault(tuple(prompt), []).append(row)
        self._cache = KeyValues([len(prompt) for prompt in prompts], self.device)
        self.keep = self._cache.keep
        self._first = torch.tensor([prompts[0][:1]], device=self.device)

    def read(self, before_pass: Callable[[], None]) -> torch.Tensor:
        """Read the prompts; return the scores of what follows, [rows, vocabulary]."""
        found, prompts = list[torch.Tensor](), list(self._rows)
        for part in _parts(prompts):
            before_pass()
            ids = torch.tensor([[token for prompt in part for token in prompt]])
            rows = [self._rows[prompt] for prompt in part]
            found.append(self.read_some(rows, ids, [len(prompt) for prompt in part]))
        of_row = {row: place for place, it in enumerate(prompts) for row in self._rows[it]}
        places = [of_row[row] for row in range(len(of_row))]
        return torch.cat(found)[torch.tensor(places).to(self.device)]

    def read_some(
        self, rows: list[list[int]], ids: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        """Read prompts end to end, ids [1, tokens]; return a row of scores for each.

        `rows`: those that begin with each.
        """
        self._cache.read(rows)
        last = torch.tensor(lengths).cumsum(0) - 1
        return self._scores(ids.to(self.device), lengths, last.to(self.device))

    def grow(self, tokens: torch.Tensor) -> torch.Tensor:
        """Continue each row by a token, [rows]; return the scores of what follows."""
        positions = self._cache.grow()
        every = torch.arange(len(tokens), device=self.device)
        return self._scores(tokens[None], [1] * len(tokens), every, position_ids=positions[None])

    def idle(self) -> None:
        """Take part in a pass of the processes that share the weights."""
        self.model(**attention_probe.inputs_of(self._first, [1], self.base))

    def _scores(
        self, ids: torch.Tensor, lengths: list[int], places: torch.Tensor, **more: torch.Tensor
    ) -> torch.Tensor:
        inputs = attention_probe.inputs_of(ids, lengths, self.base) | more
        if self.base._supports_logits_to_keep():
            inputs["logits_to_keep"] = places
        logits: torch.Tensor = self.model(**inputs, key_values=self._cache).logits[0]
        return logits if "logits_to_keep" in inputs else logits[places]


def _parts(prompts: list[tuple[int, ...]]) -> list[list[tuple[int, ...]]]:
    """Part prompts into those that are read in one pass."""
    parts, room = list[list[tuple[int, ...]]](), 0
    for prompt in prompts:
        if len(prompt) > room:
            parts, room = [*parts, []], READ_TOKENS
        parts[-1].append(prompt)
        room -= len(prompt)
    return parts
