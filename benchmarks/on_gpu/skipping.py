"""Run train.py and leave some steps out, as fp16 does where gradients overflow.

An fp16 run that skipped steps is compared with such a run.

    python benchmarks/on_gpu/skipping.py 1,2 --config run.yaml

A skipped step counts: the next one has its own examples and its own learning rate. Only weights and
optimizer stay as they were.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train
from finetune import loop
from finetune.engine.step import StepResult


def skip(left_out: set[int]) -> None:
    """Leave weights and optimizer alone in these steps; the first is 1."""
    train_step, done = loop.train_step, 0

    def skipping(
        topology: Any, model: Any, optimizer: Any, *arguments: Any, **keywords: Any
    ) -> StepResult:
        nonlocal done
        done += 1
        if done in left_out:
            optimizer.step = lambda: None
        try:
            return train_step(topology, model, optimizer, *arguments, **keywords)
        finally:
            vars(optimizer).pop("step", None)

    loop.train_step = skipping


if __name__ == "__main__":
    skip({int(number) for number in sys.argv.pop(1).split(",")})
    sys.exit(train.main())
