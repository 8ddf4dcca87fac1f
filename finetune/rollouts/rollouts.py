"""Phases of a run: sampled by the policy, scored, written, and only then learned from.

    if rollouts.ready(step):                # False: a request to stop came
        batches, totals = rollouts.at(step)

A phase grows on the disk (`phases`). Shards of prompts, which the config fixes, go to processes in
turn, so the number of processes changes nothing. Before a phase is sealed, the policy says of each
token how likely it finds it, in the micro-batches of the update: in another micro-batch 16 bits
move a log-probability by up to 0.2 nats, and the first ratio would not be 1. A sealed phase is
never sampled again: a step is a function of the file and of the weights.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from finetune.data.batches import Batch, Batches, Counts
from finetune.data.order import Sequences
from finetune.engine.token_values import logprobs_as, token_values
from finetune.errors import RunDirectoryError
from finetune.generation import generate
from finetune.models.policy import Policy
from finetune.rollouts import group_examples
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked, PhaseBatches
from finetune.rollouts.collecting import Collector, Members
from finetune.rollouts.phases import Group, PhaseFiles, Rollout, ShardFile
from finetune.rollouts.sampling import Drawn, Stopped

if TYPE_CHECKING:
    from finetune.rollouts.rewards import Reward

Shard = tuple[int, Members]
"""Its number in the phase, and its prompts."""
Sealed = tuple[Mapping[str, Any], list[Group]]
"""What a file says of a phase, and its groups."""


class Rollouts:
    """The batches of a run that samples: the face of `data.prefetch`, a phase at a time."""

    def __init__(self, asked: Asked, around: Around) -> None:
        self.asked, self.around, self.settings = asked, around, around.settings.rollouts
        self.files = PhaseFiles(around.run)
        self.collector = Collector(around, asked.prompts, asked.seed, self.settings.group_size)
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
            with self._serving(f"phase-{phase + 1}"):
                groups = self._sampled(phase)
            if groups is None:
                return False
            found = self._sealed(phase, step, groups, time.monotonic() - began)
        self._open(phase, found)
        return True

    def at(self, step: int) -> tuple[Sequence[Batch], Counts]:
        """Return this process's micro-batches of a step, and the totals over all processes."""
        _, number = self.asked.phase_of(step)
        assert self._batches is not None, "ready comes before at"
        mine = [self.around.topology.part(batch) for batch in self._batches.at(number)]
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
        found = self.files.read(phase, self._of(phase))
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

    def _of(self, phase: int) -> str:
        return f"{self.around.of} {phase}"

    def _open(self, phase: int, found: Sealed) -> None:
        """Make the batches of a phase, from its file alone."""
        header, groups = found
        chosen = self._kept(phase, groups)
        columns, facts = group_examples.columns_of(
            chosen, self.around.objective, self.around.settings
        )
        self._phase, self._batches = phase, self._batches_of(phase, chosen, columns)
        self._places = group_examples.places_of(chosen, self.settings)
        own = group_examples.facts_of(groups, chosen, self.settings)
        self.facts = {**facts, **own, **header["speed"]}
        self.around.opened(phase, groups, self.facts)

    def _kept(self, phase: int, groups: Sequence[Group]) -> list[Group]:
        return group_examples.kept(groups, self.settings, self.asked.num_prompts(phase))

    def _batches_of(
        self, phase: int, groups: Sequence[Group], columns: Mapping[str, np.ndarray]
    ) -> PhaseBatches:
        examples = group_examples.examples_of(groups, self.settings, columns)
        sequences = Sequences(examples, False, 0, 0)
        return self.asked.learning_from(sequences, self.asked.passes_and_steps(phase)[1])

    def _sealed(self, phase: int, step: int, groups: list[Group], seconds: float) -> Sealed:
        """Let the policy score the tokens, and write the phase; upload it. Collective."""
        topology, storage = self.around.topology, self.around.storage
        chosen, compares = self._kept(phase, groups), self.around.objective.learns_rewards
        group_examples.require_some(phase, groups, chosen, self.settings, compares)
        groups = self._with_values(phase, groups)
        tokens = sum(len(each.own_ids) for group in groups for each in group.rollouts)
        speed = {"rollout_seconds": round(seconds, 3), "rollout_tokens": tokens}
        header = {"phase": phase + 1, "of": self._of(phase), "step": step, "speed": speed}

        def write() -> None:
            self.files.seal(phase, header, groups)
            if storage:
                storage.upload_file(self.files.path(phase), self._name_in_store(phase))

        topology.watchdog.pause(f"the writing of phase {phase + 1}")
        topology.on_main(write)
        return header, groups

    def _with_values(self, phase: int, groups: list[Group]) -> list[Group]:
        """Return the groups with what the policy says of each token that is learned."""
        around, topology = self.around, self.around.topology
        chosen = self._kept(phase, groups)
        batches = self._batches_of(phase, chosen, {})
        wanted = around.objective.scored_by(around.settings)
        temperature = self.settings.temperature

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
        is_learned = batches.in_memory.examples.supervised
        of_tokens = {name: values[is_learned] for name, values in found.items()}
        return group_examples.with_values(groups, chosen, of_tokens, self.settings)

    # ------------------------------------------------------------------------------ at a server

    @contextmanager
    def _serving(self, title: str) -> Iterator[None]:
        """Let the server, if one samples, have the policy's weights in the block. Collective."""
        around, topology = self.around, self.around.topology
        served = around.served
        if served is None:
            yield
            return
        with served.rested(topology):
            topology.watchdog.pause("the weights of the server")
            served.hand_over(topology, f"{around.run.name}-{title}", around.save)
            ids = tuple(self.asked.prompts.ids(0).tolist())
            probe: list[Drawn] = topology.on_main(
                lambda: served.probe(ids, self.settings.max_new_tokens, self.asked.seed)
            )
            group = Group(0, "", ids, tuple(
                Rollout(each.ids, each.logprobs, "stop") for each in probe
            ))  # fmt: skip
            logprobs = self._logprobs(group)
            gap = topology.on_main(lambda: served.require_same(probe, logprobs))
            around.log(f"the server has the policy's weights: {gap:.2g} nats a token apart")
            yield

    def _logprobs(self, group: Group) -> np.ndarray:
        """Return the policy's log-probabilities of the completions of a group. Collective."""
        batches = self._batches_of(0, [group], {})

        def walk(numbered: Batches) -> Iterator[Batch]:
            for step in range(batches.steps):
                yield from numbered.at(step)

        answers = logprobs_as("logprobs", self.settings.temperature)
        found = token_values(self.around.topology, self.around.policy(), batches, walk, answers)
        return found["logprobs"][batches.in_memory.examples.supervised]

    # ---------------------------------------------------------------------------------- sampling

    def _sampled(self, phase: int) -> list[Group] | None:
        """Return all groups of a phase, sampled and scored; None if a request to stop came."""
        wanted = self.asked.of_phase(phase).tolist()
        size, others = self.settings.shard_size, self.asked.further(phase)
        left = int(self.settings.dynamic_sampling * len(wanted))
        asked, shards = len(wanted), _shards(list(enumerate(wanted)), size)
        groups = self._collected(phase, list(enumerate(shards)), asked)
        while groups is not None and left:
            missing = len(wanted) - sum(
                each.is_scored and group_examples.has_signal(each, self.settings) for each in groups
            )
            more = [number for number, _ in zip(others, range(min(missing, left)))]
            if not more:
                break
            new = _shards(list(enumerate(more, asked)), size)
            left, asked = left - len(more), asked + len(more)
            groups = self._collected(phase, list(enumerate(new, len(shards))), asked)
            shards += new
        return groups

    def _collected(self, phase: int, shards: Sequence[Shard], num_asked: int) -> list[Group] | None:
        """Sample and score shards, each on one process; return all groups of the phase so far."""
        topology, stop = self.around.topology, self.around.stop
        rank, number = topology.data_rank, topology.num_data
        # Of processes that share sequences one samples; the others wait, or take part in passes.
        samples = topology.rank % topology.parallel.num_context == 0
        mine = [each if samples else None for each in shards[rank::number]]
        mine += [None] * (-(-len(shards) // number) - len(mine))
        failed, title = dict[int, str](), f"rollouts of phase {phase + 1}"
        count = sum(len(each[1]) for each in mine if each) * self.settings.group_size
        with self._progress(title, count) as note:
            for shard in mine:
                topology.watchdog.heartbeat(title)
                if topology.any(stop()):
                    return None
                # Apart, as a process that fails here takes part in no pass of the others.
                file = topology.on_every(functools.partial(self._file, phase, shard))
                work = functools.partial(self._shard, phase, shard, file, failed, note)
                is_whole = topology.on_every(work)
                if topology.any(not is_whole):
                    return None
        groups = topology.on_main(lambda: self.files.recorded(phase, self._of(phase)))
        reasons = {n: why for each in topology.processes.gather(failed) for n, why in each.items()}
        return [
            _failed(each, reasons.get(each.number, "")) for each in groups
            if each.number < num_asked
        ]  # fmt: skip

    def _progress(self, title: str, count: int) -> AbstractContextManager[Callable[[int], None]]:
        if not self.around.topology.is_main:
            return nullcontext(lambda count: None)
        return generate.progress(title, count, self.around.log)

    def _file(self, phase: int, shard: Shard | None) -> ShardFile | None:
        if shard is None:
            return None
        return ShardFile(self.files.partial(phase), shard[0], self._of(phase))

    def _shard(
        self, phase: int, shard: Shard | None, file: ShardFile | None, failed: dict[int, str],
        note: Callable[[int], None],
    ) -> bool:  # fmt: skip
        """Sample and score what is missing of a shard; return False if a request to stop came.

        None: take part in the passes of the others, where processes share the weights.
        """
        collector, members = self.collector, [] if shard is None else list(shard[1])
        try:
            missing = file is not None and any(file.lacks(number) for number, _ in members)
            if self.around.topology.any(missing) if collector.together else missing:
                try:
                    drawn = collector.drawn([phase], members if missing else [])
                except Stopped:
                    return False
                if file is not None:
                    file.sampled([each for each in drawn if file.lacks(each.number)])
            return file is None or self._score(file, members, failed, note)
        finally:
            if file is not None:
                file.close()

    def _score(
        self, file: ShardFile, members: Members, failed: dict[int, str],
        note: Callable[[int], None],
    ) -> bool:  # fmt: skip
        """Reward the groups of a shard that have no rewards yet, one after the other."""
        for number, example in members:
            if not file.groups[number].is_scored:
                if self.around.stop():
                    return False
                rewards = self.collector.rewards(file.groups[number], example)
                reasons = [each.reason or "no reason" for each in rewards if each.total is None]
                if reasons and self.around.stop():  # none was waited for
                    return False
                if reasons:
                    failed[number] = reasons[0]
                    file.failed(number, reasons[0])
                else:
                    file.scored(number, [_as_json(each) for each in rewards])
            note(self.settings.group_size)
        return True

    # -------------------------------------------------------------------------------- evaluation

    def evaluate(self, asked: Asked) -> dict[str, float] | None:
        """Return the mean reward of one completion of each held-out prompt. Collective.

        Each evaluation draws by the same numbers, so that two differ by the weights alone. None if
        a request to stop ended it.
        """
        with self._serving("evaluation"):
            return self._evaluated(asked)

    def _evaluated(self, asked: Asked) -> dict[str, float] | None:
        topology, prompts = self.around.topology, asked.prompts
        collector = Collector(self.around, prompts, asked.seed, 1)
        # An environment that hangs takes others of its process with it, so each prompt has its own.
        size = self.settings.shard_size * (1 if self.around.environments else 8)
        shards = _shards(list(enumerate(range(len(prompts)))), size)
        rank, number = topology.data_rank, topology.num_data
        samples = topology.rank % topology.parallel.num_context == 0
        found = list[Group]()
        for turn in range(-(-len(shards) // number)):
            place = turn * number + rank
            members = shards[place] if samples and place < len(shards) else []
            topology.watchdog.heartbeat("the rollouts of held-out prompts")
            if topology.any(self.around.stop()):
                return None

            def work(members: Members = members) -> list[Group] | None:
                try:
                    if not (members or collector.together):
                        return []
                    drawn = collector.drawn([EVALUATION], members)
                    of = dict(members)
                    scored = [
                        each.scored([_as_json(r) for r in collector.rewards(each, of[each.number])])
                        for each in drawn
                    ]
                    return None if self.around.stop() else scored
                except Stopped:
                    return None

            groups = topology.on_every(work)
            if topology.any(groups is None):
                return None
            found += groups or []
        everyone = [group for part in topology.processes.gather(found) for group in part]
        return group_examples.evaluated(
            sorted(everyone, key=lambda each: each.number), self.settings
        )


EVALUATION = 2**31  # of no phase


def _as_json(reward: "Reward") -> dict[str, Any]:
    return {"reward": reward.total, "parts": dict(reward.parts), "reason": reward.reason}


def _failed(group: Group, reason: str) -> Group:
    """Return a group with why it has no rewards."""
    if group.is_scored or not reason:
        return group
    return replace(group, rollouts=tuple(replace(each, reason=reason) for each in group.rollouts))


def _shards(members: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Part (number of a prompt in its phase, example) into shards."""
    return [members[start : start + size] for start in range(0, len(members), size)]
