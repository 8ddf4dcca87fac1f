"""Attention that respects document boundaries, registered with transformers as "documents".

Sequences lie end to end in one row; `cu_seq_lens_q` says where documents start. Each document
attends to itself only, without any mask tensor: T tokens in documents of length n cost the sum of
n^2, not T^2. Causally, or as "documents_both_ways" for encoders: there each token of a document
sees all of them.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from finetune.errors import ModelError
from finetune.models import context_parallel, varlen_cpu, varlen_gpu
from finetune.models.attention_choice import BOTH_WAYS, DOCUMENTS, HEAD_UNIT
from finetune.models.key_values import KeyValues

LARGEST_HEAD = 256  # of FlashAttention-2


def attend_within_documents(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None, document_lengths: SimpleNamespace | None = None,
    sequence_group: Any = None, causal: bool = True, shared_tokens: torch.Tensor | None = None,
    own_places: torch.Tensor | None = None, key_values: KeyValues | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query [1, H, T, D], key and value [1, KV, T, D] -> ([1, T, H, D], None).

    `causal`: no token sees those after it; `sliding_window` then counts those before, else both.
    `key_values`: what `KeyValues.read` or `grow` has begun, for sequences that are continued.
    `document_lengths.values`: the bounds as the host knows them; inside an object, as a compiled
    layer would be compiled anew for each length of a tuple. Where a group of processes shares the
    sequence, T is that of the own stretch, and bounds are those of the whole. Where documents
    share tokens, T counts these once; `shared_tokens` and `own_places` as in data/batches. Raises
    ModelError for what it would otherwise ignore: soft caps, sinks, position biases.
    """
    unsupported = ("softcap", "s_aux", "position_bias")
    ignored = [name for name in unsupported if kwargs.get(name) is not None]
    if not torch.compiler.is_compiling() and _is_sliding(module) and sliding_window is None:
        ignored.append("sliding windows")  # this model leaves them to a mask, which is missing here
    if ignored or cu_seq_lens_q is None or max_length_q is None:
        of_model = f"{' and '.join(ignored)} of this model"
        what = of_model if ignored else "a call without document bounds"
        raise ModelError(f"model.attention: {DOCUMENTS} cannot do {what}; use eager")
    if torch.is_autocast_enabled(
        query.device.type
    ):  # norms of queries and keys in float32 would leave them so
        half = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(half), key.to(half), value.to(half)
    if key_values is not None:
        if key_values.continues:
            scale = _scale(query, scaling)
            return key_values.attend(query, key, value, scale, sliding_window), None
        key_values.store(key, value)
    if sequence_group is not None:
        count = torch.distributed.get_world_size(sequence_group)
        # Too few heads of keys and values to go round: each head of queries gets its own.
        if key.shape[1] % count:
            key, value = _repeated(query, key), _repeated(query, value)
        all_states = (query, key, value)
        query, key, value = (
            context_parallel.exchange(states, sequence_group, 1, 2) for states in all_states
        )
    if shared_tokens is not None:
        query, key, value = (
            states.index_select(2, shared_tokens) for states in (query, key, value)
        )
    out = _attend(
        query, key, value, cu_seq_lens_q, max_length_q, document_lengths, scaling, dropout,
        sliding_window, causal,
    )  # fmt: skip
    if own_places is not None:
        out = out.index_select(1, own_places)
    if sequence_group is not None:
        out = context_parallel.exchange(out, sequence_group, 1, 2)
    return out, None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    lengths: SimpleNamespace | None, scaling: float | None, dropout: float,
    sliding_window: int | None, causal: bool = True,
) -> torch.Tensor:  # fmt: skip
    """query [1, H, T, D], key, value [1, KV, T, D], bounds int32 [documents + 1] -> [1, T, H, D]"""
    heads, shared = query.shape[1], key.shape[1]
    if heads % shared:
        raise ModelError(f"{heads} heads cannot share {shared} heads of keys and values evenly")
    scale = _scale(query, scaling)
    plain = dropout == 0.0 and query.shape[-1] == value.shape[-1]
    fits = query.is_cuda and query.dtype != torch.float32 and query.shape[-1] <= LARGEST_HEAD
    if plain and fits and _has_flash_kernels(query.device):
        return _varlen(query, key, value, bounds, longest, lengths, scale, sliding_window, causal)
    if plain and query.device.type == "cpu":
        window = sliding_window or 0
        out, _ = varlen_cpu.one_by_one(query, key, value, bounds, scale, window, causal)
        return out
    if lengths is None:  # a call without a batch: this waits for the device
        lengths = SimpleNamespace(values=varlen_cpu.lengths_of(bounds))
    return _one_by_one(query, key, value, lengths, scale, dropout, sliding_window or 0, causal)


def _scale(query: torch.Tensor, scaling: float | None) -> float:
    return float(query.shape[-1] ** -0.5) if scaling is None else scaling


@torch.compiler.assume_constant_result
def _has_flash_kernels(device: torch.device) -> bool:
    """Ask once, while a layer is compiled: `get_device_capability` would cut its graph in two."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: torch.Tensor, longest: int,
    lengths: SimpleNamespace | None, scale: float, sliding_window: int | None, causal: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Attend by the GPU's kernel of this run; shapes as in `_attend`."""
    width, filler = query.shape[-1], -query.shape[-1] % HEAD_UNIT
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    if filler:  # zeros add nothing to the scores, and what they add to the output is cut off
        q, k, v = (F.pad(states, (0, filler)) for states in (q, k, v))
    out = varlen_gpu.attend(q, k, v, bounds, longest, lengths, scale, sliding_window, causal)
    return out[None, ..., :width] if filler else out[None]


@torch.compiler.disable  # a loop over lengths, which would be compiled anew for each pack
def _one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: SimpleNamespace,
    scale: float, dropout: float, window: int, causal: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Attend to a document at a time by SDPA: in float32, with dropout, large heads, older GPUs."""
    all_states, outputs = (query, _repeated(query, key), _repeated(query, value)), []
    for part, band in varlen_cpu.each(lengths.values, window, query.device, causal):
        q, k, v = (states[:, :, part] for states in all_states)
        is_causal = causal and band is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=band, is_causal=is_causal, dropout_p=dropout, scale=scale
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _repeated(query: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Repeat keys or values [1, KV, T, D] -> [1, H, T, D] for the heads that share them."""
    times = query.shape[1] // states.shape[1]
    return states.repeat_interleave(times, dim=1) if times > 1 else states


def _is_sliding(module: torch.nn.Module) -> bool:
    types = getattr(getattr(module, "config", None), "layer_types", None)
    layer = getattr(module, "layer_idx", None)
    return types is not None and layer is not None and types[layer] == "sliding_attention"


# Without a mask function of its own: transformers then builds none, and does not look for packs in
# the positions, for which it would wait for the GPU once a pass.
AttentionInterface.register(DOCUMENTS, attend_within_documents)
AttentionInterface.register(BOTH_WAYS, functools.partial(attend_within_documents, causal=False))
