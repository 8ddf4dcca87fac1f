"""One token-normalised optimizer step; one evaluation pass."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from finetune.data.batches import Batch
from finetune.engine.optim import set_lr
from finetune.engine.topology import Topology
from finetune.errors import TrainingDiverged
from finetune.objectives.clm import loss as cross_entropy

Loss = Callable[[Any, Batch], tuple[torch.Tensor, int]]


@dataclass(frozen=True)
class StepResult:
    """Totals over all processes. loss: mean over supervised tokens, nats; grad_norm: before clipping.

    skipped: the weights stayed, as fp16 gradients overflowed under their scale.
    """

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    skipped: bool
    wishes: tuple[bool, ...]


def train_step(
    topology: Topology, model: nn.Module, optimizer: Any, loss: Loss, batches: Sequence[Batch], *,
    lr: float, max_grad_norm: float | None, wishes: Callable[[], Sequence[bool]] = tuple,
) -> StepResult:  # fmt: skip
    """Move the weights once.

    The gradient is that of (sum of token losses over all micro-batches and processes) / (number
    of supervised tokens over the same): every micro-batch's sum is divided by the whole step's
    count before its backward pass, so sums simply add up. `wishes` of single processes (stop, save)
    are asked for at the end and travel with the loss, so that all learn of them in the same step.

    Raises TrainingDiverged before the weights move if the loss or a gradient is not finite.
    """
    topology.watchdog.beat()  # the data is there
    batches = [topology.part(batch) for batch in batches]
    supervised, tokens = topology.sum([sum(b.num_supervised for b in batches), sum(b.num_tokens for b in batches)])
    model.train()
    local = torch.zeros((), dtype=torch.float64, device=topology.device)
    for number, batch in enumerate(batches, 1):
        topology.watchdog.beat()
        with topology.accumulate(model, last=number == len(batches)):
            total, _ = loss(model, batch.to(topology.device))
            topology.backward(total / supervised)
        local += total.detach().double()
    total_loss, *wished = topology.sum([local, *map(float, wishes())])
    mean, grad_norm, moved = total_loss / supervised, math.nan, False
    if math.isfinite(mean):
        set_lr(optimizer, lr)
        grad_norm, moved = topology.move(model, optimizer, max_grad_norm)
    # Overflowing fp16 gradients are not a divergence: the scaler leaves the step out and scales less.
    if not math.isfinite(mean) or not (moved or topology.scales_gradients):
        raise TrainingDiverged(f"loss {mean:.4g}, gradient norm {grad_norm:.4g}, learning rate {lr:g}")
    return StepResult(mean, grad_norm, int(tokens), int(supervised), not moved, tuple(w > 0 for w in wished))


def attempt(topology: Topology, model: nn.Module, loss: Loss, batch: Batch, *, reserved: int, num_passes: int) -> None:
    """Run forward and backward without updating anything, to check that the batch fits next to `reserved` bytes for the optimizer.

    Run twice where micro-batches add up: the second pass runs while all gradients are in memory. DeepSpeed counts passes, so do not use it there.
    """
    model.train()
    kept = torch.empty(reserved, dtype=torch.uint8, device=topology.device)
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for _ in range(num_passes):
            with topology.accumulate(model, last=False):
                total, _ = loss(model, topology.part(batch).to(topology.device))
                topology.backward(total / max(batch.num_supervised, 1))
    model.zero_grad()
    del kept


def evaluate(
    topology: Topology,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Sequence[Batch]],
    stop: Callable[[], bool] = bool,
) -> dict[str, float] | None:
    """Means over every supervised token of the evaluation rows, sum / count over all processes: of `loss`, and of cross-entropy.

    `perplexity` is the exponential of cross_entropy, in nats, for every objective. None if `stop` said so on one of the
    processes: all leave after the same batch.
    """
    was_training = model.training
    model.eval()
    rules = [loss] if loss is cross_entropy else [loss, cross_entropy]
    totals, counts = torch.zeros(len(rules), dtype=torch.float64, device=topology.device), [0] * len(rules)
    with torch.no_grad():
        for micro_batches in batches:
            topology.watchdog.beat()
            if topology.any(stop()):
                model.train(was_training)
                return None
            for batch in map(topology.part, micro_batches):
                there = batch.to(topology.device)
                for number, rule in enumerate(rules):
                    part, count = rule(model, there)
                    totals[number] += part.double()
                    counts[number] += count
    model.train(was_training)
    summed = topology.sum([*totals, *counts])
    means = [total / count for total, count in zip(summed, summed[len(rules) :])]
    mean, tokens = means[-1], summed[-1]
    return {
        "eval_loss": means[0], "cross_entropy": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_tokens": tokens,
    }  # fmt: skip
