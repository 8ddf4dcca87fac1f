"""What completions of held-out prompts are worth."""

import functools
from collections.abc import Callable

from finetune.rollouts import phase_facts
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.collecting import Collector, Members, shards_of
from finetune.rollouts.hand_over import handed_over
from finetune.rollouts.phases import Group
from finetune.rollouts.sampling import HELD_OUT, Stopped

EVALUATION = 2**31  # of no phase


def evaluate(asked: Asked, around: Around) -> dict[str, float] | None:
    """Return the mean reward of one completion of each held-out prompt. Collective.

    Each evaluation draws by the same numbers, so that two differ by the weights alone. None if a
    request to stop ended it.
    """
    with handed_over(asked, around, "evaluation"):
        return _evaluated(asked, around)


def _evaluated(asked: Asked, around: Around) -> dict[str, float] | None:
    topology, prompts = around.topology, asked.prompts
    settings = around.settings.rollouts
    collector = Collector(around, prompts, asked.seed, 1)
    # An environment that hangs takes others of its process with it, so each prompt has its own.
    size = settings.shard_size * (1 if around.environments else HELD_OUT)
    shards = shards_of(list(enumerate(range(len(prompts)))), size)
    rank, number = topology.data_rank, topology.num_data
    samples = topology.rank % topology.parallel.num_context == 0
    found = list[Group]()
    for turn in range(-(-len(shards) // number)):
        place = turn * number + rank
        members = shards[place][1] if samples and place < len(shards) else []
        topology.watchdog.heartbeat("the rollouts of held-out prompts")
        if topology.any(around.stop()):
            return None
        groups = topology.on_every(functools.partial(_scored, collector, members, around.stop))
        if topology.any(groups is None):
            return None
        found += groups or []
    everyone = [group for part in topology.processes.gather(found) for group in part]
    return phase_facts.of_held_out(sorted(everyone, key=lambda each: each.number), settings)


def _scored(collector: Collector, members: Members, stop: Callable[[], bool]) -> list[Group] | None:
    """Sample and score a completion of each prompt; None if a request to stop came.

    No members: take part in the passes of the others, where processes share the weights.
    """
    try:
        drawn = collector.drawn([EVALUATION], members) if members or collector.together else []
    except Stopped:
        return None
    found = list[Group]()
    for group, (_, example) in zip(drawn, members):
        rewards = collector.rewards(group, example)
        if stop():  # none was waited for
            return None
        found.append(group.scored([each.to_json() for each in rewards]))
    return found
