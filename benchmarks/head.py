"""Compare loss and gradients of the output projection with PyTorch's and others'.

    python benchmarks/head.py                  # 1,000 tokens, width 1,024, vocabulary 32,000
    python benchmarks/head.py --tokens 16384 --width 4096 --vocabulary 128256

Runs on a GPU if there is one, with Liger's kernel and cut-cross-entropy where they are installed.
Each computes the sum of the losses and the gradients of hidden states and weights under bf16
autocast, as in a step. They alternate in one process, to share its noise; peak memory is measured
in one process each. The rate is that of three products, as a share of what one product reaches.
Errors are of gradients against float64.
"""

import argparse
import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chip
from chip import DEVICE

from finetune.models import cross_entropy, logits

# (hidden [S, H], weight [V, H], labels [S]) -> loss
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CHUNK = 256


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-of", choices=ways(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.tokens, arguments.width, arguments.vocabulary
    hidden, weight, labels = made(*sizes)
    if arguments.memory_of:
        before = peak_bytes()
        once(ways()[arguments.memory_of], hidden, weight, labels)
        print(peak_bytes() - before)
        return
    rate = chip.product_rate()
    print(
        f"{chip.about()}; {sizes[0]} tokens, width {sizes[1]}, vocabulary {sizes[2]}; a product of "
        f"matrices reaches {rate / 1e12:.4g} TFLOP/s\n"
    )

    def timed(way: Loss) -> Callable[[], list[float]]:
        return lambda: [once(way, hidden, weight, labels)]

    medians, failed = chip.alternate(
        {name: timed(way) for name, way in ways().items()}, arguments.rounds
    )
    exact = gradients(plain, hidden.double(), weight.double(), labels, autocast=False)
    rows, flops = [], 6 * sizes[0] * sizes[1] * sizes[2]
    for name, (median,) in medians.items():
        found = gradients(ways()[name], hidden, weight, labels)
        errors = [
            ((got.double() - right).norm() / right.norm()).item()
            for got, right in zip(found, exact)
        ]
        rows.append([
            name, f"{1e3 * median:.3g}", f"{median / medians['ours'][0]:.2f}x",
            f"{flops / median / rate:.0%}", f"{memory_of(name) / 1e9:.2f} GB",
            *(f"{error:.1e}" for error in errors),
        ])  # fmt: skip
    head = [
        "", "ms", "ours is faster by", "of a product's rate", "memory", "error of hidden's",
        "of weight's gradient",
    ]  # fmt: skip
    print(chip.table(head, rows) + chip.notes(failed))


def ways() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "all logits": plain,
        "ours": ours,
        "compiled chunks": compiled,
        "torch, chunked": chunked,
    }
    if DEVICE == "cuda":  # Triton kernels
        found["ours, plain operations"] = without_kernel
        for name, module, way in (
            ("liger", "liger_kernel", liger),
            ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
        ):
            if importlib.util.find_spec(module):
                found[name] = way
    return found


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels, reduction="sum"
    )


def ours(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = (
        torch.nn.Parameter(weight) if not isinstance(weight, torch.nn.Parameter) else weight
    )
    return cross_entropy.nll_in_chunks(
        head, head.forward, hidden, labels, len(weight), logits.LogitTransform()
    )


def without_kernel(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Ours where Triton is not there."""
    fused = logits.fused
    logits.fused = lambda device: (None, "")
    try:
        return ours(hidden, weight, labels)
    finally:
        logits.fused = fused


@functools.cache
def _compiled() -> Loss:
    return torch.compile(plain, dynamic=False)


def compiled(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compile the plain loss of a chunk, and recompute it for the gradient."""
    parts = zip(hidden.split(CHUNK), labels.split(CHUNK))
    return torch.stack(
        [checkpoint(_compiled(), part, weight, of, use_reentrant=False) for part, of in parts]
    ).sum()


def chunked(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Use PyTorch's own, from 2.13 on, at the best settings found.

    It ignores autocast, and its loss has 16 bits.
    """
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="balanced", batch_chunk_size=CHUNK)
    dtype = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else hidden.dtype
    loss = F.linear_cross_entropy(
        hidden.to(dtype), weight.to(dtype), labels, reduction="sum", options=options
    )
    return loss.float()


def liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
        weight.bfloat16(), hidden.bfloat16(), labels
    )
    return loss


def cut_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Logits stay in registers and are computed again for the gradient (Wijmans et al., 2025)."""
    from cut_cross_entropy import linear_cross_entropy

    loss: torch.Tensor = linear_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), labels, reduction="sum"
    )
    return loss


def made(
    tokens: int, width: int, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, device=DEVICE) / width**0.5)
    return hidden, weight, torch.randint(vocabulary, (tokens,), device=DEVICE)


def gradients(
    way: Loss,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    autocast: bool = True,
) -> list[torch.Tensor]:
    leaves = [hidden.detach().clone().requires_grad_(), torch.nn.Parameter(weight.detach().clone())]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = way(*leaves, labels)
    return list(torch.autograd.grad(loss, leaves))


def once(way: Loss, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the seconds of loss and gradients."""
    leaf = hidden.detach().requires_grad_()

    def work() -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = way(leaf, weight, labels)
        torch.autograd.grad(loss, [leaf, weight])

    return chip.seconds(work)


def memory_of(name: str) -> float:
    """Return the bytes that one pass adds, measured in its own process."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss includes the process that forked this one.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main()
