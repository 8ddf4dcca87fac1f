"""Prompts by phase and step: what is known of a run before it has sampled anything."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from finetune.data.batches import Batch, Batches
from finetune.data.order import Sequences
from finetune.rollouts import group_examples
from finetune.rollouts.phases import Group
from finetune.rollouts.prompts import PromptExamples


class Asked(Batches):
    """The prompts of each phase, with the face of a run's batches.

    A phase asks as many prompts as its steps learn from. The last phase of an epoch may have fewer,
    and then fewer steps. `sequences` are prompts; `global_batch_size` counts completions.
    """

    def __init__(self, sequences: Sequences, objective: Any, settings: Any, **common: Any) -> None:
        """`settings`: those of the objective."""
        super().__init__(sequences, **common)
        self.objective, self.settings = objective, settings
        self.rollouts = rollouts = settings.rollouts
        self.prompts_per_step = self.global_batch_size // rollouts.group_size
        self.prompts_per_phase = self.prompts_per_step * rollouts.steps_per_phase

    @property
    def prompts(self) -> PromptExamples:
        examples = self.in_memory.examples
        assert isinstance(examples, PromptExamples)
        return examples

    @property
    def phases_per_epoch(self) -> int:
        return -(-len(self.sequences) // self.prompts_per_phase)

    @property
    def steps_per_epoch(self) -> int:
        full = self.rollouts.steps_per_phase * self.rollouts.passes
        last = self.phases_per_epoch - 1
        return last * full + self.passes_and_steps(last)[0] * self.passes_and_steps(last)[1]

    def passes_and_steps(self, phase: int) -> tuple[int, int]:
        """Return (how often a phase is learned from, the steps of each time)."""
        return self.rollouts.passes, -(-self.num_prompts(phase) // self.prompts_per_step)

    def num_prompts(self, phase: int) -> int:
        done = phase % self.phases_per_epoch * self.prompts_per_phase
        return min(self.prompts_per_phase, len(self.sequences) - done)

    def phase_of(self, step: int) -> tuple[int, int]:
        """Return (the phase of a step, the number of the step in it)."""
        epoch, number = divmod(step, self.steps_per_epoch)
        full = self.rollouts.steps_per_phase * self.rollouts.passes
        phase = min(number // full, self.phases_per_epoch - 1)
        return epoch * self.phases_per_epoch + phase, number - phase * full

    def first_step(self, phase: int) -> int:
        """Return the steps before a phase."""
        epoch, number = divmod(phase, self.phases_per_epoch)
        full = self.rollouts.steps_per_phase * self.rollouts.passes
        return epoch * self.steps_per_epoch + number * full

    def of_phase(self, phase: int) -> np.ndarray:
        """Return the prompts of a phase, in the order in which their rows come in its epoch."""
        epoch, number = divmod(phase, self.phases_per_epoch)
        known = self._order
        if known is None or known[0] != epoch:
            known = (epoch, self.in_memory.order(self.seed, epoch, self.prompts_per_phase, False))
            self._order = known
        found: np.ndarray = known[1][self._part(number, self.prompts_per_phase)]
        return found

    def further(self, phase: int) -> Iterator[int]:
        """Yield the prompts that a phase asks in place of those without signal, once each."""
        own = set(self.of_phase(phase).tolist())
        drawn = np.random.default_rng([self.seed, 0xD5, phase]).permutation(len(self.sequences))
        yield from (number for number in drawn.tolist() if number not in own)

    def of_step(self, step: int) -> np.ndarray:
        """Return the prompts whose completions a step learns from, where all have a signal."""
        phase, number = self.phase_of(step)
        _, steps = self.passes_and_steps(phase)
        return self.of_phase(phase)[self._part(number % steps, self.prompts_per_step)]

    @staticmethod
    def _part(number: int, size: int) -> slice:
        return slice(number * size, (number + 1) * size)

    def size_of(self, step: int) -> int:
        """Return how many completions a step learns from, where none is left out."""
        return len(self.of_step(step)) * self.rollouts.group_size

    def turn(self, step: int) -> tuple[int, int]:
        return divmod(step, self.steps_per_epoch)

    def totals(self, step: int) -> dict[str, int]:
        raise NotImplementedError("completions are counted once they are sampled")

    def all_totals(self) -> dict[str, int]:
        raise NotImplementedError("completions are counted once they are sampled")

    def _blank(self) -> "PhaseBatches":
        """Return the largest completions that a micro-batch may hold, of made-up tokens."""
        longest = np.argsort(-self.in_memory.lengths, kind="stable")[: self.micro_batch_size]
        ids = [self.prompts.ids(each) for each in longest]
        made = group_examples.blank(ids, self.objective, self.settings, self.pad_id)
        return self.learning_from(Sequences(made, False, 0, 0), 1)

    def largest(self) -> Batch:
        blank = self._blank()
        return blank._collated(np.arange(min(self.micro_batch_size, len(blank.sequences))))

    def filler(self) -> Batch:
        return self._blank().filler()

    def batches_of(
        self, phase: int, groups: Sequence[Group], columns: Mapping[str, np.ndarray]
    ) -> "PhaseBatches":
        """Return the batches of groups for the steps of a phase. columns: [S] by name."""
        examples = group_examples.examples_of(groups, self.rollouts, columns)
        sequences = Sequences(examples, False, 0, 0)
        return self.learning_from(sequences, self.passes_and_steps(phase)[1])

    def learning_from(self, sequences: Sequences, steps: int) -> "PhaseBatches":
        """Return the batches of a phase's completions: as many steps, again and again."""
        return PhaseBatches(
            sequences, steps, seed=self.seed, global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size, rank=self.rank,
            num_processes=self.num_processes, padded=self.padded, pad_id=self.pad_id,
        )  # fmt: skip


class PhaseBatches(Batches):
    """The completions of one phase, in equal parts for its steps."""

    def __init__(self, sequences: Sequences, steps: int, **common: Any) -> None:
        super().__init__(sequences, **common)
        self.steps = steps

    def of_step(self, step: int) -> np.ndarray:
        parts = np.array_split(np.arange(len(self.sequences)), self.steps)
        return parts[step % self.steps]

    def turn(self, step: int) -> tuple[int, int]:
        return 0, step

    def at(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of a step; at least one, perhaps a filler."""
        return super().at(step) or [self.filler()]

    def totals(self, step: int) -> dict[str, int]:
        """Count what a step is divided by; 1 in place of 0, as where all completions are masked."""
        members = self.of_step(step)
        counts = (
            self.in_memory.examples.counts(members)
            if len(members)
            else dict.fromkeys(("tokens", "documents", "examples", "input_tokens"), 0)
        )
        return {name: max(1, count) for name, count in counts.items()}
