"""Compare a step of optimizers: ours, PyTorch's, torchao's and bitsandbytes'.

    python benchmarks/optim.py                    # 500 million weights on a GPU, 1 million on a CPU
    python benchmarks/optim.py --weights 2.8e9 --only "ours|fused"

Bytes: what a single pass over weights, gradients and state reads and writes, of the state that the
optimizer really has; `of a copy's rate` compares that with a copy on this device, so that several
passes show. `moved`: how far steps of 1e-5 moved bfloat16 or float32 weights of 0.02, as a share of
how far AdamW in float64 moves them: rounding to the nearest keeps them where they are.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import chip

from finetune.engine import rounded_adamw

SIZE = 4096 if chip.ON_GPU else 256  # of the matrices
LR, BETAS, EPS = 1e-5, (0.9, 0.999), 1e-8
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, default=5e8 if chip.ON_GPU else 1e6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="regular expression of names")
    arguments = parser.parse_args()
    rate = chip.bandwidth()
    count = max(1, round(arguments.weights / SIZE**2))
    print(f"{chip.about()}; {count * SIZE**2:,} weights in {count} matrices; a copy reaches "
          f"{rate / 1e9:,.0f} GB/s\n")  # fmt: skip
    rows, failed = [], {}
    for name, (dtype, make) in ways().items():
        if re.search(arguments.only, name):
            try:
                rows.append(measure(name, dtype, make, count, arguments.rounds, rate))
            except Exception as exc:  # of a package that is not there, or not for this device
                text = (str(exc).splitlines() or [""])[0][:150]
                failed[name] = f"{type(exc).__name__}: {text}"
    head = ["", "ms", "ns a 1,000 weights", "bytes a weight", "of a copy's rate",
            "state, bytes a weight", "moved"]  # fmt: skip
    print(chip.table(head, rows) + chip.notes(failed))


def measure(
    name: str, dtype: torch.dtype, make: Make, count: int, rounds: int, rate: float
) -> list[str]:
    """Return the row of one optimizer; its memory is free again afterwards."""
    parameters = made(dtype, count)
    optimizer = make(parameters)
    optimizer.step()  # makes the state, and compiles
    medians, failed = chip.alternate({name: lambda: [chip.seconds(optimizer.step)]}, rounds)
    if failed:
        raise RuntimeError(failed[name])
    number, took = sum(p.numel() for p in parameters), medians[name][0]
    state = sum(_bytes(value) for of in optimizer.state.values() for value in of.values()) / number
    size = parameters[0].element_size()
    moves = 2 * size + parameters[0].grad.element_size() + 2 * state
    return [
        name, f"{1e3 * took:.3g}", f"{1e12 * took / number:.3g}", f"{moves:.3g}",
        f"{number * moves / took / rate:.0%}", f"{state:.3g}",
        "" if name.startswith("torch Muon") or "Lion" in name else f"{moved(dtype, make):.0%}",
    ]  # fmt: skip


def made(dtype: torch.dtype, count: int) -> list[nn.Parameter]:
    """Return matrices like those of a model, with gradients."""
    torch.manual_seed(0)
    parameters = []
    for _ in range(count):
        weight = nn.Parameter(0.02 * torch.randn(SIZE, SIZE, device=chip.DEVICE).to(dtype))
        weight.grad = 1e-3 * torch.randn_like(weight)
        parameters.append(weight)
    return parameters


def moved(dtype: torch.dtype, make: Make, steps: int = 10) -> float:
    """Return how far `steps` with one gradient moved weights, as a share of AdamW's in float64."""
    own = made(dtype, 1)
    start = own[0].detach().double()
    exact = nn.Parameter(start.clone())
    exact.grad = own[0].grad.double()
    optimizers = make(own), torch.optim.AdamW([exact], LR, BETAS, EPS, weight_decay=0.0)
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.step()
    wanted = exact.detach() - start
    return float(((own[0].detach().double() - start) * wanted).sum() / wanted.square().sum())


def _bytes(value: Any) -> float:
    """Count a state's bytes, also those of a tensor that holds others (torchao's)."""
    if not isinstance(value, torch.Tensor) or value.numel() <= 1:
        return 0.0
    if hasattr(value, "__tensor_flatten__"):
        return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    return float(value.numel() * value.element_size())


def ways() -> dict[str, tuple[torch.dtype, Make]]:
    """Return (dtype of the weights, how to make the optimizer) by name."""
    half, full = torch.bfloat16, torch.float32
    found: dict[str, tuple[torch.dtype, Make]] = {
        "ours, stochastic rounding": (half, ours),
        "ours, plain operations": (half, ours_plain),
        "torch AdamW, fused, bf16 to the nearest": (half, torch_adamw(fused=True)),
        "torch AdamW, fused, float32": (full, torch_adamw(fused=True)),
        "torch AdamW, foreach, float32": (full, torch_adamw(foreach=True)),
        "torch Muon, bf16": (half, lambda p: torch.optim.Muon(p, lr=LR)),
    }
    for name, of in (("AdamW", "_AdamW"), ("AdamW8bit", "AdamW8bit"), ("AdamW4bit", "AdamW4bit")):
        found[f"torchao {name}, stochastic rounding"] = (half, torchao(of))
    for name in ("AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion8bit"):
        found[f"bitsandbytes {name}, float32"] = (full, bitsandbytes(name))
    return found


def ours(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    groups = [{"params": parameters, "lr": LR, "weight_decay": 0.0}]
    return rounded_adamw.RoundedAdamW(groups, betas=BETAS, eps=EPS, seed=0)


def ours_plain(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The reference, which a CPU takes, and a GPU without Triton."""
    optimizer: Any = ours(parameters)
    optimizer.update = rounded_adamw.update
    return optimizer  # type: ignore[no-any-return]


def torch_adamw(**form: bool) -> Make:
    return lambda p: torch.optim.AdamW(p, LR, BETAS, EPS, weight_decay=0.0, **form)


def torchao(name: str) -> Make:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        import torchao.optim

        kind: Any = getattr(torchao.optim, name)
        made: torch.optim.Optimizer = kind(
            parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, bf16_stochastic_round=True
        )
        return made

    return make


def bitsandbytes(name: str) -> Make:
    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        import bitsandbytes.optim

        kind: Any = getattr(bitsandbytes.optim, name)
        betas = {} if "Lion" in name else {"betas": BETAS, "eps": EPS}
        made: torch.optim.Optimizer = kind(parameters, lr=LR, weight_decay=0.0, **betas)
        return made

    return make


if __name__ == "__main__":
    main()
