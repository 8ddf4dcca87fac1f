"""The groups of a phase, sampled and scored a shard of prompts at a time.

Shards, which the config fixes, go to processes in turn, so the number of processes changes nothing.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from finetune.generation import generate
from finetune.rollouts import group_examples
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.collecting import Collector, Members, shards_of
from finetune.rollouts.phases import Group, PhaseFiles, ShardFile
from finetune.rollouts.sampling import Stopped

Shard = tuple[int, Members]
"""Its number in the phase, and its prompts."""


class PhaseSampler:
    """Samples and scores the groups of phases, each shard on one process."""

    def __init__(self, asked: Asked, around: Around, files: PhaseFiles) -> None:
        self.asked, self.around, self.files = asked, around, files
        self.settings = around.settings.rollouts
        self.collector = Collector(around, asked.prompts, asked.seed, self.settings.group_size)

    def sampled(self, phase: int) -> list[Group] | None:
        """Return all groups of a phase, sampled and scored; None if a request to stop came.

        Collective. What is recorded is neither sampled nor asked again.
        """
        wanted = self.asked.of_phase(phase).tolist()
        size, others = self.settings.shard_size, self.asked.further(phase)
        left = int(self.settings.dynamic_sampling * len(wanted))
        asked, shards = len(wanted), shards_of(list(enumerate(wanted)), size)
        groups = self._collected(phase, list(enumerate(shards)), asked)
        while groups is not None and left:
            missing = len(wanted) - sum(
                each.is_scored and group_examples.has_signal(each, self.settings) for each in groups
            )
            more = [number for number, _ in zip(others, range(min(missing, left)))]
            if not more:
                break
            new = shards_of(list(enumerate(more, asked)), size)
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
        groups = topology.on_main(lambda: self.files.recorded(phase, self.around.of_phase(phase)))
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
        return ShardFile(self.files.partial(phase), shard[0], self.around.of_phase(phase))

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
                    file.scored(number, [each.to_json() for each in rewards])
            note(self.settings.group_size)
        return True


def _failed(group: Group, reason: str) -> Group:
    """Return a group with why it has no rewards."""
    if group.is_scored or not reason:
        return group
    return replace(group, rollouts=tuple(replace(each, reason=reason) for each in group.rollouts))
