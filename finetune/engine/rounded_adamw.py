"""AdamW on bfloat16 weights, computed in float32 and rounded stochastically.

A weight with its gradient and averages takes 8 bytes. bfloat16 has steps of 1/256 to 1/128 of a
value. Rounding to the nearest loses every update below half a step and turns 0.999 v into v, so
that the second moment never falls. Stochastic rounding, up or down with probability proportional to
proximity, is right on average (Gupta et al., 2015; Zamirai et al., 2020).

`update` is the reference. On a GPU one kernel (adamw_kernel.py) does the same in one pass over the
weights, 14 bytes read and written for each, and gives the same bits: random numbers are a function
of (seed, step, parameter, place), and every operation rounds as IEEE 754 says.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from finetune import kernels

SLICE = 1 << 20  # values per update: 8 MB for each copy, which caches of CPUs hold
# SplitMix64 (Steele, Lea and Flood, 2014), as PyTorch's signed integers
GAMMA, FIRST, SECOND = (
    number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@dataclass(frozen=True)
class Factors:
    """What a step multiplies by: computed once, in float64."""

    decay: float
    mean: float
    square_kept: float
    square: float
    correction: float
    eps: float
    rate: float

    @staticmethod
    def of(group: dict[str, Any], step: int) -> "Factors":
        (beta1, beta2), lr = group["betas"], group["lr"]
        return Factors(
            decay=1 - lr * group["weight_decay"], mean=1 - beta1, square_kept=beta2,
            square=1 - beta2, correction=1 / (1 - beta2**step), eps=group["eps"],
            rate=-lr / (1 - beta1**step),
        )  # fmt: skip


Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Factors, int], None]


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019) on bfloat16 weights. A resumed run rounds the same."""

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, seed: int
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.seed = seed
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.update, self.note = fastest(parameters[0].device)
        self._numbers = {parameter: number for number, parameter in enumerate(parameters)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
                step = int(state["step"].item())
                tensors = parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                weight, grad, mean, square = (own_part(tensor).view(-1) for tensor in tensors)
                key = key_of(self.seed, step, self._numbers[parameter])
                self.update(weight, grad, mean, square, Factors.of(group, step), key)


def fastest(device: torch.device) -> tuple[Update, str]:
    """Return the form for a device, and why it is not the kernel on a GPU."""
    return kernel_or_reference(device) if device.type == "cuda" else (update, "")


def kernel_or_reference(device: torch.device) -> tuple[Update, str]:
    """Return the kernel if it gives the bits of the reference, else the reference and why."""

    def difference(kernel: Any) -> str:
        differing = differences(kernel.update, device)
        return f"{differing} of its numbers are not those of the reference" if differing else ""

    kernel, why = kernels.load("finetune.engine.adamw_kernel", difference)
    return kernel.update if kernel else update, why


def differences(other: Update, device: torch.device, count: int = 5_000) -> int:
    """Return how many numbers of weights and averages differ from the reference's after 3 steps."""
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(count, generator=random).mul_(scale) for scale in (1.0, 1e-3)]
    group = {"betas": (0.9, 0.95), "lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8}
    results = []
    for form in (update, other):
        weight, grad = (values.to(device, torch.bfloat16, copy=True) for values in start)
        mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in (1, 2, 3):
            form(weight, grad, mean, square, Factors.of(group, step), key_of(0, step, 0))
        results.append(torch.cat([weight, mean, square]).view(torch.int16))
    return int((results[0] != results[1]).sum())


def update(
    weight: torch.Tensor, grad: torch.Tensor, mean: torch.Tensor, square: torch.Tensor,
    factors: Factors, key: int,
) -> None:  # fmt: skip
    """Update flat tensors in place, a slice at a time.

    No operation does two roundings' work, as `lerp_` and `addcmul_` may: a GPU gives the same bits.
    """
    slices = (tensor.split(SLICE) for tensor in (weight, grad, mean, square))
    for number, (weights, grads, means, squares) in enumerate(zip(*slices)):
        exact = grads.float()
        first, second, moved = means.float(), squares.float(), weights.float()
        first += (exact - first).mul_(factors.mean)
        second.mul_(factors.square_kept).add_(exact.mul_(exact).mul_(factors.square))
        scale = (second * factors.correction).sqrt_().add_(factors.eps)
        moved.mul_(factors.decay).add_((first / scale).mul_(factors.rate))
        bits = random_bits(key, number * SLICE, len(weights), weights.device)
        for shift, stored, value in (
            (0, weights, moved),
            (16, means, first),
            (32, squares, second),
        ):
            round_(stored, value, bits >> shift)


def random_bits(key: int, start: int, count: int, device: torch.device) -> torch.Tensor:
    """Return 64 random bits for each place from `start`, int64 [count].

    PyTorch shifts signed numbers; what comes in from the left is masked.
    """
    bits = torch.arange(start, start + count, device=device).mul_(GAMMA).add_(key)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        bits = (bits ^ ((bits >> shift) & ((1 << (64 - shift)) - 1))).mul_(factor)
    return bits


def round_(stored: torch.Tensor, value: torch.Tensor, bits: torch.Tensor) -> None:
    """Round float32 `value` into bfloat16 `stored`, up or down, by proximity.

    bfloat16 is the upper half of float32: adding a random number from 0 to 65,535 to the lower half
    carries into the upper half with probability lower half / 65,536. Weights in float32 are kept.
    """
    if stored.dtype == torch.bfloat16:
        carried = value.view(torch.int32)
        carried += (bits & 0xFFFF).int()
        carried &= -(1 << 16)
    stored.copy_(value)


def key_of(seed: int, step: int, parameter: int) -> int:
    """Hash three numbers to 63 bits; at least 2^62, so that a kernel always gets 64."""
    digest = hashlib.blake2b(f"{seed} {step} {parameter}".encode(), digest_size=7).digest()
    return (1 << 62) + int.from_bytes(digest, "little")


def own_part(tensor: Any) -> torch.Tensor:
    """Return this process's part of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
