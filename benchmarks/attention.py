"""Compare kernels of causal attention inside documents, forward and backward.

    python benchmarks/attention.py              # heads of Llama-3.1-8B on a GPU, few on a CPU
    python benchmarks/attention.py --packs 1x8192 64x128 mixed8192 --heads 32 --key-heads 8

A pack 8x1024 has eight documents of 1,024 tokens; mixed8192 has documents of 60 to 600. Runs on a
GPU if there is one, with the kernels of all packages that are installed. In bfloat16; an error is
the root mean square of the difference to float32, as a share of float32's. FLOPs are those of the
products that each token takes part in; backward has 2.5 times as many.
"""

import argparse
import importlib
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chip

from finetune.models import attention, attention_choice, varlen_choice, varlen_cpu, varlen_gpu

MASKED = 8192  # tokens of the largest pack for which a mask is made
# (q [T, H, D], k, v [T, KV, D], lengths of documents) -> [T, H, D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, list[int]], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    packs = ["1x8192", "8x1024", "64x128", "mixed8192", "1x32768"]
    parser.add_argument(
        "--packs", nargs="+", type=documents, default=packs if chip.ON_GPU else ["1x256", "4x64"]
    )
    parser.add_argument("--heads", type=int, default=32 if chip.ON_GPU else 4)
    parser.add_argument("--key-heads", type=int, default=8 if chip.ON_GPU else 2)
    parser.add_argument("--width", type=int, default=128 if chip.ON_GPU else 32)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rate = chip.product_rate()
    print(f"{chip.about()}; a product of matrices reaches {rate / 1e12:.4g} TFLOP/s")
    for lengths in arguments.packs:
        lengths = documents(lengths) if isinstance(lengths, str) else lengths
        work = varlen_choice.Work(
            arguments.heads, arguments.key_heads, arguments.width, torch.bfloat16, False,
            tuple(lengths), tuple(sorted(set(lengths))),
        )  # fmt: skip
        print(f"\n{sum(lengths):,} tokens in {len(lengths)} documents, {arguments.heads} heads of "
              f"{arguments.width}, {arguments.key_heads} of keys and values\n")  # fmt: skip
        print(measure(work, arguments.rounds, rate))


def documents(pack: str) -> list[int]:
    """Return the lengths that a pack's name says."""
    if found := re.fullmatch(r"(\d+)x(\d+)", pack):
        return [int(found[2])] * int(found[1])
    if found := re.fullmatch(r"mixed(\d+)", pack):
        draw, left, lengths = random.Random(0), int(found[1]), []
        while left:
            lengths.append(min(left, draw.randint(60, 600)))
            left -= lengths[-1]
        return lengths
    raise argparse.ArgumentTypeError(f"{pack!r} is neither 8x1024 nor mixed8192")


def measure(work: varlen_choice.Work, rounds: int, rate: float) -> str:
    """Return the table of one pack."""
    ways, failed = available(work)
    lengths = list(work.documents)
    states = varlen_choice._states(work, lengths, torch.device(chip.DEVICE), work.dtype)
    exact = _exact(work, lengths)

    def timed(attend: Attend) -> Callable[[], list[float]]:
        def once() -> list[float]:
            found: list[torch.Tensor] = []
            leaves = [state.detach().requires_grad_() for state in states[:3]]
            flat = [leaf[0].transpose(0, 1) for leaf in leaves]
            forward = chip.seconds(lambda: found.append(attend(*flat, lengths)))
            outer = states[3][0].transpose(0, 1)
            backward = chip.seconds(
                lambda: found.extend(torch.autograd.grad(found[0], leaves, outer))
            )
            errors = [_error(own, right) for own, right in zip(found, exact)] if exact else [0.0]
            return [forward, backward, errors[0], max(errors[1:], default=0.0)]

        return once

    medians, broken = chip.alternate({name: timed(way) for name, way in ways.items()}, rounds)
    flops = 2 * work.heads * work.width * sum(length**2 for length in lengths)
    rows = [
        [
            name, f"{1e3 * forward:.3g}", f"{flops / forward / 1e12:.3g}",
            f"{1e3 * backward:.3g}", f"{2.5 * flops / backward / 1e12:.3g}",
            f"{3.5 * flops / (forward + backward) / rate:.0%}",
            f"{error:.1e}" if exact else "", f"{worst:.1e}" if exact else "",
        ]
        for name, (forward, backward, error, worst) in medians.items()
    ]  # fmt: skip
    head = [
        "", "forward, ms", "TFLOP/s", "backward, ms", "TFLOP/s", "of a product's rate",
        "error of output", "of the worst gradient",
    ]  # fmt: skip
    return chip.table(head, rows) + chip.notes(failed | broken)


def _exact(work: varlen_choice.Work, lengths: list[int]) -> list[torch.Tensor]:
    """Return output and gradients in float32; none where a document's scores would not fit."""
    if max(lengths) > MASKED:
        return []
    states = varlen_choice._states(work, lengths, torch.device(chip.DEVICE), torch.float32)
    return varlen_choice._exact(states, lengths, None)


