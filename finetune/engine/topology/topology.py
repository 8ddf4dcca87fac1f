"""How processes share the model. The only package that knows Accelerate, FSDP and DeepSpeed.

Whatever the topology, a step sees the same few verbs: prepare, forward_backward, clip, step, sum.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import nn

from finetune import torch_versions
from finetune.config import Config, accumulation_steps
from finetune.data.batches import Batch
from finetune.engine.topology import launch, meta, start, support
from finetune.engine.topology.processes import WAIT, Processes
from finetune.engine.topology.replicated import Replicated
from finetune.errors import ConfigError, TopologyError
from finetune.objectives import base as objectives
from finetune.objectives.base import Term
from finetune.survival.watchdog import Watchdog

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Topology:
    """One process's view of all of them. Raises ConfigError if the launch is not what it claims,
    TopologyError if others do not come.
    """

    def __init__(self, precision: str, check_only: bool = False) -> None:
        """`check_only`: nothing will be trained, so a precision that only a GPU has is allowed."""
        cuda = torch.cuda.is_available()
        self.parallel, self.launched = launch.read(), launch.recorded()
        if cuda:
            start.take_own_gpu()
        self.precision = (
            "fp32"
            if check_only and precision == "fp16" and not cuda
            else start.resolve(precision, cuda)
        )
        start.require_what_was_asked(
            self.parallel, PRECISIONS[self.precision], self.precision, cuda, check_only
        )
        self.accelerator = start.accelerator(self.parallel, PRECISIONS[self.precision], cuda)
        self.device = start.with_index(self.accelerator.device)
        self.rank: int = self.accelerator.process_index
        self.num_processes: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        if self.num_processes != self.parallel.num_processes:
            raise ConfigError(
                f"the launcher started {self.parallel.num_processes} processes, but only "
                f"{self.num_processes} found each other; see docs/topologies.md"
            )
        self.data_rank, self.num_data = (
            self.rank // self.parallel.num_context,
            self.num_processes // self.parallel.num_context,
        )
        """Of processes that get sequences of their own: those that share a sequence count as one.
        """
        self.is_first_of_node = start.local_rank() == 0
        self.watchdog = Watchdog(self.rank, self.num_processes)
        self.processes = Processes(self.rank, self.num_processes, self.device)
        self.sum, self.any, self.union = (
            self.processes.sum,
            self.processes.any,
            self.processes.union,
        )
        self.on_main, self.on_every = self.processes.on_main, self.processes.on_every
        self.sharing: Any = self._sharing()
        self._context = self._sequence_group()

    def _sharing(self) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        if self.parallel.kind == "fsdp2":
            from finetune.engine.topology.fsdp import Fsdp2

            return Fsdp2(self.parallel, self.device, dtype, self.on_main)
        if self.parallel.is_zero:
            from finetune.engine.topology.zero import Zero

            return Zero(self.parallel, self.device, dtype, self.on_main)
        return Replicated(self.accelerator, self.on_main)

    def _sequence_group(self) -> Any:
        """The processes that share sequences with this one: neighbours, whose links are the
        fastest.
        """
        count = self.parallel.num_context
        if count == 1:
            return None
        groups = [
            list(range(first, first + count)) for first in range(0, self.num_processes, count)
        ]
        group, _ = torch.distributed.new_subgroups_by_enumeration(groups)
        return group

    def part(self, batch: Batch) -> Batch:
        """What this process puts through the model of a micro-batch: all of it, or its stretch."""
        if self._context is None:
            return batch
        return batch.part(
            self.rank % self.parallel.num_context, self.parallel.num_context, self._context
        )

    def check(self, config: Config) -> None:
        """Raise ConfigError with everything in the run config that this topology cannot do."""
        if problems := list(support.conflicts(config, self.parallel)):
            raise ConfigError(
                "\n  ".join(
                    [f"{len(problems)} settings that {self.name} does not support:", *problems]
                    if len(problems) > 1
                    else problems
                )
            )

    def require_same(self, values: dict[str, Any]) -> None:
        """Raise ConfigError on every process if one was given other values. From here on waiting
        may take long.
        """
        if self.num_processes == 1:
            return
        try:
            everyone = self.processes.gather(values)
        except RuntimeError as exc:
            raise TopologyError(start.did_not_meet(exc)) from exc
        for rank, others in enumerate(everyone):
            different = [key for key in values if others.get(key) != everyone[0].get(key)]
            if different:
                key = different[0]
                raise ConfigError(
                    f"process {rank} was started with another {key}: {others.get(key)!r}, process "
                    f"0 has {everyone[0].get(key)!r}; "
                    "give every node the same config and command line"
                )
        torch_versions.set_timeout(WAIT)

    def lost(self) -> str:
        """Once a connection has broken: which processes have gone, in words. Takes a few seconds."""
        gone = self.watchdog.silent()
        return (
            f"process {', '.join(map(str, gone))} has gone"
            if gone
            else "the connection to another process broke"
        )

    @property
    def name(self) -> str:
        return self.parallel.name

    @property
    def scales_gradients(self) -> bool:
        """fp16: gradients are scaled up, and a step whose scaled gradients overflow is skipped."""
        return self.accelerator.scaler is not None

    def prepare(
        self,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        config: Config,
    ) -> tuple[nn.Module, Any]:
        """Move model and optimizer to the device, share them, and check that they really are.

        `model` may be without weights on all processes but the main one. The optimizer is made when
        parameters are where they will be. Raises ConfigError if what was asked for did not happen.
        """
        outline = self.on_main(lambda: meta.outline(model))
        assert outline == meta.outline(model), (
            f"process {self.rank} built another model than the main one"
        )
        max_norm = config.train.max_grad_norm
        shared: tuple[nn.Module, Any] = self.sharing.prepare(
            model,
            make_optimizer,
            accumulation_steps=accumulation_steps(config, self.num_data),
            micro_batch_size=config.micro_batch_size,
            max_norm=float("inf") if max_norm is None else max_norm,
        )
        return shared

    def arithmetic(self) -> AbstractContextManager[None]:
        """Passes through a bare model inside are done in the precision of the run."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        if dtype is None:
            return nullcontext()
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype, cache_enabled=False
        )
        return context

    def unwrap(self, model: nn.Module) -> Any:
        return self.sharing.unwrap(model)

    def forward_backward(
        self, model: nn.Module, batches: Sequence[Batch], terms: Callable[[Batch], list[Term]], divisors: Mapping[str, float | torch.Tensor], *,
        last: bool = True,
    ) -> list[Term]:  # fmt: skip
        """Add up the gradients of a step's micro-batches. Gives the sums of their terms, on the
        device, of this process alone.

        `last`: whether the step ends with these, so that gradients are exchanged.
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
        """Clip the gradients to max_norm. Gives their norm before that, on the device; None where
        `step` clips.
        """
        norm: torch.Tensor | None = self.sharing.clip(
            model, float("inf") if max_norm is None else max_norm
        )
        return norm

    def step(self, model: nn.Module, optimizer: Any, norm: float) -> tuple[float, bool]:
        """Update the weights and forget the gradients: (their norm before clipping, whether the
        weights moved).

        The weights stay where they are if `norm`, which `clip` gave, is not finite.
        """
        moved: tuple[float, bool] = self.sharing.step(model, optimizer, norm)
        return moved

    def scaler_state(self) -> dict[str, Any]:
        """State of fp16's gradient scaler, the same on every process; empty without one."""
        return self.accelerator.scaler.state_dict() if self.scales_gradients else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if self.scales_gradients and state:
            self.accelerator.scaler.load_state_dict(state)

    def full_weights(self, model: nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
        """Weights, or those that train, whole, on the CPU of the main process; empty elsewhere.
        Collective. Tied ones under each name.
        """
        named = list(self.unwrap(model).named_parameters(remove_duplicate=False))
        once = {
            id(p): (name, p) for name, p in reversed(named) if p.requires_grad or not trained_only
        }
        found: dict[str, torch.Tensor] = {}
        for name, weight in self.sharing.whole(list(once.values())):
            if self.is_main:
                found[name] = weight.cpu()
        if not self.is_main:
            return {}
        whole = {name: found[once[id(p)][0]] for name, p in named if id(p) in once}
        if not trained_only:
            known = set(self.unwrap(model).state_dict())
            whole |= {
                name: b.detach().cpu()
                for name, b in self.unwrap(model).named_buffers()
                if name in known
            }
        return whole

    def local_shard(self, parameter: torch.Tensor) -> torch.Tensor:
        """What this process holds of a weight."""
        part: torch.Tensor = self.sharing.local_shard(parameter)
        return part

    def engine_files(self, copied: Callable[[Any], Any]) -> dict[str, Any]:
        """ZeRO: this process's weights that train and optimizer, `copied`, by the names of
        DeepSpeed's files. Collective.
        """
        files: dict[str, Any] = self.sharing.files(copied)
        return files

    def load_engine(self, folder: Path) -> None:
        """ZeRO: put back what was saved by the same topology, or what `universal` has made of
        another's. Collective.
        """
        self.sharing.load(folder)

    def universal(self, folder: Path, converted: Path) -> None:
        """ZeRO: files that any number of processes can read, from those of the processes that
        saved. On the main process.
        """
        self.sharing.universal(folder, converted)

    def memory_gb(self) -> float:
        """Peak memory of this process in GB (1e9 bytes): of its GPU, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    @property
    def probe_dtype(self) -> torch.dtype | None:
        """What weights are rounded to in a pass through the bare model; None: they are as they are."""
        return (
            {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
            if self.parallel.is_sharded
            else None
        )

    def release(self) -> None:
        """Let go of model and optimizer, once nothing else holds them, and give their memory back
        to the device.
        """
        if self.parallel.is_zero:
            self.sharing.engine = None
        self.accelerator.free_memory()
        clear_device_cache(
            garbage_collection=True
        )  # again: it forgets models only after it has collected

    def close(self) -> None:
        """Part from the others, once models and optimizers are gone.

        A DDP model that outlives its process group ends it itself, and then waits for a thread that
        waits for it.
        """
        self.accelerator.free_memory()
        self.accelerator.end_training()
