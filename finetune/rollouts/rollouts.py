"""Phases of a run: sampled by the policy, scored, written, and only then learned from.

    if rollouts.ready(step):                # False: a request to stop came
        batches, totals = rollouts.at(step)

A phase grows on the disk (`phases`) as it is sampled and scored (`phase_sampler`). Before it is
sealed, the policy says of each token how likely it finds it (`policy_values`). A sealed phase is
never sampled again: a step is a function of the file and of the weights.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.data.batches import Batch, Counts
from finetune.errors import RunDirectoryError
from finetune.rollouts import group_examples, held_out, phase_facts, policy_values
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked, PhaseBatches
from finetune.rollouts.hand_over import handed_over
from finetune.rollouts.phase_sampler import PhaseSampler
from finetune.rollouts.phases import Group, PhaseFiles

Sealed = tuple[Mapping[str, Any], list[Group]]
"""What a file says of a phase, and its groups."""


class Rollouts:
    """The batches of a run that samples: the face of `data.prefetch`, a phase at a time."""

    def __init__(self, asked: Asked, around: Around) -> None:
        self.asked, self.around, self.settings = asked, around, around.settings.rollouts
        self.files = PhaseFiles(around.run)
        self.sampler = PhaseSampler(asked, around, self.files)
        self.facts: dict[str, float] = {}
        """What the logs say of the phase that is learned from."""
        self._phase = -1
        self._batches: PhaseBatches | None = None
        self._places = list[str]()

    def ready(self, step: int) -> bool:
        """Sample, score and seal the phase of a step, unless it is there. Collective.

        Return False if a request to stop ended it; what is recorded stays.
        """
        phase, _ = self.asked.phase_of(step)
        if phase == self._phase:
            return True
        found: Sealed | None = self.around.topology.on_main(lambda: self._read(phase))
        if found is None:
            self._require_first(phase, step)
            began = time.monotonic()
            with handed_over(self.asked, self.around, f"phase-{phase + 1}"):
                groups = self.sampler.sampled(phase)
            if groups is None:
                return False
            found = self._sealed(phase, step, groups, time.monotonic() - began)
        self._open(phase, found)
        return True

    def at(self, step: int) -> tuple[Sequence[Batch], Counts]:
        """Return this process's micro-batches of a step, and the totals over all processes."""
        _, number = self.asked.phase_of(step)
        assert self._batches is not None, "ready comes before at"
        topology = self.around.topology
        mine = [topology.part(batch) for batch in self._batches.at(number)]
        if topology.device.type == "cuda":  # as `Prefetch`: other memory makes the host wait
            mine = [batch.pinned() for batch in mine]
        return mine, self._batches.totals(number)

    def places(self, step: int) -> list[str]:
        """Return file:line of every prompt whose completions a step learns from."""
        _, number = self.asked.phase_of(step)
        assert self._batches is not None, "ready comes before places"
        found = (self._places[each] for each in self._batches.of_step(number))
        return list(dict.fromkeys(found))

    def close(self) -> None:
        """Say how large the record is."""
        if self.around.topology.is_main and (size := self.files.total_bytes()):
            self.around.log(f"rollouts are kept in {self.files.folder}: {size / 1e6:,.3g} MB")

    # ----------------------------------------------------------------------------- sealed phases

    def _read(self, phase: int) -> Sealed | None:
        """Return a sealed phase, from this disk or the store.

        What is here is uploaded again: the attempt that sealed it may have ended before that.
        """
        path, storage = self.files.path(phase), self.around.storage
        is_here = path.exists()
        if storage and not is_here:
            storage.fetch_file(self._name_in_store(phase), path)
        found = self.files.read(phase, self.around.of_phase(phase))
        if storage and is_here:
            storage.upload_file(path, self._name_in_store(phase))
        return found

    def _name_in_store(self, phase: int) -> str:
        return f"{self.files.folder.name}/{self.files.name(phase)}"

    def _require_first(self, phase: int, step: int) -> None:
        """Raise RunDirectoryError if steps were learned from a phase that is gone.

        The weights have moved since: to sample it again would learn from other completions.
        """
        first = self.asked.first_step(phase)
        if step > first:
            raise RunDirectoryError(
                f"{self.files.path(phase)} is missing, and the weights have learned from it since "
                f"step {first}; put back a copy, or remove the checkpoints after step {first} "
                "(also in the store), from where the run samples again"
            )

    def _open(self, phase: int, found: Sealed) -> None:
        """Make the batches of a phase, from its file alone."""
        header, groups = found
        chosen = self._kept(phase, groups)
        columns, facts = group_examples.columns_of(
            chosen, self.around.objective, self.around.settings
        )
        self._phase, self._batches = phase, self.asked.batches_of(phase, chosen, columns)
        self._places = group_examples.places_of(chosen, self.settings)
        own = phase_facts.of_phase(groups, chosen, self.settings)
        self.facts = {**facts, **own, **header["speed"]}
        self.around.opened(phase, groups, self.facts)

    def _kept(self, phase: int, groups: Sequence[Group]) -> list[Group]:
        return group_examples.kept(groups, self.settings, self.asked.num_prompts(phase))

    def _sealed(self, phase: int, step: int, groups: list[Group], seconds: float) -> Sealed:
        """Let the policy score the tokens, and write the phase; upload it. Collective."""
        topology, storage = self.around.topology, self.around.storage
        chosen, compares = self._kept(phase, groups), self.around.objective.learns_rewards
        group_examples.require_some(phase, groups, chosen, self.settings, compares)
        values = policy_values.of_phase(self.asked, self.around, phase, chosen)
        groups = group_examples.with_values(groups, chosen, values, self.settings)
        tokens = sum(len(each.own_ids) for group in groups for each in group.rollouts)
        speed = {"rollout_seconds": round(seconds, 3), "rollout_tokens": tokens}
        of = self.around.of_phase(phase)
        header = {"phase": phase + 1, "of": of, "step": step, "speed": speed}

        def write() -> None:
            self.files.seal(phase, header, groups)
            if storage:
                storage.upload_file(self.files.path(phase), self._name_in_store(phase))

        topology.watchdog.pause(f"the writing of phase {phase + 1}")
        topology.on_main(write)
        return header, groups

    # -------------------------------------------------------------------------------- evaluation

    def evaluate(self, asked: Asked) -> dict[str, float] | None:
        """Return the mean reward of one completion of each held-out prompt. Collective.

        None if a request to stop ended it.
        """
        return held_out.evaluate(asked, self.around)
