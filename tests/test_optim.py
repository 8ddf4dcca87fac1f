"""Learning rate, parameter groups."""

import pytest
import torch
from torch import nn

from finetune.config import Optimizer, Schedule
from finetune.engine import optim


def curve(num_steps, **schedule):
    return [optim.lr_at(step, num_steps, 1.0, Schedule(**schedule)) for step in range(num_steps)]


def test_constant_stays():
    assert curve(5, kind="constant") == [1.0] * 5


def test_linear_falls_evenly_and_would_reach_zero_after_the_last_step():
    assert curve(4, kind="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_in_the_middle():
    rates = curve(100, kind="cosine")
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.5)
    assert rates == sorted(rates, reverse=True)


def test_warmup_rises_from_the_first_step_and_reaches_the_peak():
    rates = curve(10, kind="linear", warmup_steps=4)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0


def test_falls_to_the_fraction_asked_for():
    assert curve(1000, kind="cosine", min_lr_fraction=0.1)[-1] == pytest.approx(0.1, abs=1e-4)


def test_weight_decay_spares_norms_and_biases():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad = False
    decayed, spared = optim.parameter_groups(model, Optimizer(weight_decay=0.1))
    assert [p.shape for p in decayed["params"]] == [torch.Size([4, 3])]
    assert len(spared["params"]) == 3
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_adamw_moves_as_its_formula_says():
    """One step: m / (sqrt(v) + eps) is the gradient's sign, decay is lr x weight_decay x weight."""
    layer = nn.Linear(1, 1, bias=False)
    before = layer.weight.item()
    optimizer = optim.build(layer, Optimizer(lr=0.1, weight_decay=0.5, eps=1e-12))
    (layer.weight * 3).sum().backward()
    optimizer.step()
    assert layer.weight.item() == pytest.approx(before - 0.1 * 0.5 * before - 0.1, rel=1e-5)
