"""Parameter groups, optimizers, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from finetune.config import Optimizer, Schedule


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: with weight decay (matrices), and without (norms, biases and every other vector)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def build(model: nn.Module, optimizer: Optimizer) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter, 2019), one fused kernel over all parameters."""
    groups = [group for group in parameter_groups(model, optimizer.weight_decay) if group["params"]]
    return torch.optim.AdamW(
        groups, lr=optimizer.lr, betas=(optimizer.betas[0], optimizer.betas[1]), eps=optimizer.eps, fused=True
    )


def lr_at(step: int, num_steps: int, peak: float, schedule: Schedule) -> float:
    """Learning rate of step `step` (from 0) of `num_steps`.

    Warm-up rises linearly and reaches the peak at step warmup_steps; what follows reaches
    min_lr_fraction x peak after the last step.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return peak
    done = (step - schedule.warmup_steps) / max(1, num_steps - schedule.warmup_steps)
    falling = 1 - done if schedule.kind == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (schedule.min_lr_fraction + (1 - schedule.min_lr_fraction) * falling)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
