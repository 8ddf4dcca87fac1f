"""Log-probabilities of the weights before the first step: a column of the run's tokens.

Every supervised token goes once through the policy without gradient, in the micro-batches of the
first epoch: in 16 bits another micro-batch moves a log-probability by up to 0.2 nats. The column
is a file of the run directory, and its hash is part of what a resuming run has to find. A run that
starts from an adapter compares with that adapter, as these are its weights.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from finetune import failures, files
from finetune.config.choices import REFERENCE
from finetune.data.batches import Batch, Batches
from finetune.engine.token_values import logprobs_as, token_values, with_column
from finetune.engine.topology import Topology
from finetune.errors import Preempted, RunDirectoryError
from finetune.models.policy import Policy

FILE = "reference.safetensors"


class Reference:
    """The column of the training rows, and of the evaluation rows."""

    def __init__(
        self, train: Batches, evals: Batches | None, num_steps: int, of: Mapping[str, Any]
    ) -> None:
        """`num_steps`: of the run; rows that it never reaches get no number. `of`: what it is
        computed from, by name.
        """
        self._parts, self._steps = list[Batches](), list[range]()
        for part in filter(None, (train, evals)):
            steps = min(num_steps, part.steps_per_epoch) if part is train else part.steps_per_epoch
            for each in filter(None, (part, part.mismatched)):
                self._parts.append(each)
                self._steps.append(range(steps))
        self._of = files.json_sha256({**of, "steps": [len(steps) for steps in self._steps]})
        self.values = np.zeros(0, np.float32)
        """Of all tokens of both, one after the other; NaN where nothing is supervised."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.values.data).hexdigest()

    def make(self, topology: Topology, policy: Policy, stop: Callable[[], bool]) -> None:
        """Compute it, on all processes. Raises Preempted if `stop` says so on any of them."""
        found = [
            _of_part(topology, policy, part, steps, stop)
            for part, steps in zip(self._parts, self._steps)
        ]
        self.values = np.concatenate(found)

    def read(self, path: Path) -> bool:
        """Read it from a file; return False if there is none of these rows and weights.

        Raises RunDirectoryError if the file is damaged.
        """
        if not path.exists():
            return False
        try:
            with safe_open(path, "numpy") as file:
                about, values = file.metadata() or {}, file.get_tensor(REFERENCE)
        except (OSError, SafetensorError) as exc:
            failures.reraise(exc, f"{path}: cannot be read now")
            raise _damaged(path) from exc
        if about.get("of") != self._of:
            return False
        self.values = values
        if about.get("sha256") != self.sha256:
            raise _damaged(path)
        return True

    def write(self, path: Path) -> None:
        """Write it, whole or not at all. Raises Outage if the disk fails."""
        about = {"of": self._of, "sha256": self.sha256}
        with failures.writing(path), files.replacing(path) as file:
            file.write(save({REFERENCE: self.values}, about))

    def attach(self) -> None:
        """Give the examples their parts, so that batches have them as a column of tokens."""
        begin = 0
        for part in self._parts:
            end = begin + len(part.in_memory.examples.input.ids)
            part.sequences = with_column(part, REFERENCE, self.values[begin:end]).sequences
            begin = end


def _damaged(path: Path) -> RunDirectoryError:
    return RunDirectoryError(
        f"{path} is damaged; remove it, and the run computes it again from the weights that it "
        "started from"
    )


def _of_part(
    topology: Topology, policy: Policy, batches: Batches, steps: Sequence[int],
    stop: Callable[[], bool],
) -> np.ndarray:  # fmt: skip
    """Return the log-probability of each token of the examples' arrays, float32 [tokens]."""

    def walk(numbered: Batches) -> Iterator[Batch]:
        return _watched(topology, numbered, steps, stop)

    return token_values(topology, policy, batches, walk, logprobs_as(REFERENCE))[REFERENCE]


def _watched(
    topology: Topology, batches: Batches, steps: Sequence[int], stop: Callable[[], bool]
) -> Iterator[Batch]:
    """Yield the micro-batches of this process, with progress, until `stop`."""
    quiet = None if topology.is_main else True  # None: show the bar on a terminal only
    for step in tqdm(steps, desc="reference", unit=" steps", disable=quiet, leave=False):
        topology.watchdog.heartbeat("the reference log-probabilities")
        if topology.any(stop()):
            raise Preempted(
                "stopped at the reference log-probabilities, before the first step; nothing was "
                "saved, run the same command again"
            )
        yield from batches.at(step)
