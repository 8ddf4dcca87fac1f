"""Heads that read one number from a hidden state: the value of a token, the score of a document."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from finetune.errors import ModelError

NAMES = {"values": "value_head", "scores": "score_head"}
"""What a policy answers -> the child of the base model that computes it."""


class ScalarHead(nn.Module):
    """states [N, H] -> float32 [N]. Without a bias: scores only ever matter by their differences.

    In float32 under autocast, too: bfloat16 has steps of 1/128 near 1, and rewards are compared.
    """

    def __init__(self, hidden_size: int, std: float, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, hidden_size, dtype=dtype, device=device))
        if device != torch.device("meta"):
            nn.init.normal_(self.weight, std=std)

    def forward(self, states_NH: torch.Tensor) -> torch.Tensor:
        return project(states_NH, self.weight)


def project(states_NH: torch.Tensor, weight_1H: torch.Tensor) -> torch.Tensor:
    """Return a number of each state, float32 [N], also under autocast."""
    with torch.autocast(states_NH.device.type, enabled=False):
        return F.linear(states_NH.float(), weight_1H.float())[:, 0]


def attach(base: Any, wanted: Collection[str], dtype: torch.dtype = torch.float32) -> None:
    """Give `base` the heads for `wanted`, of NAMES. Raises ModelError if it cannot have them.

    A value head starts at zero, so that nothing is expected at first; a score head with a standard
    deviation of 1 / sqrt(H + 1), so that scores start around 1 (Stiennon et al., 2020).
    """
    if not wanted:
        return
    projection = base.get_output_embeddings()
    if projection is None:
        kind = base.config.model_type
        raise ModelError(
            f"objective.kind: needs {', '.join(sorted(wanted))}, but {kind} has no output "
            "projection whose input a head could read"
        )
    size, device = projection.in_features, next(base.parameters()).device
    for name in sorted(wanted):
        if hasattr(base, NAMES[name]):
            kind = base.config.model_type
            raise ModelError(f"objective.kind: needs {name}, but {kind} has its own {NAMES[name]}")
        std = 1 / math.sqrt(size + 1) if name == "scores" else 0.0
        setattr(base, NAMES[name], ScalarHead(size, std, dtype, device))


def of(base: Any) -> dict[str, ScalarHead]:
    """Return the heads of a base model, by what they answer."""
    found = {name: getattr(base, child, None) for name, child in NAMES.items()}
    return {name: head for name, head in found.items() if isinstance(head, ScalarHead)}


def without(weights: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of the causal LM that is exported: all but those of these heads."""
    heads = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, ScalarHead)}
    return {name: weight for name, weight in weights.items() if name not in heads}
