"""Kernels that attend inside documents on a GPU.

All compute the same; they differ in the GPUs they know and in speed. varlen_choice.py takes one for
a run.
"""

import importlib
import inspect
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import torch_versions
from finetune.models import varlen_cpu
from finetune.models.attention_choice import CUDNN, FLASH_2, FLASH_3, FLASH_4

_in_use = FLASH_2


def in_use() -> str:
    return _in_use


def use(kernel: str) -> None:
    """Have `attend` take a kernel from here on. Raises what a missing package raises."""
    global _in_use
    if _in_use == FLASH_3:
        torch.nn.attention.restore_flash_attention_impl()
    if kernel == FLASH_3:  # under PyTorch's own operator, as is FlashAttention-2
        torch.nn.attention.activate_flash_attention_impl("FA3")
    _in_use = kernel


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    lengths: SimpleNamespace | None, scale: float, window: int | None, causal: bool = True,
) -> torch.Tensor:  # fmt: skip
    """query [T, H, D], key, value [T, KV, D], bounds int32 [documents + 1] -> [T, H, D]

    Each document attends to itself; `window`: to its nearest tokens only, those before it if
    `causal`. `lengths`: those of the documents, on the host.
    """
    if _in_use == FLASH_4:
        out, _ = flash_4(query, key, value, bounds, longest, scale, window or 0, causal)
        return out
    if _in_use == CUDNN:
        known = lengths or SimpleNamespace(values=varlen_cpu.lengths_of(bounds))
        return _cudnn(query, key, value, bounds, known, scale, causal)
    return torch_versions.varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scale,
        window_size=window_size(window, causal),
        **torch_versions.VARLEN_GROUPED[key.shape[1] != query.shape[1]],
    )  # fmt: skip


def window_size(window: int | None, causal: bool) -> tuple[int, int]:
    """Return how many tokens before and after itself a token sees; -1: all of its document."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


def _cudnn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor,
    lengths: SimpleNamespace, scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    if len(bounds) == 2:  # a compiler would compile anew for each number of `lengths`
        return _cudnn_document(q, k, v, scale, causal)
    return _cudnn_each(q, k, v, lengths, scale, causal)


@torch.compiler.disable  # a loop over lengths, which would be compiled anew for each pack
def _cudnn_each(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: SimpleNamespace,
    scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    parts = [part for part, _ in varlen_cpu.each(lengths.values, 0, query.device)]
    each = [
        _cudnn_document(query[:, :, p], key[:, :, p], value[:, :, p], scale, causal) for p in parts
    ]
    return torch.cat(each)


def _cudnn_document(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> torch.Tensor:
    """query [1, H, T, D] -> [T, H, D]"""
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )  # fmt: skip
    return out[0].transpose(0, 1)


def _flash_4() -> Any:
    return importlib.import_module("flash_attn.cute.interface")


def _flash_4_mask(window: int, causal: bool) -> dict[str, Any]:
    """Return the arguments of FlashAttention-4 for what a token sees; `window` 0: no window."""
    reach = window - 1 if window else None
    both = {} if causal else {"window_size_right": reach}
    return {"causal": causal, "window_size_left": reach, **both}


# PyTorch's own way to FlashAttention-4, `activate_flash_attention_impl`, refuses every window in
# 2.11, also the one of causal attention, and GPUs of compute capability 12.
@torch.library.custom_op("finetune::flash_4", mutates_args=())
def flash_4(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    scale: float, window: int, causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (output [T, H, D], log-sum-exp of the scores, float32 [H, T])."""
    out, sums, *_ = _flash_4()._flash_attn_fwd(
        query, key, value, cu_seqlens_q=bounds, cu_seqlens_k=bounds, max_seqlen_q=longest,
        max_seqlen_k=longest, softmax_scale=scale, return_lse=True, **_flash_4_mask(window, causal),
    )  # fmt: skip
    return out.contiguous(), sums.contiguous()  # compilers rely on the strides of the fake


@flash_4.register_fake
def _flash_4_shapes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    scale: float, window: int, causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    length, heads, _ = query.shape
    sums = query.new_empty(heads, length, dtype=torch.float32)
    return query.new_empty(length, heads, value.shape[-1]), sums


@torch.library.custom_op("finetune::flash_4_backward", mutates_args=())
def _flash_4_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float,
    window: int, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    backward = _flash_4()._flash_attn_bwd
    # Without them it takes all tokens for the longest document; early versions have no such names.
    known = inspect.signature(backward).parameters
    at_most = {name: longest for name in ("max_seqlen_q", "max_seqlen_k") if name in known}
    of_query, of_key, of_value = backward(
        query, key, value, out, grad.contiguous(), sums, softmax_scale=scale,
        cu_seqlens_q=bounds, cu_seqlens_k=bounds, **_flash_4_mask(window, causal),
        deterministic=torch.are_deterministic_algorithms_enabled(), **at_most,
    )  # fmt: skip
    return of_query.contiguous(), of_key.contiguous(), of_value.contiguous()


@_flash_4_backward.register_fake
def _flash_4_backward_shapes(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, sums: torch.Tensor, bounds: torch.Tensor, longest: int, scale: float,
    window: int, causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    made = [tensor.new_empty(tensor.shape) for tensor in (query, key, value)]
    return made[0], made[1], made[2]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, bounds, ctx.longest, ctx.scale, ctx.window, ctx.causal = inputs
    ctx.save_for_backward(query, key, value, *output, bounds)
    ctx.set_materialize_grads(False)


def _through(ctx: Any, grad: torch.Tensor | None, of_sums: torch.Tensor | None) -> Any:
    if grad is None:
        return (None,) * 8
    rest = ctx.longest, ctx.scale, ctx.window, ctx.causal
    return *_flash_4_backward(grad, *ctx.saved_tensors, *rest), *(None,) * 5


flash_4.register_autograd(_through, setup_context=_keep)
