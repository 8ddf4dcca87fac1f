"""Forecast the speed of a run on a GPU by a rate that `make gpu` measured on it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune.config import Config
from finetune.forecast.measured import Measurement, Rate
from finetune.models import parameters


@dataclass(frozen=True)
class Work:
    """FLOPs that training takes for a token."""

    model: float
    """As `mfu` counts them: without recomputation."""
    recomputed: float
    """Second forward passes of layers."""

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def work_of(model: Any, model_config: Any, length: float, share: float) -> Work:
    """Return the work of a token in documents of `length` tokens.

    `share`: of the layers, that are recomputed. The head is none of them.
    """
    trained, frozen = parameters.in_products(model)
    attention = parameters.attention_per_token(model_config, [max(1, round(length))])
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings()
    outside = head.weight.numel() if hasattr(head, "weight") else 0
    forward = 2.0 * (trained + frozen - outside) + 4.0 * attention
    return Work(parameters.flops_per_token(trained, frozen, attention), share * forward)


def share_recomputed(config: Config, num_layers: int) -> float:
    """Return the share of a model's layers that a run recomputes; auto counts as none."""
    wanted = config.train.gradient_checkpointing
    if wanted == "auto" or not num_layers:
        return 0.0
    return float(wanted) if isinstance(wanted, bool) else min(1.0, int(wanted) / num_layers)


def closest(
    measurements: Iterable[Measurement], config: Config
) -> tuple[str, Rate, Measurement] | None:
    """Return (case, rate, measurement) of the run that is most like this config's.

    One that trains by the same adapter.kind, compiled alike if there is one; None if there is none.
    A run in float8 may be compared with one in 16 bits, but not the other way round.
    """
    in_float8 = bool(config.train.float8)
    found = [
        (name, rate, measurement)
        for measurement in measurements
        for name, rate in measurement.rates.items()
        if rate.adapter == config.adapter.kind and (in_float8 or not rate.float8)
    ]
    wanted = config.train.compile is True, in_float8
    alike = [each for each in found if (each[1].compiled, each[1].float8) == wanted]
    return next(iter(alike or found), None)
