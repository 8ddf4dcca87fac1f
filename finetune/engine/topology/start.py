"""The start of a process of a launch: its GPU, its precision, the group of processes that it joins."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from finetune import failures
from finetune.engine.topology import launch
from finetune.errors import ConfigError, DeviceError, OutOfMemory, TopologyError


def accelerator(parallel: launch.ParallelConfig, mixed_precision: str, cuda: bool) -> Accelerator:
    """Join the other processes. Raises TopologyError if they do not come."""
    if not cuda:  # DeepSpeed reads this when it is imported, and then does not warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # From here on Accelerate, and transformers, see plain processes: who shares what is decided
    # below.
    os.environ.update(
        {f"ACCELERATE_USE_{name}": "false" for name in ("FSDP", "DEEPSPEED", "PARALLELISM_CONFIG")}
    )
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    # NCCL notices a failure or a time-out in a thread of its own, and no exception comes from it.
    # 3, PyTorch's default, ends the process (SIGABRT), and `python -m finetune launch` writes the
    # outcome. 0 would wait until train.hang_minutes are over, 1 first aborts the communicators,
    # which may hang, and 2 would go on training with what a broken collective has left in the
    # gradients. (ErrorHandlingMode in torch's ProcessGroupNCCL.hpp.)
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    try:
        accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision=mixed_precision,
            # Steps are whole groups of micro-batches that `train_step` scales itself: Accelerate
            # must divide by nothing.
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
                    # What waits in host memory is exchanged there.
                    backend="cpu:gloo,cuda:nccl" if cuda and parallel.offload else None,
                ),
            ],
        )
    except (RuntimeError, ValueError) as exc:
        if parallel.num_processes == 1 or isinstance(
            failures.translate(exc), DeviceError | OutOfMemory
        ):
            raise
        raise TopologyError(did_not_meet(exc)) from exc
    if (
        parallel.is_sharded and not torch.distributed.is_initialized()
    ):  # Accelerate makes no group of one process
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return accelerator


def did_not_meet(exc: Exception) -> str:
    address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    return (
        f"the {os.environ.get('WORLD_SIZE', '?')} processes did not find each other at {address} "
        f"within {launch.join_minutes():g} minutes: "
        f"{str(exc).splitlines()[0]}; read what the others say, and check that main_process_ip can "
        "be reached from every node"
    )


def require_what_was_asked(
    parallel: launch.ParallelConfig,
    mixed_precision: str,
    precision: str,
    cuda: bool,
    check_only: bool,
) -> None:
    """A topology file that agrees with the run config, and a GPU for each process, where there must
    be any.
    """
    if parallel.mixed_precision not in ("no", mixed_precision):
        raise ConfigError(
            f"the topology file sets mixed_precision: {parallel.mixed_precision}, but "
            f"train.precision is {precision}; "
            "remove it from the topology file"
        )
    needs = os.environ.get("FINETUNE_NEEDS_GPU") or "0"
    if needs not in ("0", "1"):
        raise ConfigError(f"FINETUNE_NEEDS_GPU: {needs}; it must be 1, or 0, or not there")
    local, count = local_rank(), torch.cuda.device_count() if cuda else 0
    if (
        needs == "1" and local >= count and not check_only
    ):  # another node may have all of them: no error of the launch
        raise TopologyError(
            f"FINETUNE_NEEDS_GPU is 1, and PyTorch sees {count or 'no'} "
            f"GPU{'s' if count > 1 else ''} here, where process {local + 1} wants one of its own: "
            "look "
            "at the driver, and at what the container is given (nvidia-smi)"
        )
    if cuda and local >= count:
        raise ConfigError(
            f"num_processes: this node has {count} GPUs, and process {local + 1} has none; give "
            "--num_processes"
        )


def take_own_gpu() -> None:
    """Make this process's GPU the current one before anything asks about "the" GPU.

    Otherwise every process of a node opens a context on GPU 0, some 500 MB each. A process without
    a GPU of its own is `require_what_was_asked`'s to refuse.
    """
    if local_rank() < torch.cuda.device_count():
        torch.cuda.set_device(local_rank())


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def with_index(device: torch.device) -> torch.device:
    """Accelerate's device of a single process is "cuda", which `torch.cuda.set_device` refuses."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def resolve(precision: str, cuda: bool) -> str:
    if precision == "auto":
        return (
            "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    if precision == "fp16" and not cuda:
        raise ConfigError("train.precision: fp16 needs a GPU; on a CPU use fp32 or bf16")
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError(
            "train.precision: bf16 needs a GPU of compute capability 8.0 (Ampere) or newer; use "
            "fp16 or fp32"
        )
    return precision
