"""How processes share the model. The only file that knows Accelerate, DDP and what comes after them.

Whatever the topology, a step sees the same few verbs: prepare, accumulate, backward, clip, sum.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import nn

from finetune.errors import CheckpointError, ConfigError, ExportError, UserError

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class Topology:
    """One process's view of all of them. Raises ConfigError if the launch is not what it claims."""

    def __init__(self, precision: str, check_only: bool = False) -> None:
        """`check_only`: nothing will be trained, so a precision that only a GPU has is no error."""
        cuda = torch.cuda.is_available()
        self.precision = "fp32" if check_only and precision == "fp16" and not cuda else _resolve(precision, cuda)
        _refuse_what_the_launcher_cannot_mean()
        self.accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision=PRECISIONS[self.precision],
            # Steps are whole groups of micro-batches that `train_step` scales itself: Accelerate must divide by nothing.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
            # The main process hashes, exports and reloads while the others wait; NCCL's 10 minutes would end that.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.num_processes: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if self.num_processes != launched:
            raise ConfigError(
                f"the launcher started {launched} processes, but only {self.num_processes} found each other; see docs/topologies.md"
            )
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            DistributedType.MULTI_GPU,
            DistributedType.MULTI_CPU,
        ):
            raise ConfigError(
                f"topology {self.accelerator.distributed_type} is not supported; use accelerate_configs/single.yaml or ddp.yaml"
            )

    @property
    def name(self) -> str:
        return "single" if self.num_processes == 1 else "ddp"

    @property
    def scales_gradients(self) -> bool:
        """fp16: gradients are scaled up, and a step whose scaled gradients overflow is skipped."""
        return self.accelerator.scaler is not None

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Model and optimizer on the device and shared; then checks that they really are."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # DDP's notes on bucket views say nothing a user could act on
            model, optimizer = self.accelerator.prepare(model, optimizer)
        shared = isinstance(model, nn.parallel.DistributedDataParallel)
        if shared != (self.num_processes > 1):
            raise ConfigError(f"asked for {self.name} with {self.num_processes} processes, got {type(model).__name__}")
        return model, optimizer

    def arithmetic(self) -> AbstractContextManager[None]:
        """Passes through a bare model inside are done in the precision of the run."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        if dtype is None:
            return nullcontext()
        context: AbstractContextManager[None] = torch.autocast(self.device.type, dtype)
        return context

    def unwrap(self, model: nn.Module) -> Any:
        return self.accelerator.unwrap_model(model)

    @contextmanager
    def accumulate(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last backward pass of a step only."""
        with nullcontext() if last else self.accelerator.no_sync(model):
            yield

    def backward(self, loss: torch.Tensor) -> None:
        """Add this loss's gradient. Over processes gradients add up: DDP's mean over N is undone by N."""
        self.accelerator.backward(loss * self.num_processes)

    def clip(self, model: nn.Module, max_norm: float | None) -> torch.Tensor:
        """Norm of all gradients before clipping, float32 scalar; scales them to max_norm if they are over."""
        limit = float("inf") if max_norm is None else max_norm
        return self.accelerator.clip_grad_norm_(model.parameters(), limit)

    def scaler_state(self) -> dict[str, Any]:
        """State of fp16's gradient scaler, the same on every process; empty without one."""
        return self.accelerator.scaler.state_dict() if self.scales_gradients else {}

    def restore_scaler(self, state: dict[str, Any]) -> None:
        if self.scales_gradients and state:
            self.accelerator.scaler.load_state_dict(state)

    def sum(self, values: Sequence[float | torch.Tensor]) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        if self.num_processes > 1:
            torch.distributed.all_reduce(total)
        return [float(v) for v in total.tolist()]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Do it on the main process only; every process gets its result, or raises its error."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = action()
            except Exception as exc:
                if self.num_processes == 1:
                    raise
                own = isinstance(exc, UserError | CheckpointError | ExportError)  # others may not survive the journey
                outcome[1] = exc if own else RuntimeError(f"{type(exc).__name__}: {exc}")
        if self.num_processes > 1:
            torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def on_every(self, action: Callable[[], None]) -> None:
        """Do it on every process; if it fails on one, all raise RuntimeError that says which and why."""
        problem = None
        try:
            action()
        except Exception as exc:
            problem = f"process {self.rank}: {type(exc).__name__}: {exc}"
        problems: list[str | None] = [problem]
        if self.num_processes > 1:
            problems = [None] * self.num_processes
            torch.distributed.all_gather_object(problems, problem)
        if any(problems):
            raise RuntimeError("; ".join(filter(None, problems)))

    def full_weights(self, model: nn.Module, trained_only: bool) -> dict[str, torch.Tensor]:
        """Weights, or those that train, whole, on the CPU of the main process; empty elsewhere. Collective."""
        if trained_only:
            named = self.unwrap(model).named_parameters(remove_duplicate=False)
            state = {name: parameter for name, parameter in named if parameter.requires_grad}
        else:
            state = self.accelerator.get_state_dict(model)
        return {name: tensor.detach().cpu() for name, tensor in state.items()} if self.is_main else {}

    def memory_gb(self) -> float:
        """Peak memory of this process in GB (1e9 bytes): of its GPU, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def close(self) -> None:
        """Part from the others, once models and optimizers are gone.

        A DDP model that outlives its process group ends it itself, and then waits for a thread that waits for it.
        """
        self.accelerator.free_memory()
        self.accelerator.end_training()


def _refuse_what_the_launcher_cannot_mean() -> None:
    """Wishes of `accelerate launch` that would be dropped or would change the arithmetic in silence."""
    for name, wish in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        if os.environ.get(name, "false").lower() == "true":
            raise ConfigError(
                f"the topology file asks for {wish}, which is not supported yet; use single.yaml or ddp.yaml"
            )
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "use_cpu: true makes accelerate launch start one process whatever num_processes says; set it to false "
            "(without a GPU train.py takes the CPU by itself), as in accelerate_configs/cpu_debug.yaml"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps != "1":
        raise ConfigError(
            f"the launcher sets gradient_accumulation_steps to {steps}; remove it there: accumulation follows from "
            "train.global_batch_size and train.micro_batch_size"
        )


def _resolve(precision: str, cuda: bool) -> str:
    if precision == "auto":
        return "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if precision == "fp16" and not cuda:
        raise ConfigError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            "train.precision: bf16 needs a GPU of compute capability 8.0 (Ampere) or newer; use fp16 or fp32"
        )
    return precision
