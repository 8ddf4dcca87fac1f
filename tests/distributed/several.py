"""Several runs one after the other in the processes of one launch: `accelerate launch tests/distributed/several.py A.yaml B.yaml`.

Most of a small run is the start of its processes. Each config goes through train.py's own `run`.
"""

import os
import sys

import torch
from conftest import forget_process_state

import train
from finetune import config as configs
from finetune.engine.preemption import StopFlag
from finetune.engine.topology import Topology


def main() -> None:
    asked_by_launcher = dict(os.environ)
    Topology.close = lambda self: self.accelerator.free_memory()  # the processes stay together for the next run
    for path in sys.argv[1:]:
        os.environ.update(asked_by_launcher)
        forget_process_state()
        train.run(*configs.parse(["--config", path]), StopFlag())
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
