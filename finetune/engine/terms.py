"""What becomes of the terms of an objective over all processes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from finetune.data.batches import Batch
from finetune.engine.topology import Topology
from finetune.models.policy import Policy
from finetune.objectives.base import Objective, Term


def logged(terms: Mapping[str, float], loss: float) -> dict[str, float]:
    """Name the means of terms as the logs do.

    A term `loss` that is not all of the loss is `loss_term`.
    """
    others = {name: mean for name, mean in terms.items() if name != "loss"}
    own = terms.get("loss", loss)
    is_all = own == loss or math.isnan(loss)
    return others if is_all else {"loss_term": own, **others}


def loss_of(terms: Iterable[Term], means: Mapping[str, float]) -> float:
    """Return the weighted sum of means; a metric counts for nothing, also where it is NaN."""
    return sum(term.weight * means[term.name] for term in terms if term.weight)


def prepared_over_processes(
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


def means_over_processes(
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
