"""What a step moves, and a checkpoint holds."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from finetune.engine.ema import Ema
from finetune.engine.progress import Progress


@dataclass
class TrainState:
    """Model and optimizer, shared between processes, the average of the weights if there is one, and how far it is."""

    model: nn.Module
    optimizer: Any
    num_trainable: int
    num_parameters: int
    frozen: str
    """Fingerprint of the weights that do not train."""
    start: str
    """Fingerprint of all weights before the first step."""
    products: tuple[int, int]
    """(trained, frozen) parameters that a token is multiplied with."""
    code: str
    """Hash of the Python files that the model brought along."""
    ema: Ema | None = None
    progress: Progress = field(default_factory=Progress)
    num_skips: int = 0  # steps in a row that fp16 has left out

    def release(self) -> None:
        """Let go of model, optimizer and averages: what comes after the last step needs their memory."""
        del self.model, self.optimizer
        self.ema = None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the weights that count: the averages if the run keeps them."""
        return self.ema.in_place() if self.ema else nullcontext()
