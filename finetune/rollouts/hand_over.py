"""The hand-over of the policy's weights to what samples: whole processes, or a server, compared."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from finetune.rollouts import policy_values
from finetune.rollouts.around import Around
from finetune.rollouts.asked import Asked
from finetune.rollouts.phases import Group, Rollout
from finetune.rollouts.sampling import Drawn


@contextmanager
def handed_over(asked: Asked, around: Around, title: str) -> Iterator[None]:
    """Let what samples have the policy's weights in the block. Collective.

    Raises UserError if a server's log-probabilities of a probe are not the policy's.
    """
    topology, served, settings = around.topology, around.served, around.settings.rollouts
    if served is None:
        topology.watchdog.heartbeat("whole weights for sampling")
        with nullcontext() if around.together else topology.whole_weights(around.model()):
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
