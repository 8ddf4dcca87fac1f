"""The start of one process of a run: its GPU, its precision, the processes that it joins."""

import os
import resource
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from finetune import failures, torch_versions
from finetune.config import Config
from finetune.engine.topology import launch, support
from finetune.engine.topology.processes import WAIT, Processes
from finetune.errors import ConfigError, DeviceError, OutOfMemory, TopologyError
from finetune.survival.watchdog import Watchdog

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}  # ours -> Accelerate's names
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Process:
    """One process of a run: its device, its precision, and the processes beside it.

    data_rank, num_data: among processes that get sequences of their own; those that share a
    sequence count as one. Raises ConfigError if the launch is not what it claims, TopologyError if
    the other processes do not come.
    """

    def __init__(self, precision: str, check_only: bool = False) -> None:
        """`check_only`: nothing will be trained, so a precision that only a GPU has is allowed."""
        cuda = torch.cuda.is_available()
        self.parallel, self.launched = launch.read(), launch.recorded()
        if cuda:
            take_own_gpu()
            let_masks_have_gradients()
        is_pretended = check_only and precision == "fp16" and not cuda
        self.precision = "fp32" if is_pretended else resolve(precision, cuda)
        require_what_was_asked(self.parallel, self.precision, cuda, check_only)
        self.accelerator = _accelerator(self.parallel, PRECISIONS[self.precision], cuda)
        self.device = with_index(self.accelerator.device)
        self.rank: int = self.accelerator.process_index
        self.num_processes: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        if self.num_processes != self.parallel.num_processes:
            raise ConfigError(
                f"the launcher started {self.parallel.num_processes} processes, but only "
                f"{self.num_processes} found each other; see docs/topologies.md"
            )
        self.data_rank = self.rank // self.parallel.num_context
        self.num_data = self.num_processes // self.parallel.num_context
        self.is_first_of_node = local_rank() == 0
        self.watchdog = Watchdog(self.rank, self.num_processes)
        self.processes = processes = Processes(self.rank, self.num_processes, self.device)
        self.sum, self.any, self.union = processes.sum, processes.any, processes.union
        self.on_main, self.on_every = processes.on_main, processes.on_every

    @property
    def name(self) -> str:
        return self.parallel.name

    def check(self, config: Config) -> None:
        """Raise ConfigError with every setting of the run config that this topology lacks."""
        problems = list(support.conflicts(config, self.parallel))
        if len(problems) > 1:
            problems.insert(0, f"{len(problems)} settings that {self.name} does not support:")
        if problems:
            raise ConfigError("\n  ".join(problems))

    def require_same(self, values: dict[str, Any]) -> None:
        """Raise ConfigError on every process if one was given other values.

        Until here a process that does not answer is noticed soon; from here on waiting may take
        long.
        """
        if self.num_processes == 1:
            return
        try:
            everyone = self.processes.gather(values)
        except RuntimeError as exc:
            raise TopologyError(_did_not_meet(exc)) from exc
        main = everyone[0]
        for rank, others in enumerate(everyone):
            different = [key for key in values if others.get(key) != main.get(key)]
            if different:
                key = different[0]
                raise ConfigError(
                    f"process {rank} was started with another {key}: {others.get(key)!r}, process "
                    f"0 has {main.get(key)!r}; give every node the same config and command line"
                )
        torch_versions.set_timeout(WAIT)

    def lost(self) -> str:
        """Name the processes that have gone, once a connection has broken. Takes seconds."""
        gone = self.watchdog.silent()
        if not gone:
            return "the connection to another process broke"
        return f"process {', '.join(map(str, gone))} has gone"

    def arithmetic(self) -> AbstractContextManager[None]:
        """Do passes through a bare model in the precision of the run, inside the block."""
        if self.precision not in HALF:
            return nullcontext()
        half = HALF[self.precision]
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, half, cache_enabled=False
        )
        return context

    @property
    def probe_dtype(self) -> torch.dtype | None:
        """To which a pass through the bare model rounds weights; None: they stay as they are."""
        return HALF.get(self.precision) if self.parallel.is_sharded else None

    def memory_gb(self) -> float:
        """Peak memory of this process in GB (1e9 bytes): of its GPU, or of the process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _accelerator(parallel: launch.ParallelConfig, mixed_precision: str, cuda: bool) -> Accelerator:
    """Join the other processes. Raises TopologyError if they do not come."""
    if not cuda:  # DeepSpeed reads this when it is imported, and then does not warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # From here on Accelerate, and transformers, see plain processes: our topology decides who
    # shares what.
    plain = {f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")}
    os.environ.update(dict.fromkeys(plain, "false"))
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # NCCL notices a failure or a time-out in a thread of its own and raises no exception. 3,
    # PyTorch's default, ends the process (SIGABRT), and `finetune launch` writes the outcome. 0
    # would wait until train.hang_minutes are over, 1 first aborts the communicators, which may
    # hang, and 2 would go on training with what a broken collective left in the gradients.
    # (ErrorHandlingMode in torch's ProcessGroupNCCL.hpp.)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    both = "cpu:gloo,cuda:nccl"  # what waits in host memory is exchanged there
    try:
        accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision=mixed_precision,
            # `train_step` scales whole groups of micro-batches: Accelerate must divide by nothing.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=1, sync_with_dataloader=False
            ),
            kwargs_handlers=[
                # A weight is used once a pass: kept, its 16 bits only take memory.
                AutocastKwargs(cache_enabled=False),
                # Gradients lie in DDP's buckets, not next to them: for 8B in float32 32 GB less,
                # once the first step is over. Buffers (rotary frequencies) are constants, so
                # `Replicated` sends them once.
                DistributedDataParallelKwargs(
                    gradient_as_bucket_view=True, broadcast_buffers=False
                ),
                InitProcessGroupKwargs(
                    timeout=timedelta(minutes=launch.join_minutes()),
                    backend=both if cuda and parallel.offload else None,
                ),
            ],
        )
    except (RuntimeError, ValueError) as exc:
        is_device = isinstance(failures.translate(exc), DeviceError | OutOfMemory)
        if parallel.num_processes == 1 or is_device:
            raise
        raise TopologyError(_did_not_meet(exc)) from exc
    # Accelerate makes no group of one process.
    if parallel.is_sharded and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(both if cuda else "gloo")
    return accelerator


def _did_not_meet(exc: Exception) -> str:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return (
        f"the {os.environ.get('WORLD_SIZE', '?')} processes did not find each other at {address} "
        f"within {launch.join_minutes():g} minutes: {str(exc).splitlines()[0]}; read what the "
        "others say, and check that main_process_ip can be reached from every node"
    )


def require_what_was_asked(
    parallel: launch.ParallelConfig, precision: str, cuda: bool, check_only: bool
) -> None:
    """Check that the topology file agrees with the run config, and that each process has a GPU.

    Raises ConfigError, or TopologyError where another node may have the GPU.
    """
    if parallel.mixed_precision not in ("no", PRECISIONS[precision]):
        raise ConfigError(
            f"the topology file sets mixed_precision: {parallel.mixed_precision}, but "
            f"train.precision is {precision}; remove it from the topology file"
        )
    needs = os.environ.get("FINETUNE_NEEDS_GPU") or "0"
    if needs not in ("0", "1"):
        raise ConfigError(f"FINETUNE_NEEDS_GPU: {needs}; it must be 1, or 0, or not there")
    local, count = local_rank(), torch.cuda.device_count() if cuda else 0
    if needs == "1" and local >= count and not check_only:
        there = f"{count or 'no'} GPU{'s' if count > 1 else ''}"
        raise TopologyError(
            f"FINETUNE_NEEDS_GPU is 1, and PyTorch sees {there} here, where process {local + 1} "
            "wants one of its own: look at the driver, and at what the container is given "
            "(nvidia-smi)"
        )
    if cuda and local >= count:
        raise ConfigError(
            f"num_processes: this node has {count} GPUs, and process {local + 1} has none; give "
            "--num_processes"
        )


def take_own_gpu() -> None:
    """Make this process's GPU the current one before anything asks about "the" GPU.

    Otherwise every process of a node opens a context on GPU 0, some 500 MB each. A process without
    a GPU of its own is for `require_what_was_asked` to refuse.
    """
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())


def let_masks_have_gradients() -> None:
    """Keep cuDNN out of attention with a mask, as `model.attention: sdpa` has for padded batches.

    With a mask, 64 tokens more than a multiple of 128, and a row whose logits are all below -88,
    its backward pass gives NaN on H100 and H200, in torch 2.11 to 2.13 (pytorch #196678). Where
    we take cuDNN ourselves, without a mask, we name it (`models/varlen_gpu.py`).
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def with_index(device: torch.device) -> torch.device:
    """Return the device with its index: `torch.cuda.set_device` refuses Accelerate's "cuda"."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve(precision: str, cuda: bool) -> str:
    """Return fp32, bf16 or fp16 for train.precision. Raises ConfigError for what is not here."""
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp32"
    if precision == "fp16" and not cuda:
        raise ConfigError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    if precision == "bf16" and cuda and not has_bf16:
        raise ConfigError(
            "train.precision: bf16 needs a GPU of compute capability 8.0 (Ampere) or newer; use "
            "fp16 or fp32"
        )
    return precision
