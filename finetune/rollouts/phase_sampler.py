"""The groups of a phase, sampled and scored a shard of prompts at a time.

Shards, which the config fixes, go to processes in turn, so the number of processes changes nothing.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice

from finetune.generation import generate
from finetune.rollouts import group_examples
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.collecting import Collector, Members, Shard, shards_of
from finetune.rollouts.phases import Group, PhaseFiles
from finetune.rollouts.sampling import Stopped
from finetune.rollouts.shard_file import ShardFile, recorded


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
        asked, others = self.asked.of_phase(phase).tolist(), self.asked.further(phase)
        wanted, begin = len(asked), 0
        left = int(self.settings.dynamic_sampling * wanted)
        while (groups := self._collected(phase, asked, begin)) is not None:
            missing = wanted - sum(
                each.is_scored and group_examples.has_signal(each, self.settings) for each in groups
            )
            more = list(islice(others, min(missing, left)))
            if not more:
                break
            begin, left = len(asked), left - len(more)
            asked += more
        return groups

    def _collected(self, phase: int, asked: Sequence[int], begin: int) -> list[Group] | None:
        """Sample and score the groups of prompts from number `begin` on, each shard on one process.

        Return all groups of these prompts and of those before.
        """
        topology, stop = self.around.topology, self.around.stop
        shards = shards_of(list(enumerate(asked))[begin:], self.settings.shard_size)
        rank, number = topology.data_rank, topology.num_data
        # Of processes that share sequences one samples; the others wait, or take part in passes.
        samples = topology.rank % topology.parallel.num_context == 0
        mine = [each if samples else None for each in shards[rank::number]]
        mine += [None] * (-(-len(shards) // number) - len(mine))
        title = f"rollouts of phase {phase + 1}"
        count = sum(len(each[1]) for each in mine if each) * self.settings.group_size
        with self._progress(title, count) as note:
            for shard in mine:
                topology.watchdog.heartbeat(title)
                if topology.any(stop()):
                    return None
                # Apart, as a process that fails here takes part in no pass of the others.
                file = topology.on_every(functools.partial(self._file, phase, shard))
                is_whole = topology.on_every(
                    functools.partial(self._shard, phase, shard, file, note)
                )
                if topology.any(not is_whole):
                    return None
        partial, of = self.files.partial(phase), self.around.of_phase(phase)
        groups: list[Group] = topology.on_main(lambda: recorded(partial, of))
        return [each for each in groups if each.number < len(asked)]

    def _progress(self, title: str, count: int) -> AbstractContextManager[Callable[[int], None]]:
        if not self.around.topology.is_main:
            return nullcontext(lambda count: None)
        return generate.progress(title, count, self.around.log)

    def _file(self, phase: int, shard: Shard | None) -> ShardFile | None:
        if shard is None:
            return None
        return ShardFile(self.files.partial(phase), shard[0], self.around.of_phase(phase))

    def _shard(
        self, phase: int, shard: Shard | None, file: ShardFile | None, note: Callable[[int], None]
    ) -> bool:
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
            return file is None or self._score(file, members, note)
        finally:
            if file is not None:
                file.close()

    def _score(self, file: ShardFile, members: Members, note: Callable[[int], None]) -> bool:
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
                    file.failed(number, reasons[0])
                else:
                    file.scored(number, [each.to_json() for each in rewards])
            note(self.settings.group_size)
        return True
