"""Passes that update nothing: an evaluation, and the trial of a micro-batch's size."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from finetune.data.batches import Batch, Counts
from finetune.engine.step import add_gradients
from finetune.engine.terms import (
    logged,
    loss_of,
    means_over_processes,
    prepared_over_processes,
)
from finetune.engine.topology import Topology
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term, add, as_divisors, with_blank_reference
from finetune.objectives.sft import CROSS_ENTROPY


def try_pass(
    topology: Topology, policy: Policy, objective: Objective, settings: Any, batch: Batch,
    reserved: int, num_passes: int,
) -> None:  # fmt: skip
    """Run forward and backward without updating anything: does it fit beside `reserved` bytes?

    Two passes where micro-batches add up: the second runs beside all gradients. Not with DeepSpeed,
    which counts passes.
    """
    kept = torch.empty(reserved, dtype=torch.uint8, device=topology.device)
    devices = [topology.device] if topology.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        batches = [topology.part(with_blank_reference(batch))] * num_passes
        totals = {name: max(count, 1) for name, count in batch.counts.items()}
        add_gradients(topology, policy, objective, settings, batches, totals, last=False)
    policy.model.zero_grad()
    del kept


def _terms(
    policy: Policy, objective: Objective, settings: Any, batch: Batch,
    prepared: Mapping[str, torch.Tensor],
) -> list[Term]:  # fmt: skip
    """Return the objective's terms, and the cross-entropy of all supervised tokens alike."""
    if objective.reports_cross_entropy and batch.weights is None:
        return objective.evaluate(policy, batch, settings, prepared)
    # First: an objective of a user's own may change the batch.
    nll = policy(replace(batch, weights=None), {"nll"}).nll
    assert nll is not None
    found = objective.evaluate(policy, batch, settings, prepared)
    others = [term for term in found if term.name != CROSS_ENTROPY]
    return [*others, Term(CROSS_ENTROPY, nll, "tokens", weight=0.0)]


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
            prepared = prepared_over_processes(topology, policy, objective, settings, parts)
            for name, value in prepared.items():
                divisors[name] = divisors.get(name, 0.0) + value
            for part in parts:
                batch = part.to(topology.device)
                for term in _terms(policy, objective, settings, batch, prepared):
                    add(added, term)
    policy.model.train(was_training)
    means, _ = means_over_processes(
        topology,
        sorted(added.values(), key=lambda term: term.name),
        {**totals, **as_divisors(divisors)},
        [],
    )
    loss = loss_of(added.values(), means)
    entropy = means.pop(CROSS_ENTROPY, None)
    found = {"eval_loss": loss, **logged(means, loss)}
    if entropy is not None:
        perplexity = math.exp(entropy) if entropy < 700 else math.inf  # e^709 overflows
        found |= {CROSS_ENTROPY: entropy, "perplexity": perplexity}
    return found | {"eval_tokens": totals["tokens"]}
