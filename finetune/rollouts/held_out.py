"""What completions of held-out prompts are worth."""

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

        def work(members: Members = members) -> list[Group] | None:
            try:
                if not (members or collector.together):
                    return []
                drawn = collector.drawn([EVALUATION], members)
                of = dict(members)
                scored = [
                    each.scored([r.to_json() for r in collector.rewards(each, of[each.number])])
                    for each in drawn
                ]
                return None if around.stop() else scored
            except Stopped:
                return None

        groups = topology.on_every(work)
        if topology.any(groups is None):
            return None
        found += groups or []
    everyone = [group for part in topology.processes.gather(found) for group in part]
    return phase_facts.of_held_out(sorted(everyone, key=lambda each: each.number), settings)
