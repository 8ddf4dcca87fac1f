"""What the policy says of the tokens of groups, in the micro-batches of the update.

In another micro-batch 16 bits move a log-probability by up to 0.2 nats, and the first ratio would
not be 1.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from finetune.data.batches import Batch, Batches
from finetune.engine.token_values import logprobs_as, token_values
from finetune.models.policy import Policy
from finetune.rollouts import group_examples
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.phases import Group


def of_phase(
    asked: Asked, around: Around, phase: int, chosen: Sequence[Group]
) -> dict[str, np.ndarray]:
    """Return what an objective asks of each token that is learned, [S] by name. Collective.

    `chosen`: the groups that are learned from.
    """
    topology = around.topology
    batches = asked.batches_of(phase, chosen, {})
    wanted = around.objective.scored_by(around.settings)
    temperature = around.settings.rollouts.temperature

    def walk(numbered: Batches) -> Iterator[Batch]:
        for step in range(batches.steps):
            topology.watchdog.heartbeat(f"the log-probabilities of phase {phase + 1}")
            yield from numbered.at(step)

    def answers(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        given = policy(batch, wanted, temperature=temperature)
        named = {group_examples.OLD: given.logprobs, "old_values": given.values}
        return {name: values for name, values in named.items() if values is not None}

    found = dict[str, np.ndarray]()
    if wanted:
        found = token_values(topology, around.policy(), batches, walk, answers)
    if around.reference is not None:
        of_reference = logprobs_as("reference", temperature)
        with around.reference() as before:
            found |= token_values(topology, before, batches, walk, of_reference)
    if around.teacher is not None:
        of_teacher = logprobs_as("teacher", temperature)
        found |= token_values(topology, around.teacher, batches, walk, of_teacher)
    is_learned = batches.in_memory.examples.supervised
    return {name: values[is_learned] for name, values in found.items()}


def of_group(asked: Asked, around: Around, group: Group) -> np.ndarray:
    """Return the policy's log-probabilities of the completions of a group, [S]. Collective."""
    batches = asked.batches_of(0, [group], {})

    def walk(numbered: Batches) -> Iterator[Batch]:
        for step in range(batches.steps):
            yield from numbered.at(step)

    answers = logprobs_as("logprobs", around.settings.rollouts.temperature)
    found = token_values(around.topology, around.policy(), batches, walk, answers)
    return found["logprobs"][batches.in_memory.examples.supervised]
