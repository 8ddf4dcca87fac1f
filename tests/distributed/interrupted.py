"""Run train.py, and end one process as ENDS says.

ENDS: PLACE:COUNT:SIGNAL, such as rollout:3:9, the signal that the last process gets when it comes
to a place for the n-th time.
"""

import os

import train
from finetune.engine.topology import Topology
from finetune.evaluation.judges.weights import Kept
from finetune.rollouts.collecting import Collector
from finetune.rollouts.rollouts import Rollouts

PLACES = {
    "judge": (Kept, "_append"),
    "rollout": (Collector, "rewards"),
    "sealed": (Rollouts, "_open"),
    "step": (Topology, "clip"),  # with gradients, and before the weights move
}


def main() -> int:
    place, count, number = os.environ["ENDS"].split(":")
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        owner, name = PLACES[place]
        action, calls = getattr(owner, name), list[None]()

        def ending(*arguments):
            calls.append(None)
            if len(calls) == int(count):
                os.kill(os.getpid(), int(number))
            return action(*arguments)

        setattr(owner, name, ending)
    return train.main()
