"""Train several runs one after another in the processes of one launch.

    accelerate launch tests/distributed/many_runs.py A.yaml B.yaml forget:runs/b:3 B.yaml \\
        break:one_shard C.yaml

Most of a small run is the start of its processes. `forget:DIR:STEP` keeps a copy of a run and takes
it back to the checkpoint of a step, as if the machine had gone after it; `break:NAME` breaks the
next run on purpose, so that the tests of the others are seen to fail; `topology:NAME` has all that
follow share the model in another way, `topology:NAME:FLAG:VALUE` with a flag of the launcher.
"""

import dataclasses
import functools
import os
import shutil
import sys
from pathlib import Path

import torch
from conftest import forget_process_state
from faults.forked import forget

from finetune import config as configs
from finetune import loop
from finetune.engine.topology import Topology, fsdp
from finetune.forecast import choice
from finetune.objectives import base
from finetune.objectives.sft import Sft
from finetune.survival import launcher
from finetune.survival.preemption import StopFlag


def main() -> None:
    asked_by_launcher = dict(os.environ)
    # The processes stay together for the next run.
    Topology.close = lambda self: self.accelerator.free_memory()
    mends = []
    for argument in sys.argv[1:]:
        if argument.startswith("forget:"):
            if os.environ.get("RANK", "0") == "0":
                run, step = argument.split(":")[1:]
                shutil.copytree(run, whole_of(Path(run)))
                forget(Path(run), int(step))
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
        elif argument.startswith("break:"):
            mends.append(BREAKS[argument.removeprefix("break:")]())
        elif argument.startswith("topology:"):
            name, *flags = argument.split(":")[1:]
            asked_by_launcher = environment_of(name, flags, asked_by_launcher)
        else:
            for name in [name for name in os.environ if name.startswith(OF_A_TOPOLOGY)]:
                del os.environ[name]
            os.environ.update(asked_by_launcher)
            forget_process_state()
            loop.run(*configs.parse(["--config", argument]), StopFlag())
            while mends:
                mends.pop()()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


OF_A_TOPOLOGY = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def environment_of(
    topology: str, flags: list[str], asked_by_launcher: dict[str, str]
) -> dict[str, str]:
    """Return the launcher's environment for another topology, with the same rendezvous."""
    file = ["--config_file", f"accelerate_configs/{topology}.yaml"]
    words = [*file, *flags, "--num_processes", os.environ["WORLD_SIZE"], "train.py"]
    planned = launcher.read(words)[0][int(os.environ["RANK"])]
    mine = {name: value for name, value in planned.items() if name.startswith(OF_A_TOPOLOGY)}
    return {n: v for n, v in asked_by_launcher.items() if not n.startswith(OF_A_TOPOLOGY)} | mine


def whole_of(run: Path) -> Path:
    """Where the copy of a run is that `forget` took back."""
    return run.with_name(f"{run.name}-whole")


def instead(owner: object, name: str, value: object) -> functools.partial:
    """Replace an attribute and return a function that restores it."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    return functools.partial(setattr, owner, name, old)


def forgotten_factor() -> functools.partial:
    """The mean of gradients over processes that every library takes, not undone."""
    right = base.total

    def wrong(terms, divisors):
        return right(terms, divisors) / int(os.environ["WORLD_SIZE"])

    return instead(base, "total", wrong)


def mean_of_means() -> functools.partial:
    """Each process divides by the tokens of its own, and the results are averaged."""
    right = loop.train_step

    def wrong(topology, policy, optimizer, objective, settings, batches, totals, **keywords):
        own, everyone = sum(batch.counts["tokens"] for batch in batches), totals["tokens"]

        class Wrong(Sft):
            def loss(self, policy, batch, settings, prepared):
                [term] = super().loss(policy, batch, settings, prepared)
                return [
                    dataclasses.replace(
                        term, sum=term.sum * everyone / max(own, 1) / topology.num_processes
                    )
                ]

        return right(topology, policy, optimizer, Wrong(), settings, batches, totals, **keywords)

    return instead(loop, "train_step", wrong)


def one_shard() -> functools.partial:
    """What one process holds, saved as if it were all."""

    def full(self, parameters):
        for name, parameter in parameters:
            own = torch.zeros(parameter.shape, dtype=parameter.dtype)
            local = parameter.to_local().detach()
            own[: local.shape[0]] = local
            yield name, own

    return instead(fsdp.Fsdp2, "full", full)


def no_room() -> functools.partial:
    """A process without memory to sample with whole weights: no error, but slow."""
    return instead(choice, "room_here", lambda device: 0.0)


ALL = (forgotten_factor, mean_of_means, one_shard, no_room)
BREAKS = {each.__name__: each for each in ALL}

if __name__ == "__main__":
    main()
