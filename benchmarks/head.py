"""Loss and gradients of the output projection: ours compared with PyTorch's and others', on a GPU
or a CPU.

    python benchmarks/head.py                                            # 1,000 tokens, width 1,024, vocabulary 32,000
    python benchmarks/head.py --tokens 16384 --width 4096 --vocabulary 128256

Each is asked for the sum of the losses and the gradients of hidden states and weights, under bf16
autocast, as a step asks. They take turns in one process, so that noise falls on all; peak memory
comes from one process each. Errors are those of the gradients against float64.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.models import cross_entropy, logits

Loss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # hidden [S, H], weight [V, H], targets [S]
CHUNK = 256
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    hidden, weight, targets = made(*sizes)
    if arguments.memory_of:
        before = peak_bytes()
        once(ways()[arguments.memory_of], hidden, weight, targets)
        print(peak_bytes() - before)
        return
    named = (
        torch.cuda.get_device_name()
        if DEVICE == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    print(
        f"{named}; torch {torch.__version__}; {sizes[0]} tokens, width {sizes[1]}, vocabulary "
        f"{sizes[2]}\n"
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways()}
    for turn in range(arguments.rounds + 1):
        for name, way in ways().items():
            took = once(way, hidden, weight, targets)
            if turn:  # the first compiles
                seconds[name].append(took)
    exact = gradients(plain, hidden.double(), weight.double(), targets, autocast=False)
    fastest = statistics.median(seconds["ours"])
    print(
        "| | ms | ours is faster by | memory | error of hidden's | of weight's gradient |\n"
        + "| --- " * 6
        + "|"
    )
    for name, way in ways().items():
        found = gradients(way, hidden, weight, targets)
        errors = [
            ((got.double() - right).norm() / right.norm()).item()
            for got, right in zip(found, exact)
        ]
        median, memory = statistics.median(seconds[name]), memory_of(name) / 1e9
        print(
            f"| {name} | {median * 1e3:.0f} | {median / fastest:.2f}x | {memory:.2f} GB | "
            f"{errors[0]:.1e} | {errors[1]:.1e} |"
        )


def ways() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "all logits": plain,
        "ours": ours,
        "compiled chunks": compiled,
        "torch, chunked": chunked,
    }
    if DEVICE == "cuda":  # Triton's
        try:
            import liger_kernel  # noqa: F401

            found["liger"] = liger
        except ImportError:
            pass
    return found


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum"
    )


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    head = torch.nn.Linear(1, 1, bias=False)
    head.weight = (
        torch.nn.Parameter(weight) if not isinstance(weight, torch.nn.Parameter) else weight
    )
    return cross_entropy.nll_in_chunks(
        head, head.forward, hidden, targets, len(weight), logits.LogitTransform()
    )


_compiled = torch.compile(plain, dynamic=False)


def compiled(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What a compiler makes of the plain loss, a chunk at a time, done again for the gradient."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK))
    return torch.stack(
        [checkpoint(_compiled, part, weight, of, use_reentrant=False) for part, of in parts]
    ).sum()


def chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """PyTorch's own, from 2.13, at the best settings found; it heeds no autocast, and its loss is
    in 16 bits.
    """
    options = torch.nn.LinearCrossEntropyOptions(acc_policy="balanced", batch_chunk_size=CHUNK)
    dtype = torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else hidden.dtype
    loss = F.linear_cross_entropy(
        hidden.to(dtype), weight.to(dtype), targets, reduction="sum", options=options
    )
    return loss.float()


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: torch.Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(
        weight.bfloat16(), hidden.bfloat16(), targets
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
    targets: torch.Tensor,
    *,
    autocast: bool = True,
) -> list[torch.Tensor]:
    leaves = [hidden.detach().clone().requires_grad_(), torch.nn.Parameter(weight.detach().clone())]
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        loss = way(*leaves, targets)
    return list(torch.autograd.grad(loss, leaves))


def once(way: Loss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> float:
    """Seconds."""
    leaf = hidden.detach().requires_grad_()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = way(leaf, weight, targets)
    torch.autograd.grad(loss, [leaf, weight])
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def memory_of(name: str) -> float:
    """Bytes that one pass adds, in a process of its own."""
    done = subprocess.run(
        [sys.executable, *sys.argv, "--memory-of", name], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would be that of the process before it became this one.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


if __name__ == "__main__":
    main()
