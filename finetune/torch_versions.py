"""Handle the differences between the supported versions of PyTorch: 2.11, 2.13 (pinned) and 2.14.

Each function says what changed, and when. No other module depends on the version.
"""

import inspect
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.nn.attention.varlen import varlen_attn


def varlen_keywords(kernel: Callable[..., Any], *, is_grouped: bool) -> dict[str, Any]:
    """Return arguments of `varlen_attn` for keys and values with fewer heads than the queries.

    2.13 refuses grouped heads without `enable_gqa=True`. 2.11 has no such argument, and its kernel
    takes grouped heads as they are.
    """
    has_switch = "enable_gqa" in inspect.signature(kernel).parameters
    return {"enable_gqa": is_grouped} if has_switch else {}


VARLEN_GROUPED = {
    is_grouped: varlen_keywords(varlen_attn, is_grouped=is_grouped) for is_grouped in (False, True)
}
"""The arguments for the installed version, found once: torch.compile cannot trace signatures."""


def host_copier(device: torch.device) -> Callable[[Any], Any]:
    """Return a function that copies a tree of tensors into host memory, which it reuses.

    Not `DefaultStager`: 2.11's closes itself after the first copy (pytorch#183413), and a second
    checkpoint fails. The class that it wraps is the same in all versions. With a GPU the memory is
    pinned, and the copies are complete when the function returns.
    """
    on_gpu = device.type == "cuda"
    stager = StateDictStager(pin_memory=on_gpu)

    def copy(tree: Any) -> Any:
        copied = stager.stage(tree, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.synchronize(device)
        return copied

    return copy


def as_floats(packed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View the bytes of quantised weights as a float dtype, [N, 1], without changing the bits.

    `fully_shard` of 2.11 makes a parameter of each weight before it knows that it is frozen, and
    only floats may require gradients (fixed in 2.12). `dtype` must be that in which FSDP gathers
    weights; otherwise FSDP would convert the bits as if they were numbers.
    """
    return packed.detach().reshape(-1).view(dtype).reshape(-1, 1)


def set_timeout(timeout: timedelta) -> None:
    """Set how long collectives of the default group may take.

    2.14 has a public function, and warns about the private one, the only one in 2.11 and 2.13.
    """
    public = getattr(torch.distributed, "set_timeout", None)
    (public or torch.distributed.distributed_c10d._set_pg_timeout)(timeout)


def ignore_new_names() -> None:
    """Ignore warnings about old names in other libraries, which users cannot change.

    2.13 renamed them. Accelerate makes DDP with `broadcast_buffers`; DeepSpeed calls collectives by
    their old names at every step.
    """
    for name in (".*broadcast_buffers.* is deprecated", r"`torch.distributed\.\w+` is deprecated"):
        warnings.filterwarnings("ignore", name, FutureWarning)
