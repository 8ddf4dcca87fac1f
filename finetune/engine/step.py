"""One optimizer step, normalised over all micro-batches and processes; one evaluation pass."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune.data.batches import Batch, Counts
from finetune.engine.optim import set_lr
from finetune.engine.topology import Topology
from finetune.errors import TrainingDiverged
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term, add, as_divisors
from finetune.objectives.sft import CROSS_ENTROPY


@dataclass(frozen=True)
class StepResult:
    """Of a step over all processes. loss: weighted sum of the means of all terms; terms: these means, by name.

    grad_norm: before clipping. tokens: all of them. skipped: fp16 gradients overflowed under their scale, so the weights
    stayed. requests: which of those that processes may make (stop, save) any process has made.
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
        """Terms that have a line of their own in the logs, next to the loss."""
        return {name: mean for name, mean in self.terms.items() if name != "loss"}


def train_step(
    topology: Topology, policy: Policy, optimizer: Any, objective: Objective, settings: Any, batches: Sequence[Batch], totals: Counts, *,
    lr: float, max_grad_norm: float | None, requests: Callable[[], Sequence[bool]] = tuple,
) -> StepResult:  # fmt: skip
    """Move the weights once.

    The gradient is that of the sum, over the objective's terms, of weight x (sum over all micro-batches and
    processes) / (total of the same). Totals are known before the first pass, so each micro-batch's sums are divided
    by those of the whole step, and simply add up. The host waits for the device once, before the optimizer moves:
    sums, gradient norm and requests travel together.

    Raises TrainingDiverged before the weights move if the loss or a gradient is not finite.
    """
    topology.watchdog.heartbeat()  # the data is there
    policy.model.train()
    prepared = _prepared(topology, policy, objective, settings, batches)
    divisors = {**totals, **as_divisors(prepared)}

    def terms(batch: Batch) -> list[Term]:
        return objective.loss(policy, batch, settings, prepared)

    added = topology.forward_backward(policy.model, batches, terms, divisors)
    norm = topology.clip(policy.model, max_grad_norm)
    own_norm = norm if topology.is_main and norm is not None else 0.0  # the same on all, so sent by one
    means, (grad_norm, *requested) = _means(topology, added, divisors, [own_norm, *map(float, requests())])
    loss, moved = sum(term.weight * means[term.name] for term in added), False
    if math.isfinite(loss):
        set_lr(optimizer, lr)
        grad_norm, moved = topology.step(policy.model, optimizer, grad_norm)
    # Overflowing fp16 gradients are no divergence: the scaler leaves the step out and scales less.
    if not math.isfinite(loss) or not (moved or topology.scales_gradients):
        raise TrainingDiverged(f"loss {loss:.4g}, gradient norm {grad_norm:.4g}, learning rate {lr:g}")
    return StepResult(
        loss, means, grad_norm, totals["input_tokens"], totals["tokens"], not moved, tuple(r > 0 for r in requested)
    )


def _prepared(
    topology: Topology, policy: Policy, objective: Objective, settings: Any, batches: Sequence[Batch]
) -> dict[str, torch.Tensor]:
    """What the objective needs of the whole step before its first pass, float64 scalars on the device, over all processes."""
    with torch.no_grad():
        own = objective.prepare(policy, [batch.to(topology.device) for batch in batches], settings)
    return topology.processes.sum_on_device(own)


def _means(
    topology: Topology, added: Sequence[Term], divisors: Mapping[str, float | torch.Tensor], others: Sequence[float | torch.Tensor]
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """(mean of each term by name, sums of other values) over all processes, with one wait for the device."""
    on_device = [isinstance(divisors[term.per], torch.Tensor) for term in added]
    sums = [term.sum / divisors[term.per] if there else term.sum for term, there in zip(added, on_device)]
    summed = topology.sum([*sums, *others])
    means = {
        term.name: value if there else value / divisors[term.per]
        for term, there, value in zip(added, on_device, summed)
    }
    return means, summed[len(added) :]


def try_pass(
    topology: Topology, policy: Policy, objective: Objective, settings: Any, batch: Batch, *, reserved: int, num_passes: int
) -> None:  # fmt: skip
    """Run forward and backward without updating anything, to check that the batch fits next to `reserved` bytes.

    Two passes where micro-batches add up: the second is next to all gradients. Not with DeepSpeed, which counts passes.
    """
    policy.model.train()
    kept = torch.empty(reserved, dtype=torch.uint8, device=topology.device)
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        batches = [topology.part(batch)] * num_passes
        prepared = _prepared(topology, policy, objective, settings, batches[:1])
        divisors = {**{name: max(count, 1) for name, count in batch.counts.items()}, **as_divisors(prepared)}
        topology.forward_backward(
            policy.model, batches, lambda part: objective.loss(policy, part, settings, prepared), divisors, last=False
        )
    policy.model.zero_grad()
    del kept


def evaluate(
    topology: Topology, policy: Policy, objective: Objective, settings: Any, batches: Iterable[Sequence[Batch]], totals: Counts,
    stop: Callable[[], bool] = bool,
) -> dict[str, float] | None:  # fmt: skip
    """Means of every term over the evaluation rows, and of the cross-entropy of their supervised tokens.

    `eval_loss` is the objective's own; `perplexity` the exponential of cross_entropy, in nats, whatever is learned. None
    if `stop` said so on one of the processes: all leave after the same batch.
    """
    was_training = policy.model.training
    policy.model.eval()
    added: dict[str, Term] = {}
    own_totals: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for micro_batches in batches:
            topology.watchdog.heartbeat()
            if topology.any(stop()):
                policy.model.train(was_training)
                return None
            parts = [topology.part(batch) for batch in micro_batches]
            prepared = _prepared(topology, policy, objective, settings, parts)
            for name, value in prepared.items():
                own_totals[name] = own_totals[name] + value if name in own_totals else value
            for part in parts:
                there = part.to(topology.device)
                terms = objective.evaluate(policy, there, settings, prepared)
                if all(term.name != CROSS_ENTROPY for term in terms):
                    nll = policy(there, {"nll"}).nll
                    assert nll is not None
                    terms.append(Term(CROSS_ENTROPY, nll, "tokens", weight=0.0))
                for term in terms:
                    add(added, term)
    policy.model.train(was_training)
    means, _ = _means(topology, list(added.values()), {**totals, **as_divisors(own_totals)}, [])
    loss = sum(term.weight * means[term.name] for term in added.values())
    others = {name: mean for name, mean in means.items() if name not in ("loss", CROSS_ENTROPY)}
    mean = means[CROSS_ENTROPY]
    return {
        "eval_loss": loss, **others, CROSS_ENTROPY: mean, "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "eval_tokens": float(totals["tokens"]),
    }  # fmt: skip
