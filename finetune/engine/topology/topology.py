"""How processes share the model. The only package that knows Accelerate, FSDP and DeepSpeed.

Whatever the topology, a step sees the same few verbs: prepare, forward_backward, clip, step, sum.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from finetune.config import Config, accumulation_steps
from finetune.data.batches import Batch
from finetune.engine.topology import meta
from finetune.engine.topology.replicated import Replicated
from finetune.engine.topology.sharing import MakeOptimizer, Sharing
from finetune.engine.topology.start import HALF, Process
from finetune.objectives import base as objectives
from finetune.objectives.base import Term


class Topology(Process):
    """The model as processes share it: what a step and a checkpoint ask of it."""

    def __init__(self, precision: str, check_only: bool = False) -> None:
        """`check_only`: nothing will be trained, so a precision that only a GPU has is allowed."""
        super().__init__(precision, check_only)
        self.sharing = self._sharing()
        self._context = self._sequence_group()

    def _sharing(self) -> Sharing:
        dtype = HALF.get(self.precision)
        if self.parallel.kind == "fsdp2":
            from finetune.engine.topology.fsdp import Fsdp2

            return Fsdp2(self.parallel, self.device, dtype, self.on_main)
        if self.parallel.is_zero:
            from finetune.engine.topology.zero import Zero

            return Zero(self.parallel, self.device, dtype, self.on_main)
        assert self.parallel.kind in ("single", "ddp"), self.parallel.kind
        return Replicated(self.accelerator, self.on_main)

    def _sequence_group(self) -> Any:
        """Return the group that shares sequences: neighbours, whose links are the fastest."""
        count = self.parallel.num_context
        if count == 1:
            return None
        firsts = range(0, self.num_processes, count)
        groups = [list(range(first, first + count)) for first in firsts]
        group, _ = torch.distributed.new_subgroups_by_enumeration(groups)
        return group

    def part(self, batch: Batch) -> Batch:
        """Return what this process puts through the model of a micro-batch: all, or a stretch."""
        if self._context is None:
            return batch
        count = self.parallel.num_context
        return batch.part(self.rank % count, count, self._context)

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients are scaled up (fp16), and steps whose gradients overflow skipped."""
        return self.accelerator.scaler is not None

    def prepare(
        self, model: nn.Module, make_optimizer: MakeOptimizer, config: Config
    ) -> tuple[nn.Module, Any]:
        """Move model and optimizer to the device, share them, and check that they really are.

        `model` may be without weights on all processes but the main one. The optimizer is made when
        parameters are where they will be. Raises ConfigError if what was asked for did not happen.
        """
        outline = self.on_main(lambda: meta.outline(model))
        assert outline == meta.outline(model), f"process {self.rank} built another model"
        max_norm = config.train.max_grad_norm
        return self.sharing.prepare(
            model,
            make_optimizer,
            accumulation_steps=accumulation_steps(config, self.num_data),
            micro_batch_size=config.micro_batch_size,
            max_norm=float("inf") if max_norm is None else max_norm,
        )

    def unwrap(self, model: nn.Module) -> Any:
        return self.sharing.unwrap(model)

    def whole_weights(self, model: nn.Module) -> AbstractContextManager[None]:
        """Have whole weights on every process inside the block; see `Sharing.whole_weights`."""
        return self.sharing.whole_weights(model)

    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], terms: Callable[[Batch], list[Term]],
        divisors: Mapping[str, float | torch.Tensor], *, last: bool = True,
    ) -> list[Term]:  # fmt: skip
        """Add up the gradients of a step's micro-batches.

        Return the sums of their terms over this process alone, on the device. `last`: the step ends
        with these, so processes exchange gradients.
        """
        added: dict[str, Term] = {}
        for number, batch in enumerate(batches, 1):
            self.watchdog.heartbeat()
            with self.sharing.accumulate(model, last and number == len(batches)):
                found = terms(batch.to(self.device))
                # Over processes gradients add up: every topology's mean over N is undone by N.
                self.sharing.backward(objectives.total(found, divisors) * self.num_processes)
            for term in found:
                objectives.add(added, term)
        return list(added.values())

    def clip(self, model: nn.Module, max_norm: float | None) -> torch.Tensor | None:
        """Clip the gradients; see `Sharing.clip`. `max_norm`: None only measures their norm."""
        return self.sharing.clip(model, float("inf") if max_norm is None else max_norm)

    def step(self, model: nn.Module, optimizer: Any, norm: float) -> tuple[float, bool]:
        """Update the weights; see `Sharing.step`."""
        return self.sharing.step(model, optimizer, norm)

    def scaler_state(self) -> dict[str, Any]:
        """Return the state of fp16's gradient scaler, the same on every process."""
        return self.accelerator.scaler.state_dict() if self.scales_gradients else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if self.scales_gradients and state:
            self.accelerator.scaler.load_state_dict(state)

    def full_weights(self, model: nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
        """Gather the weights, or those that train, on the CPU of the main process. Collective.

        Tied weights stand under each of their names. Empty on other processes.
        """
        bare = self.unwrap(model)
        named = list(bare.named_parameters(remove_duplicate=False))
        gathered = [(name, p) for name, p in reversed(named) if p.requires_grad or not trained_only]
        once = {id(p): (name, p) for name, p in gathered}
        found: dict[str, torch.Tensor] = {}
        for name, weight in self.sharing.full(list(once.values())):
            if self.is_main:
                found[name] = weight.cpu()
        if not self.is_main:
            return {}
        full = {name: found[once[id(p)][0]] for name, p in named if id(p) in once}
        if not trained_only:
            saved = bare.state_dict().keys()
            full |= {name: b.detach().cpu() for name, b in bare.named_buffers() if name in saved}
        return full

    def release(self) -> None:
        """Free the memory of model and optimizer, once nothing else holds them."""
        self.sharing.release()
        self.accelerator.free_memory()
        # Again: Accelerate forgets models only after it has collected.
        clear_device_cache(garbage_collection=True)

    def give_back(self) -> None:
        """Give memory that holds nothing back to the device, for another program."""
        clear_device_cache()

    def close(self) -> None:
        """Leave the process group, once models and optimizers are gone.

        A DDP model that outlives its group ends it itself, and then waits for a thread that waits
        for it.
        """
        self.accelerator.free_memory()
        self.accelerator.end_training()
