"""The hand-over of the policy's weights to a server, which is asked whether it has them."""

from collections.abc import Iterator
from contextlib import contextmanager

from finetune.rollouts import policy_values
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.phases import Group, Rollout
from finetune.rollouts.sampling import Drawn


@contextmanager
def handed_over(asked: Asked, around: Around, title: str) -> Iterator[None]:
    """Let the server, if one samples, have the policy's weights in the block. Collective.

    Raises UserError if its log-probabilities of a probe are not the policy's.
    """
    topology, served, settings = around.topology, around.served, around.settings.rollouts
    if served is None:
        yield
        return
    with served.rested(topology):
        topology.watchdog.pause("the weights of the server")
        served.hand_over(topology, f"{around.run.name}-{title}", around.save)
        ids = tuple(asked.prompts.ids(0).tolist())
        probe: list[Drawn] = topology.on_main(
            lambda: served.probe(ids, settings.max_new_tokens, asked.seed)
        )
        made = tuple(Rollout(each.ids, each.logprobs, "stop") for each in probe)
        logprobs = policy_values.of_group(asked, around, Group(0, "", ids, made))
        gap = topology.on_main(lambda: served.require_same(probe, logprobs))
        around.log(f"the server has the policy's weights: {gap:.2g} nats a token apart")
        yield
