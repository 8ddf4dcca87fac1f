"""The state that a step changes and a checkpoint holds."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from finetune.engine.ema import Ema
from finetune.engine.progress import Progress
from finetune.errors import TrainingDiverged
from finetune.models.build import Facts

MOST_SKIPS = 25  # fp16 halves its scale at each overflow: 25 halvings from 2^16 leave nothing


@dataclass
class TrainState:
    """Model and optimizer, shared between processes, averages of the weights, and progress."""

    model: nn.Module
    optimizer: Any
    facts: Facts
    """Of the model before sharding and training."""
    ema: Ema | None = None
    progress: Progress = field(default_factory=Progress)
    num_skips: int = 0  # steps in a row that fp16 has skipped

    def count_skips(self, skipped: bool) -> None:
        """Raise TrainingDiverged after MOST_SKIPS skipped steps in a row."""
        self.num_skips = self.num_skips + 1 if skipped else 0
        if self.num_skips == MOST_SKIPS:
            raise TrainingDiverged(
                f"step {self.progress.step + 1}: fp16 gradients overflowed {MOST_SKIPS} times in a "
                "row; use bf16"
            )

    def release(self) -> None:
        """Free model, optimizer and averages: the export's verification needs their memory."""
        del self.model, self.optimizer
        self.ema = None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the averages as its weights, if the run keeps them."""
        return self.ema.in_place() if self.ema else nullcontext()
