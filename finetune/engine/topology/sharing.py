"""The contract of `Replicated`, `Fsdp2` and `Zero`: what a topology asks of a way to share a model.

A step calls, on every process: for each micro-batch `accumulate` around its passes and `backward`,
then `clip` and `step`. Here are what is the same for most of them, and what each must write itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
OnMain = Callable[[Callable[[], Any]], Any]
"""Do something on the main process, whose result every process gets."""


class Sharing(ABC):
    """Base of the ways to share a model. Every method is collective unless it says otherwise."""

    on_main: OnMain
    shards_frozen = False
    """Whether `share_frozen` gives each process a part of a model, not a copy."""

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, *, accumulation_steps: int,
        micro_batch_size: int, max_norm: float,
    ) -> tuple[nn.Module, Any]:  # fmt: skip
        """Move the model to the device, share it, and return it with its optimizer.

        Afterwards every process has the weights of the main process; the others may give a model
        without weights. Call `make_optimizer` when parameters are where they will be. Raises
        ConfigError if the model is not shared as the topology file asks.
        """

    @abstractmethod
    def share_frozen(self, model: nn.Module) -> nn.Module:
        """Move a model that never trains to the device, and share it as this topology can.

        Afterwards every process has the weights of the main process; the others may give a model
        without weights. Its passes compute as those of the model that trains.
        """

    @abstractmethod
    def copy_frozen(self, model: nn.Module) -> nn.Module:
        """Move a model that never trains, which each process has loaded, whole to the device.

        Its passes compute as those of the model that trains.
        """

    def unwrap(self, model: Any) -> Any:
        """Return the model inside what `prepare` returned. Not collective."""
        return model

    def accumulate(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return what surrounds the passes of a micro-batch; `last`: of the step's last one.

        By default processes exchange gradients in every backward pass.
        """
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`; over processes they become a mean."""
        loss.backward()

    def whole_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """Have whole weights on every process inside the block, for passes without gradient.

        Collective where the block begins; inside it each process makes as many passes as it wants,
        and nothing may change or save a weight. By default weights are always whole.
        """
        return nullcontext()

    @abstractmethod
    def clip(self, model: nn.Module, max_norm: float) -> torch.Tensor | None:
        """Clip the gradients of the whole model to `max_norm`, which may be infinite.

        Return their norm before that, a scalar on the device, the same on every process; None if
        `step` clips.
        """

    def step(self, model: nn.Module, optimizer: Any, norm: float) -> tuple[float, bool]:
        """Update the weights and forget the gradients.

        Return (the norm of the gradients before clipping, whether the weights moved). They stay
        where they are if `norm`, which `clip` returned, is not finite.
        """
        if finite := math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return norm, finite

    @abstractmethod
    def full(
        self, parameters: list[tuple[str, nn.Parameter]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield name and whole value of each of these weights, on every process."""

    @abstractmethod
    def local_shard(self, parameter: Any) -> torch.Tensor:
        """Return what this process holds of a weight, as trained. Not collective."""

    def files(self, copied: Callable[[Any], Any]) -> dict[str, Any]:
        """Return file name -> `copied` content that this process adds to a checkpoint. ZeRO only.

        Others keep their state in model and optimizer, which the checkpoint reads itself.
        """
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """Restore what the same topology saved, or `universal` made of another's. ZeRO only."""
        raise NotImplementedError

    def universal(self, folder: Path, converted: Path) -> None:
        """Convert the files of all processes for any number of them. ZeRO, main process only."""
        raise NotImplementedError

    def release(self) -> None:  # noqa: B027  (only ZeRO holds some)
        """Drop what is held of model and optimizer. Not collective."""


@contextmanager
def without_hooks(model: nn.Module, *packages: str) -> Iterator[None]:
    """Switch off, inside the block, what these packages do before and after each forward.

    They would share out weights again that a block has made whole, and wait for other processes.
    """
    all_hooks = [
        hooks
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]
    before = [dict(hooks) for hooks in all_hooks]
    aside = [
        {number for number, hook in hooks.items() if str(hook.__module__).startswith(packages)}
        for hooks in before
    ]
    for hooks, off in zip(all_hooks, aside):
        for number in off:
            del hooks[number]
    try:
        yield
    finally:
        for hooks, were, off in zip(all_hooks, before, aside):
            now = dict(hooks)
            hooks.clear()  # their order counts: FSDP's comes first before a forward
            hooks.update({n: hook for n, hook in were.items() if n in off or n in now} | now)
