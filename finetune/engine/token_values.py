"""What a policy says of each supervised token, over all processes and without gradient."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from finetune.data.batches import Batch, Batches
from finetune.engine.topology import Topology
from finetune.models.policy import Policy

PLACE = "place"  # the number of each token in the arrays of the examples
TOKENS_AT_ONCE = 1 << 24  # that processes add up together: 128 MB

Answer = Callable[[Policy, Batch], Mapping[str, torch.Tensor]]
"""(policy, micro-batch on the device) -> numbers of its supervised tokens, [S] by name."""


def logprobs_as(name: str, temperature: float = 1.0) -> Answer:
    """Return what answers with the log-probability of each token, under a name."""

    def answer(policy: Policy, batch: Batch) -> dict[str, torch.Tensor]:
        found = policy(batch, {"logprobs"}, temperature=temperature).logprobs
        assert found is not None
        return {name: found}

    return answer


def token_values(
    topology: Topology, policy: Policy, batches: Batches,
    walk: Callable[[Batches], Iterable[Batch]], answer: Answer,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Return numbers of each token of the examples' arrays, float32 [tokens] by name. Collective.

    NaN where no batch supervises a token. `walk` yields this process's micro-batches of `batches`,
    whose tokens are numbered; each process gets at least one.
    """
    size = len(batches.in_memory.examples.input.ids)
    numbers = np.arange(size, dtype=np.int32 if size < 2**31 else np.int64)
    numbered = with_column(batches, PLACE, numbers)
    sums, times = dict[str, np.ndarray](), np.zeros(size, np.uint16)
    was_training = policy.model.training
    policy.model.eval()
    try:
        for batch in walk(numbered):
            mine = topology.part(batch)
            with torch.no_grad():
                found = answer(policy, mine.to(topology.device))
            places = mine.token_columns[PLACE].numpy()
            for name, values in found.items():
                column = sums.setdefault(name, np.zeros(size, np.float32))
                column[places] += values.float().cpu().numpy()
            times[places] += 1
    finally:
        policy.model.train(was_training)
    for begin in range(0, size, TOKENS_AT_ONCE):
        part = slice(begin, begin + TOKENS_AT_ONCE)
        here = [*(sums[name][part] for name in sorted(sums)), times[part]]
        *added, times[part] = topology.processes.add_arrays(here)
        for name, values in zip(sorted(sums), added):
            sums[name][part] = values
    return {name: _means(values, times) for name, values in sums.items()}


def _means(sums: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Divide; a row that an epoch has twice may be in two micro-batches."""
    found = np.full(len(sums), np.nan, np.float32)
    np.divide(sums, times, out=found, where=times > 0, casting="unsafe")
    return found


def with_column(batches: Batches, name: str, values: np.ndarray) -> Batches:
    """Return the batches of the same sequences with one more column of tokens."""
    examples = batches.in_memory.examples
    columns = {**examples.token_columns, name: values}
    return batches.with_examples(replace(examples, token_columns=columns))
