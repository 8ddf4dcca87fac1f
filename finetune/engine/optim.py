"""Build parameter groups and optimizers; compute the learning rate from the step alone."""

import importlib
import math
import warnings
from typing import Any

import torch
from torch import nn

from finetune.config import Optimizer, Schedule
from finetune.config.choices import OPTIMIZERS
from finetune.engine.rounded_adamw import RoundedAdamW
from finetune.models import families
from finetune.models.embeddings import embedding_and_head
from finetune.models.scalar_heads import ScalarHead


def parameter_groups(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    """Group the trained weights by weight decay and by `scale` of the learning rate.

    Matrices decay; norms, biases and other vectors do not. Embeddings and head use
    optimizer.embedding_lr, value and score heads and those of classifiers optimizer.head_lr; LoRA's
    B matrices use optimizer.lora_plus_ratio x the rate of the rest.
    `hidden` marks the matrices that are neither embeddings nor head: muon updates these.
    """
    outer = {id(p) for module in embedding_and_head(model) for p in module.parameters()}
    # Position embeddings, too.
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    scalars = {id(m.weight) for m in model.modules() if isinstance(m, ScalarHead)}
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    new = families.new_weights(base)
    scalars |= {id(p) for name, p in base.named_parameters() if name in new}
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_outer, is_matrix = id(parameter) in outer, parameter.ndim >= 2
            inner = not is_outer and id(parameter) not in embeddings | scalars
            hidden = parameter.ndim == 2 and inner
            scale = 1.0
            if "lora_B" in name or "lora_embedding_B" in name:
                scale = optimizer.lora_plus_ratio or 1.0
            elif is_outer and optimizer.embedding_lr:
                scale = optimizer.embedding_lr / optimizer.lr
            elif id(parameter) in scalars and optimizer.head_lr:
                scale = optimizer.head_lr / optimizer.lr
            key = (optimizer.weight_decay if is_matrix else 0.0, scale, hidden)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "scale": scale, "hidden": hidden}
        for (decay, scale, hidden), parameters in groups.items()
    ]


def build(
    model: nn.Module, optimizer: Optimizer, in_16_bits: bool = False, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer over `parameter_groups`, at learning rate optimizer.lr x scale.

    `in_16_bits`: the trained weights are bfloat16 without a float32 copy; `seed` then seeds the
    stochastic rounding.
    """
    groups = parameter_groups(model, optimizer)
    for group in groups:
        group["lr"] = optimizer.lr * group["scale"]
    kind = OPTIMIZERS[optimizer.kind]
    settings = {"betas": tuple(optimizer.betas or kind.betas), "eps": optimizer.eps}
    if in_16_bits and optimizer.kind == "adamw":
        return RoundedAdamW(groups, **settings, seed=seed)  # type: ignore[arg-type]
    package, _, name = kind.make.partition(":")
    if needs_bitsandbytes(optimizer.kind):
        _keep_embeddings_in_32_bits(model)
    make = getattr(importlib.import_module(package), name)
    taken = {name: settings[name] for name in kind.takes}
    made: torch.optim.Optimizer = make(groups, **kind.arguments, **taken)
    return made


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Keep embeddings' state in 32 bits: rare tokens get rare, large updates.

    Source: Dettmers et al., 2022, section 3.
    """
    import bitsandbytes.optim as bnb

    overrides = bnb.GlobalOptimManager.get_instance()
    overrides.initialize()  # a process has only one, and it identifies parameters by position
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            overrides.register_module_override(module, "weight", {"optim_bits": 32})
    # On a CPU all memory is the host's, so nothing needs paging.
    warnings.filterwarnings("ignore", "Paged optimizers are not supported on CPU")


def needs_bitsandbytes(kind: str) -> bool:
    """Return whether an optimizer.kind is one of bitsandbytes' optimizers."""
    return OPTIMIZERS[kind].make.startswith("bitsandbytes")


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for hidden matrices, AdamW for everything else, in one optimizer.

    Muon's updates match the root mean square of AdamW's (Liu et al., 2025), so optimizer.lr means
    the same for both.
    """

    def __init__(
        self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float
    ) -> None:
        super().__init__(groups, {})
        matrices = [group for group in self.param_groups if group["hidden"]]
        others = [group for group in self.param_groups if not group["hidden"]]
        # Both share our groups, so that a rate set here is theirs, and one state per parameter.
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.parts.append(torch.optim.AdamW(others, betas=betas, eps=eps, fused=True))
        self._share()

    def _share(self) -> None:
        for part in self.parts:
            part.param_groups = [
                g for g in self.param_groups if g["hidden"] == isinstance(part, torch.optim.Muon)
            ]
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: None = None) -> None:
        for part in self.parts:
            part.step()


def warmup_steps(schedule: Schedule, num_steps: int) -> int:
    """Return the steps of the warm-up in a run of `num_steps`."""
    return schedule.warmup_steps or math.ceil(schedule.warmup_ratio * num_steps)


def lr_at(step: int, num_steps: int, peak: float, schedule: Schedule) -> float:
    """Return the learning rate of step `step` (from 0) of `num_steps`.

    Warm-up rises linearly to the peak at step `warmup`. Then linear, cosine and wsd fall to
    min_lr_fraction x peak after the last step; inverse_sqrt is peak x sqrt(warmup / step).
    """
    warmup, floor = warmup_steps(schedule, num_steps), schedule.min_lr_fraction
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "inverse_sqrt":
        return peak * math.sqrt(warmup / max(step, 1))
    start = warmup
    if schedule.kind == "wsd":  # linear after the stable part
        start = max(warmup, num_steps - math.ceil(schedule.decay_fraction * num_steps))
    done = max(0, step - start) / max(1, num_steps - start)
    falling = (1 + math.cos(math.pi * done)) / 2 if schedule.kind == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * falling)


def page_again(optimizer: torch.optim.Optimizer) -> None:
    """After resuming, move the state of paged optimizers back to memory that the GPU can page out.

    bitsandbytes loads it into ordinary GPU memory.
    """
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state.get(name)
            is_on_gpu = isinstance(loaded, torch.Tensor) and loaded.is_cuda
            if is_on_gpu and not getattr(loaded, "is_paged", False):
                state[name] = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)
                state[name].copy_(loaded)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to `lr` x its scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
