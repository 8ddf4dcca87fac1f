"""Rates of GPUs in matrix products of 16 bits, and the share of them that a run uses."""

import functools
import math
import re
import time

import torch

# Words of a GPU's name -> peak dense rate of 16-bit matrix products that add up in float32, in
# TFLOP/s, from the vendors' data sheets; of a GeForce twice its float32 rate. The first entry whose
# words are all in the name counts.
PEAK_16_BITS = {
    ("GB300",): 2500, ("B300",): 2250, ("GB200",): 2500, ("B200",): 2250,
    ("GH200",): 989, ("H200", "NVL"): 835, ("H200",): 989, ("H100", "NVL"): 835,
    ("H100", "PCIe"): 756, ("H100",): 989, ("H800",): 989, ("H20",): 148,
    ("A100",): 312, ("A800",): 312, ("A40",): 149.7, ("A30",): 165, ("A10",): 125,
    ("L40S",): 362, ("L40",): 181, ("L4",): 121,
    ("RTX", "6000", "Ada"): 364, ("RTX", "A6000"): 154.8,
    ("RTX", "5090"): 209.5, ("RTX", "5080"): 112.6,
    ("RTX", "5070", "Ti"): 87.9, ("RTX", "5070"): 61.7,
    ("RTX", "5060", "Ti"): 47.4, ("RTX", "5060"): 38.4,
    ("RTX", "4090"): 165.2, ("RTX", "4080", "SUPER"): 104.4, ("RTX", "4080"): 97.5,
    ("RTX", "4070", "Ti", "SUPER"): 88.2, ("RTX", "4070", "Ti"): 80.2,
    ("RTX", "4070", "SUPER"): 71, ("RTX", "4070"): 58.3,
    ("RTX", "4060", "Ti"): 44.1, ("RTX", "4060"): 30.2,
    ("RTX", "3090", "Ti"): 80, ("RTX", "3090"): 71.2,
    ("RTX", "3080", "Ti"): 68.2, ("RTX", "3080"): 59.5,
    ("RTX", "3070", "Ti"): 43.5, ("RTX", "3070"): 40.6,
    ("RTX", "3060", "Ti"): 32.4, ("RTX", "3060"): 25.5,
    ("MI355X",): 2500, ("MI325X",): 1307, ("MI300X",): 1307,
}  # fmt: skip
SLOWER = {"Laptop", "Max", "D"}  # words of cards that have the name of a faster one
PRODUCTS = 8  # to measure a rate by; the first ones load the kernel


def peak_rate(gpu: str) -> float | None:
    """Return the FLOP/s of a GPU by its name; None if unknown."""
    words = set(re.split(r"[\s-]+", gpu))
    if words & SLOWER:
        return None
    rates = (rate for needed, rate in PEAK_16_BITS.items() if words.issuperset(needed))
    return next((1e12 * rate for rate in rates), None)


@functools.cache
def rate_here() -> float | None:
    """Return the FLOP/s of this process's GPU: of the table, or measured if it is not in there.

    None without a GPU.
    """
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return peak_rate(torch.cuda.get_device_name(device)) or measured_rate(device)


def measured_rate(device: torch.device, width: int = 4096) -> float | None:
    """Return the FLOP/s of the fastest of some 16-bit products; None if none can be made."""
    fastest = math.inf
    try:
        left, right = torch.randn(2, width, width, device=device).to(torch.bfloat16)
        for _ in range(PRODUCTS):
            _wait(device)
            began = time.perf_counter()
            torch.mm(left, right)
            _wait(device)
            fastest = min(fastest, time.perf_counter() - began)
    except RuntimeError:  # out of memory, or no products of bfloat16
        return None
    return 2 * width**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def utilisation(
    tokens_per_second: float, flops_per_token: float, peak: float | None, num_processes: int
) -> float | None:
    """Return the model FLOPs utilisation, of the GPUs' 16-bit peak; None if unknown."""
    if not peak or not flops_per_token:
        return None
    return float(f"{tokens_per_second * flops_per_token / (peak * num_processes):.4g}")