def _error(own: torch.Tensor, right: torch.Tensor) -> float:
    difference = (own.detach().float() - right).square().mean() / right.square().mean()
    return difference.sqrt().item()


def available(work: varlen_choice.Work) -> tuple[dict[str, Attend], dict[str, str]]:
    """Return what can be tried on this device, and why not the rest."""
    found: dict[str, Attend] = {}
    failed: dict[str, str] = {}
    if chip.ON_GPU:
        capability = torch.cuda.get_device_capability()
        for kernel in (attention_choice.FLASH_2, *attention_choice.BY_SETTING):
            why = ""
            if kernel != attention_choice.FLASH_2:
                why = varlen_choice.missing(kernel, work, capability, attention_choice.has_package)
            if why:
                failed[f"ours, {kernel}"] = why
            else:
                found[f"ours, {kernel}"] = ours_by(kernel)
    else:
        found["ours"] = ours
    backends = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
    if chip.ON_GPU:
        backends |= {
            "cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }  # fmt: skip
        found["torch, cuDNN for packs"] = cudnn_for_packs
        found["flex_attention, compiled"] = flex
        found["flash-attn 2"] = package("flash_attn")
        found["flash-attn 3"] = package("flash_attn_interface")
        found["flash-attn 4"] = package("flash_attn.cute")
    for name, backend in backends.items():
        found[f"SDPA, {name}, each document"] = each_document(backend)
    if sum(work.documents) <= MASKED and len(work.documents) > 1:
        found["SDPA, mask of documents"] = masked
    return found, failed


def ours(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """What a layer calls."""
    states = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out, _ = attention.attend_within_documents(
        torch.nn.Module(), *states, None, cu_seq_lens_q=bounds(lengths), max_length_q=max(lengths),
        document_lengths=SimpleNamespace(values=tuple(lengths)),
    )  # fmt: skip
    return out[0]


def ours_by(kernel: str) -> Attend:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        if varlen_gpu.in_use() != kernel:
            varlen_gpu.use(kernel)
        return ours(query, key, value, lengths)

    return attend


def bounds(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().to(chip.DEVICE)


def each_document(backend: SDPBackend) -> Attend:
    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
        parts = [part for part, _ in varlen_cpu.each(lengths, 0, q.device)]
        with sdpa_kernel([backend]):
            outs = [_sdpa(q[:, :, part], k[:, :, part], v[:, :, part]) for part in parts]
        return torch.cat(outs, 2)[0].transpose(0, 1)

    return attend


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    grouped = k.shape[1] != q.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


def masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """All T x T scores, and a mask: what a framework does without a kernel for documents."""
    of = torch.repeat_interleave(
        torch.arange(len(lengths)), torch.tensor(lengths), output_size=sum(lengths)
    ).to(query.device)
    mask = (of[:, None] == of[None, :]).tril()
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, enable_gqa=k.shape[1] != q.shape[1]
    )
    return out[0].transpose(0, 1)


def cudnn_for_packs(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """The operator under varlen_attn: of 2.14 on, with this window, it takes cuDNN's kernel.

    Only where documents have over 128 tokens, on compute capability 9 and 10, with cuDNN 9.18.
    """
    times, of, longest = query.shape[1] // key.shape[1], bounds(lengths), max(lengths)
    k, v = (tensor.repeat_interleave(times, 1) for tensor in (key, value))
    operator: Any = torch.ops.torch_attn._varlen_attn
    out: torch.Tensor = operator(
        query, k, v, of, of, longest, longest, True, query.shape[-1] ** -0.5, [-1, -1]
    )[0]
    return out


_flex: Any = None


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
) -> torch.Tensor:
    """Compiled by Inductor for a mask of blocks, which is part of the time."""
    global _flex
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _flex = _flex or torch.compile(flex_attention)
    of = torch.repeat_interleave(
        torch.arange(len(lengths), device=query.device),
        torch.tensor(lengths, device=query.device), output_size=sum(lengths),
    )  # fmt: skip

    def sees(_b: Any, _h: Any, at: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (of[at] == of[other]) & (at >= other)

    total = sum(lengths)
    mask = create_block_mask(sees, None, None, total, total, device=query.device)
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    out: torch.Tensor = _flex(q, k, v, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out[0].transpose(0, 1)


def package(module: str) -> Attend:
    """The function for packs of flash-attn 2, 3 or 4, as its package has it."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int]
    ) -> torch.Tensor:
        call: Any = importlib.import_module(module).flash_attn_varlen_func
        of, longest = bounds(lengths), max(lengths)
        out: Any = call(
            query, key, value, cu_seqlens_q=of, cu_seqlens_k=of, max_seqlen_q=longest,
            max_seqlen_k=longest, causal=True,
        )  # fmt: skip
        return out[0] if isinstance(out, tuple) else out

    return attend


if __name__ == "__main__":
    main()
