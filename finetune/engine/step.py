"""One optimizer step, normalised over all micro-batches and processes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import Batch, Counts
from finetune.engine.optim import set_lr
from finetune.engine.terms import (
    logged,
    loss_of,
    means_over_processes,
    prepared_over_processes,
)
from finetune.engine.topology import Topology
from finetune.errors import TrainingDiverged
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term, as_divisors


@dataclass(frozen=True)
class StepResult:
    """One step over all processes.

    loss: weighted sum of the means of all terms. terms: these means, by name. grad_norm: before
    clipping. tokens: all of them, also the unsupervised. skipped: fp16 gradients overflowed under
    their scale, so the weights stayed. requests: for each request that processes can make (stop,
    save), whether any process has made it.
    """

    loss: float
    terms: dict[str, float]
    grad_norm: float
    tokens: int
    supervised_tokens: int
    skipped: bool
    requests: tuple[bool, ...]

    @property
    def other_terms(self) -> dict[str, float]:
        """Terms that have a column of their own in the logs, next to the loss."""
        return logged(self.terms, self.loss)


def add_gradients(
    topology: Topology, policy: Policy, objective: Objective, settings: Any,
    batches: Sequence[Batch], totals: Counts, *, last: bool = True,
) -> tuple[list[Term], dict[str, float | torch.Tensor]]:  # fmt: skip
    """Run forward and backward. Return the terms' sums over this process, and what divides them.

    `last`: as in `forward_backward`.
    """
    policy.model.train()
    prepared = prepared_over_processes(topology, policy, objective, settings, batches)
    divisors = {**totals, **as_divisors(prepared)}

    def terms(batch: Batch) -> list[Term]:
        return objective.loss(policy, batch, settings, prepared)

    return topology.forward_backward(policy.model, batches, terms, divisors, last=last), divisors


def train_step(
    topology: Topology, policy: Policy, optimizer: Any, objective: Objective, settings: Any,
    batches: Sequence[Batch], totals: Counts, *, lr: float, max_grad_norm: float | None,
    requests: Callable[[], Sequence[bool]] = tuple,
) -> StepResult:  # fmt: skip
    """Update the weights once.

    The gradient is that of the sum, over the objective's terms, of weight x (sum over all
    micro-batches and processes) / (total of the same). The totals are known before the first pass,
    so each micro-batch's sums are divided by those of the whole step, and simply add up. The host
    waits for the device once, before the optimizer moves: sums, gradient norm and requests travel
    together.

    Raises TrainingDiverged before the weights move if the loss or a gradient is not finite.
    """
    topology.watchdog.heartbeat()  # the data is there
    added, divisors = add_gradients(topology, policy, objective, settings, batches, totals)
    norm = topology.clip(policy.model, max_grad_norm)
    own_norm = norm if topology.is_main and norm is not None else 0.0  # the same on all processes
    others = [own_norm, *map(float, requests())]
    added = sorted(added, key=lambda term: term.name)  # each process may add them in another order
    means, (grad_norm, *requested) = means_over_processes(topology, added, divisors, others)
    loss, moved = loss_of(added, means), False
    if math.isfinite(loss):
        set_lr(optimizer, lr)
        grad_norm, moved = topology.step(policy.model, optimizer, grad_norm)
    # fp16 gradients may overflow without divergence: the scaler skips the step and scales less.
    if not math.isfinite(loss) or not (moved or topology.scales_gradients):
        grad_norm = math.nan if norm is None and not math.isfinite(loss) else grad_norm
        norms = f"gradient norm {grad_norm:.4g}, learning rate {lr:g}"
        raise TrainingDiverged(f"loss {loss:.4g}, {norms}")
    made = tuple(request > 0 for request in requested)
    counts = totals["input_tokens"], totals["tokens"]
    return StepResult(loss, means, grad_norm, *counts, skipped=not moved, requests=made)
