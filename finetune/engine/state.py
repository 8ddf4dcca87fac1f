"""What a step moves, and a checkpoint holds."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from finetune.engine.ema import Ema
from finetune.engine.progress import Progress
from finetune.errors import TrainingDiverged
from finetune.models.build import Facts

MOST_SKIPS = (
    25  # fp16 halves its scale at each overflow: 25 halvings from 2^16 leave nothing to scale
)


@dataclass
class TrainState:
    """Model and optimizer, shared between processes, the average of the weights if there is one,
    and how far it is.
    """

    model: nn.Module
    optimizer: Any
    facts: Facts
    """Of the model before it was shared out and trained."""
    ema: Ema | None = None
    progress: Progress = field(default_factory=Progress)
    num_skips: int = 0  # steps in a row that fp16 has left out

    def count_skips(self, skipped: bool) -> None:
        """Raise TrainingDiverged once fp16 has left out so many steps in a row that its scale is
        used up.
        """
        self.num_skips = self.num_skips + 1 if skipped else 0
        if self.num_skips == MOST_SKIPS:
            raise TrainingDiverged(
                f"fp16 gradients overflowed {MOST_SKIPS} times in a row; use bf16"
            )

    def release(self) -> None:
        """Let go of model, optimizer and averages: what comes after the last step needs their
        memory.
        """
        del self.model, self.optimizer
        self.ema = None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that count: the averages if the run keeps them."""
        return self.ema.in_place() if self.ema else nullcontext()
