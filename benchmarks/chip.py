"""What a device reaches, for attention.py, head.py and optim.py to hold a kernel's rate beside."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"


def about() -> str:
    """Return device and version in one line."""
    name = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}"


def seconds(work: Callable[[], Any]) -> float:
    """Return the time of `work`, to the end of what it started on the GPU."""
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def alternate(
    ways: Mapping[str, Callable[[], Sequence[float]]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return the medians of what each way measures, and why others failed.

    They alternate, to share the machine's noise; a first round, which compiles, is left out.
    """
    measured: dict[str, list[Sequence[float]]] = {name: [] for name in ways}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if name in failed:
                continue
            try:
                found = way()
            except Exception as exc:  # of a compiler, a loader, a kernel of any library
                failed[name] = f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:150]}"
                continue
            if turn:
                measured[name].append(found)
    medians = {
        name: [statistics.median(column) for column in zip(*turns)]
        for name, turns in measured.items()
        if turns and name not in failed
    }
    return medians, failed


def product_rate(size: int | None = None) -> float:
    """Return the FLOP/s of a large bfloat16 product."""
    size = size or (8192 if ON_GPU else 1024)
    left, right = (torch.randn(size, size, device=DEVICE).bfloat16() for _ in range(2))
    return 2 * size**3 / min(seconds(lambda: left @ right) for _ in range(5))


def bandwidth(size: int | None = None) -> float:
    """Return the bytes a second that a copy reads and writes."""
    size = size or (1 << 30 if ON_GPU else 1 << 26)
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / min(seconds(lambda: target.copy_(source)) for _ in range(5))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def notes(failed: Mapping[str, str]) -> str:
    return "".join(f"\n- cannot run here: {name}: {why}" for name, why in failed.items())
