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
        """Terms that have a line of their own in the logs, next to the loss."""
        return {name: mean for name, mean in self.terms.items() if name != "loss"}


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
    policy.model.train()
    prepared = _prepared(topology, policy, objective, settings, batches)
    divisors = {**totals, **as_divisors(prepared)}

    def terms(batch: Batch) -> list[Term]:
        return objective.loss(policy, batch, settings, prepared)

    added = topology.forward_backward(policy.model, batches, terms, divisors)
    norm = topology.clip(policy.model, max_grad_norm)
    own_norm = norm if topology.is_main and norm is not None else 0.0  # the same on all processes
    others = [own_norm, *map(float, requests())]
    means, (grad_norm, *requested) = _means(topology, added, divisors, others)
    loss, moved = sum(term.weight * means[term.name] for term in added), False
    if math.isfinite(loss):
        set_lr(optimizer, lr)
        grad_norm, moved = topology.step(policy.model, optimizer, grad_norm)
    # Overflowing fp16 gradients are no divergence: the scaler leaves the step out and scales less.
    if not math.isfinite(loss) or not (moved or topology.scales_gradients):
        norm_now = f"gradient norm {grad_norm:.4g}, learning rate {lr:g}"
        raise TrainingDiverged(f"loss {loss:.4g}, {norm_now}")
    made = tuple(request > 0 for request in requested)
    counts = totals["input_tokens"], totals["tokens"]
    return StepResult(loss, means, grad_norm, *counts, skipped=not moved, requests=made)


def try_pass(
    topology: Topology, policy: Policy, objective: Objective, settings: Any, batch: Batch,
    reserved: int, num_passes: int,
) -> None:  # fmt: skip
    """Run forward and backward without updating anything: does it fit beside `reserved` bytes?

    Two passes where micro-batches add up: the second runs beside all gradients. Not with DeepSpeed,
    which counts passes.
    """
    policy.model.train()
    kept = torch.empty(reserved, dtype=torch.uint8, device=topology.device)
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        batches = [topology.part(batch)] * num_passes
        prepared = _prepared(topology, policy, objective, settings, batches[:1])
        counts = {name: max(count, 1) for name, count in batch.counts.items()}

        def terms(part: Batch) -> list[Term]:
            return objective.loss(policy, part, settings, prepared)

        divisors = {**counts, **as_divisors(prepared)}
        topology.forward_backward(policy.model, batches, terms, divisors, last=False)
    policy.model.zero_grad()
    del kept


def evaluate(
    topology: Topology, policy: Policy, objective: Objective, settings: Any,
    batches: Iterable[Sequence[Batch]], totals: Counts, stop: Callable[[], bool] = bool,
) -> dict[str, float] | None:  # fmt: skip
    """Average every term over the evaluation rows, and the cross-entropy of supervised tokens.

    `eval_loss` is the objective's own; `perplexity` is the exponential of cross_entropy, in nats,
    whatever the objective. None if `stop` said so on a process: all leave after the same batch.
    """
    was_training = policy.model.training
    policy.model.eval()
    added: dict[str, Term] = {}
    divisors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for micro_batches in batches:
            topology.watchdog.heartbeat()
            if topology.any(stop()):
                policy.model.train(was_training)
                return None
            parts = [topology.part(batch) for batch in micro_batches]
            prepared = _prepared(topology, policy, objective, settings, parts)
            for name, value in prepared.items():
                divisors[name] = divisors.get(name, 0.0) + value
            for part in parts:
                batch = part.to(topology.device)
                terms = objective.evaluate(policy, batch, settings, prepared)
                if all(term.name != CROSS_ENTROPY for term in terms):
                    nll = policy(batch, {"nll"}).nll
                    terms.append(Term(CROSS_ENTROPY, nll, "tokens", weight=0.0))
                for term in terms:
                    add(added, term)
    policy.model.train(was_training)
    means, _ = _means(topology, list(added.values()), {**totals, **as_divisors(divisors)}, [])
    loss = sum(term.weight * means[term.name] for term in added.values())
    entropy = means.pop(CROSS_ENTROPY)
    means.pop("loss", None)
    perplexity = math.exp(entropy) if entropy < 700 else math.inf  # e^709 overflows
    return {
        "eval_loss": loss, **means, CROSS_ENTROPY: entropy, "perplexity": perplexity,
        "eval_tokens": float(totals["tokens"]),
    }  # fmt: skip


def _prepared(
    topology: Topology, policy: Policy, objective: Objective, settings: Any,
    batches: Sequence[Batch],
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Compute what the objective needs of the whole step before its first pass.

    Float64 scalars on the device, summed over all processes.
    """
    if not objective.prepares:  # send no batch to the device for nothing
        return {}
    with torch.no_grad():
        there = [batch.to(topology.device) for batch in batches]
        own = objective.prepare(policy, there, settings)
    return topology.processes.sum_on_device(own)


def _means(
    topology: Topology, added: Sequence[Term], divisors: Mapping[str, float | torch.Tensor],
    others: Sequence[float | torch.Tensor],
) -> tuple[dict[str, float], list[float]]:  # fmt: skip
    """(mean of each term by name, sums of `others`) over all processes; waits for the device once.

    A divisor on the device divides there; one that the host knows divides what has arrived.
    """
    on_device = [isinstance(divisors[term.per], torch.Tensor) for term in added]
    sums = [t.sum / divisors[t.per] if there else t.sum for t, there in zip(added, on_device)]
    summed = topology.sum([*sums, *others])
    means = {
        term.name: value if there else value / divisors[term.per]
        for term, there, value in zip(added, on_device, summed)
    }
    return means, summed[len(added) :]
