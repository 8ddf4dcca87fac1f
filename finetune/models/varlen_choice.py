"""Which kernel attends inside documents on a GPU: those that agree with float32, by their speed.

On a Hopper GPU FlashAttention-2, which PyTorch brings, has half the rate of cuDNN's kernel
(docs/performance.md). So a run asks which kernels there are, compares each with float32, times
those that agree on its own longest batch, and takes the fastest.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from finetune import kernels
from finetune.errors import ModelError
from finetune.models import varlen_cpu, varlen_gpu
from finetune.models.attention_choice import (
    BY_SETTING,
    CUDNN,
    FLASH_2,
    FLASH_3,
    FLASH_4,
    HEAD_UNIT,
    has_package,
)

# cuDNN makes a plan for each length that it sees, which takes tens of milliseconds, and takes a
# document at a time: for packs of a few long documents of a few lengths.
MOST_LENGTHS, LONG_DOCUMENT = 8, 2048
# What kernels are compared on. cuDNN refuses documents of one token, and gets long ones only.
DOCUMENTS, CUDNN_DOCUMENTS = (7, 1, 130, 200), (65, 130, 64, 200)
# In 16 bits kernels differ from float32 by two to four roundings of bfloat16 (2^-9 each), by the
# root mean square; a document that sees one token too many by more than a tenth.
WITHIN = 2e-2
MOST_TIMED = 1 << 15  # tokens; the states of 32 heads of 128 take 0.3 GB each
WORTH = 0.95  # of the time of FlashAttention-2: timings differ by some percent by themselves


@dataclass(frozen=True)
class Work:
    """What a run asks of attention: the shape of a layer, and documents of its longest batch."""

    heads: int
    key_heads: int
    width: int
    dtype: torch.dtype
    has_windows: bool
    documents: tuple[int, ...]
    """Tokens of each document of the longest batch."""
    lengths: tuple[int, ...]
    """The different lengths that documents of the run have."""
    causal: bool = True
    """Whether no token sees those after it."""


Attend = Callable[..., torch.Tensor]
"""(q [T, H, D], k, v [T, KV, D], bounds, longest, lengths, scale, window, causal) -> [T, H, D]"""


def missing(
    kernel: str, work: Work, capability: tuple[int, int], has: Callable[[str], bool]
) -> str:
    """Return why a kernel cannot do this work, or "". `has`: whether a package is installed."""
    if kernels.is_left_out(kernel):
        return f"{kernels.WITHOUT} names it"
    chip, major = f"compute capability {capability[0]}.{capability[1]}", capability[0]
    if kernel == FLASH_3 and major != 9:
        return f"it needs compute capability 9.0 (Hopper), and this GPU has {chip}"
    if kernel == FLASH_3 and not has("flash-attn-3"):
        return "flash-attn-3 is not installed"
    if kernel == FLASH_4 and major not in (9, 10, 12):
        return f"it needs compute capability 9, 10 or 12 (Hopper, Blackwell), and this is {chip}"
    if kernel == FLASH_4 and not has("flash-attn-4"):
        return "flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    if kernel == FLASH_4 and work.width > (256 if major == 9 else 128):
        return f"it has no heads of {work.width} on {chip}"
    if kernel == CUDNN:
        if major not in (9, 10):
            return f"it is faster on compute capability 9 and 10 only, and this is {chip}"
        if work.has_windows or work.width > 128:
            return "sliding windows" if work.has_windows else f"heads of {work.width}"
        if len(work.lengths) > MOST_LENGTHS or min(work.lengths) < LONG_DOCUMENT:
            return (
                f"it makes a plan for each length, and documents of this run have "
                f"{len(work.lengths):,} lengths, from {min(work.lengths):,} tokens"
            )
    return ""


def work_of(
    config: Any, dtype: torch.dtype, documents: Sequence[int], lengths: Iterable[int],
    num_context: int = 1, causal: bool = True,
) -> Work:  # fmt: skip
    """Return what a model of this `config` of transformers asks of a layer's attention.

    `documents`, `lengths`: see `Work`. `num_context`: processes that share heads.
    """
    text = config.get_text_config()
    heads: int = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if key_heads % num_context:  # each head of queries gets its own
        key_heads = heads
    layers = getattr(text, "layer_types", None)
    windows = "sliding_attention" in layers if layers else bool(_window(text))
    return Work(
        heads // num_context, key_heads // num_context, width + -width % HEAD_UNIT, dtype, windows,
        tuple(documents), tuple(sorted(set(lengths))), causal,
    )  # fmt: skip


def _window(text: Any) -> int | None:
    """Return the window of sliding attention; some configs name one that they do not use."""
    return getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else 0


def choose(work: Work, device: torch.device, wanted: str | None = None) -> tuple[str, str]:
    """Return the kernel for a run, and a line that says which and why.

    `wanted`: the one that model.attention names. Raises ModelError if that is not there, or wrong.
    """
    capability = torch.cuda.get_device_capability(device)
    reasons = {kernel: missing(kernel, work, capability, has_package) for kernel in BY_SETTING}
    if wanted is not None:
        if why := reasons[wanted] or wrong(wanted, work, device):
            raise ModelError(f"model.attention: {wanted} cannot be used: {why}; use auto")
        return wanted, wanted
    tried = [kernel for kernel in BY_SETTING if not reasons[kernel]]
    failed = {kernel: why for kernel in tried if (why := wrong(kernel, work, device))}
    good = [FLASH_2, *(kernel for kernel in tried if kernel not in failed)]
    took = {}
    if good[1:]:
        try:
            took = {kernel: milliseconds(kernel, work, device) for kernel in good}
        except torch.OutOfMemoryError:  # a run that needs all of the memory is not timed
            torch.cuda.empty_cache()
    used = fastest(took) if took else FLASH_2
    return used, described(used, took, failed)


def fastest(milliseconds: dict[str, float]) -> str:
    """Return the fastest kernel: FlashAttention-2, unless another is clearly faster."""
    best = min(milliseconds, key=lambda kernel: milliseconds[kernel])
    return best if milliseconds[best] < WORTH * milliseconds[FLASH_2] else FLASH_2


def described(used: str, took: dict[str, float], failed: dict[str, str]) -> str:
    """Say which kernel a run takes, beside the times and failures of the others."""
    others = [f"{kernel} {ms:.1f}" for kernel, ms in took.items() if kernel != used]
    line = used
    if took:
        line += f": {took[used]:.1f} ms a layer for the longest batch ({', '.join(others)})"
    return "; ".join([line, *(f"{kernel} cannot be used: {why}" for kernel, why in failed.items())])


_COMPARED = ("output", "gradient of queries", "gradient of keys", "gradient of values")


def wrong(kernel: str, work: Work, device: torch.device, attend: Attend = varlen_gpu.attend) -> str:
    """Return what is wrong with a kernel's outputs or gradients beside float32's, or ""."""
    documents = CUDNN_DOCUMENTS if kernel == CUDNN else DOCUMENTS
    window = 40 if work.has_windows else None
    try:
        states = _states(work, documents, device, work.dtype)
        found = _run(kernel, states, documents, attend, window, work.causal)
        whole = _states(work, documents, device, torch.float32)
        exact = _exact(whole, documents, window, work.causal)
    except Exception as exc:  # of a compiler, a loader, the kernel itself
        return kernels.reason(exc)
    for name, own, right in zip(_COMPARED, found, exact):
        error = kernels.error(own, right)
        if not error <= WITHIN:
            return f"its {name} is {error:.1%} away from float32's, more than {WITHIN:.0%}"
    return ""


def _states(
    work: Work, documents: Sequence[int], device: torch.device, dtype: torch.dtype,
    random: torch.Generator | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """Return query, key, value and a gradient [1, heads, T, D] at random, as a layer gives them."""
    random, total = random or torch.Generator().manual_seed(0), sum(documents)
    heads = (work.heads, work.key_heads, work.key_heads, work.heads)
    shapes = ((1, total, number, work.width) for number in heads)
    made = (torch.randn(shape, generator=random, device=random.device) for shape in shapes)
    # Rounded first: float32 gets the same numbers.
    states = [each.to(work.dtype).to(device, dtype).transpose(1, 2) for each in made]
    return [*(each.requires_grad_() for each in states[:3]), states[3]]


def _run(
    kernel: str,
    states: list[torch.Tensor],
    documents: Sequence[int],
    attend: Attend,
    window: int | None = None,
    causal: bool = True,
) -> list[torch.Tensor]:
    """Return output [T, H, D] and gradients [1, heads, T, D] of a kernel."""
    query, key, value, grad = states
    bounds = torch.tensor([0, *documents]).cumsum(0).int().to(query.device)
    before = varlen_gpu.in_use()
    varlen_gpu.use(kernel)
    try:
        flat = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        lengths, scale = SimpleNamespace(values=tuple(documents)), query.shape[-1] ** -0.5
        out = attend(*flat, bounds, max(documents), lengths, scale, window, causal)
        return [out, *torch.autograd.grad(out, [query, key, value], grad[0].transpose(0, 1))]
    finally:
        varlen_gpu.use(before)


def _exact(
    states: list[torch.Tensor], documents: Sequence[int], window: int | None, causal: bool = True
) -> list[torch.Tensor]:
    """Return the same in float32, a document at a time, by products and a softmax."""
    query, key, value, grad = states
    times = query.shape[1] // key.shape[1]
    keys, values = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    outputs = []
    with sdpa_kernel([SDPBackend.MATH]):
        for part, band in varlen_cpu.each(documents, window or 0, query.device, causal):
            q, k, v = query[:, :, part], keys[:, :, part], values[:, :, part]
            is_causal = causal and band is None
            outputs.append(
                F.scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=is_causal)
            )
    out = torch.cat(outputs, 2)
    grads = torch.autograd.grad(out, [query, key, value], grad)
    return [out[0].transpose(0, 1), *grads]


def milliseconds(
    kernel: str, work: Work, device: torch.device, attend: Attend = varlen_gpu.attend,
    rounds: int = 5,
) -> float:  # fmt: skip
    """Return the least time of a layer's attention, forward and backward, for the longest batch."""
    documents, took = _first(work.documents), []
    states = _states(work, documents, device, work.dtype, torch.Generator(device))
    for _ in range(2 + rounds):  # the first two compile, and fill caches
        _wait(device)
        start = time.perf_counter()
        _run(kernel, states, documents, attend, causal=work.causal)
        _wait(device)
        took.append(1e3 * (time.perf_counter() - start))
    return min(took[2:])


def _first(documents: Sequence[int]) -> list[int]:
    """Return the first documents, of MOST_TIMED tokens at most; longer ones rank kernels alike."""
    room, found = MOST_TIMED, []
    for length in documents:
        found.append(min(length, room))
        room -= found[-1]
        if not room:
            break
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
