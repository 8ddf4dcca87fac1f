"""Every process has the whole model: one alone, or DDP."""

import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from finetune import torch_versions
from finetune.engine.topology import meta
from finetune.engine.topology.sharing import MakeOptimizer, OnMain, Sharing
from finetune.errors import ConfigError


class Replicated(Sharing):
    """One process alone, or DDP."""

    def __init__(self, accelerator: Accelerator, on_main: OnMain) -> None:
        self.accelerator, self.on_main = accelerator, on_main
        self.num_processes: int = accelerator.num_processes

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, **_: Any
    ) -> tuple[nn.Module, Any]:
        """Let DDP send the main process's weights; send buffers once, not at each pass."""
        if self.num_processes > 1:
            buffers = self.on_main(lambda: meta.buffers_of(model))
            if meta.is_empty(model):
                meta.move(model, self.accelerator.device)
            meta.put_buffers(model, buffers, self.accelerator.device)
        optimizer = make_optimizer(model)
        with warnings.catch_warnings():
            # DDP's notes on bucket views say nothing that a user could act on.
            warnings.simplefilter("ignore", UserWarning)
            torch_versions.ignore_new_names()
            model, optimizer = self.accelerator.prepare(model, optimizer)
        if self.num_processes > 1 and not isinstance(model, nn.parallel.DistributedDataParallel):
            raise ConfigError(
                f"{self.num_processes} processes were to share a model by DDP, got "
                f"{type(model).__name__}"
            )
        return model, optimizer

    def share_frozen(self, model: nn.Module) -> nn.Module:
        """Give each process a copy, whose passes get Accelerate's autocast like the model's."""
        if self.num_processes > 1:
            meta.send(model, self.on_main, self.accelerator.device)
        return self.copy_frozen(model)

    def copy_frozen(self, model: nn.Module) -> nn.Module:
        copied: nn.Module = self.accelerator.prepare_model(model, evaluation_mode=True)
        return copied

    def unwrap(self, model: Any) -> Any:
        return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the last backward pass of a step only."""
        held: AbstractContextManager[None] = self.accelerator.no_sync(model)
        return nullcontext() if last else held

    def backward(self, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def clip(self, model: nn.Module, max_norm: float) -> torch.Tensor:
        norm: torch.Tensor = self.accelerator.clip_grad_norm_(model.parameters(), max_norm)
        return norm

    def step(self, model: nn.Module, optimizer: Any, norm: float) -> tuple[float, bool]:
        # Overflowing fp16 gradients: the scaler leaves the step out and scales less from then on.
        finite = math.isfinite(norm)
        if finite or self.accelerator.scaler is not None:
            optimizer.step()
        # Under DDP gradients stay where they are, in its buckets: new ones would lie next to them
        # until the last pass of a step.
        optimizer.zero_grad(set_to_none=self.num_processes == 1)
        return norm, finite

    def full(
        self, parameters: list[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in parameters:
            yield name, parameter.detach()

    def local_shard(self, parameter: Any) -> torch.Tensor:
        own: torch.Tensor = parameter.detach()
        return own
