"""What differs between the versions of PyTorch that this project runs on: 2.11, 2.13 (pinned) and
2.14.

Each function says what changed, and when. Nothing else in the package asks for a version.
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
    """Keyword arguments of `varlen_attn` for keys and values with fewer heads than the queries.

    2.13 refuses grouped heads without `enable_gqa=True`. 2.11 has no such argument, and its kernel
    takes grouped heads as they are.
    """
    has_switch = "enable_gqa" in inspect.signature(kernel).parameters
    return {"enable_gqa": is_grouped} if has_switch else {}


VARLEN_GROUPED = {
    is_grouped: varlen_keywords(varlen_attn, is_grouped=is_grouped) for is_grouped in (False, True)
}
"""The same for the installed version, found once: a compiler cannot look at signatures."""


def host_copier(device: torch.device) -> Callable[[Any], Any]:
    """A function that copies any tree of tensors into host memory, which it keeps from call to
    call.

    Not `DefaultStager`: 2.11's closes itself after the first copy (pytorch#183413), and a second
    checkpoint fails. What it wraps is the same in all versions. With a GPU the memory is pinned,
    and the copies are complete when the function returns.
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
    """The bytes of quantised weights under a float dtype, [N, 1]; the bits stay as they are.

    `fully_shard` of 2.11 makes a parameter of each weight before it knows that it is frozen, and
    only floats may require gradients (fixed in 2.12). `dtype` must be what FSDP gathers weights in,
    or it would convert the bits as if they were numbers.
    """
    return packed.detach().reshape(-1).view(dtype).reshape(-1, 1)


def set_timeout(timeout: timedelta) -> None:
    """How long collectives of the default group may take.

    2.14 has a public function for it, and warns of the private one, which is all that 2.11 and 2.13
    have.
    """
    public = getattr(torch.distributed, "set_timeout", None)
    (public or torch.distributed.distributed_c10d._set_pg_timeout)(timeout)


def ignore_new_names() -> None:
    """Say nothing of names that 2.13 has renamed and other libraries still use, which no user can
    change.

    Accelerate makes DDP with `broadcast_buffers`; DeepSpeed calls collectives by their old names,
    at every step.
    """
    for name in (".*broadcast_buffers.* is deprecated", r"`torch.distributed\.\w+` is deprecated"):
        warnings.filterwarnings("ignore", name, FutureWarning)
