"""Learning rate, parameter groups, AdamW on bfloat16 weights."""

import itertools
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from finetune.config import Optimizer, Schedule
from finetune.config.choices import OptimizerKind
from finetune.engine import optim, rounded_adamw


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


def test_what_makes_an_optimizer_says_whether_it_needs_bitsandbytes(monkeypatch):
    """Its row, not its name: also of a kind added later."""
    for make, needs in (("bitsandbytes.optim:AdEMAMix", True), ("torch.optim:SGD", False)):
        monkeypatch.setitem(optim.OPTIMIZERS, "own_8bit", OptimizerKind(make))
        assert optim.needs_bitsandbytes("own_8bit") == needs


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


def test_rounding_by_chance_is_right_on_average():
    """Of two neighbours, the nearer one the more often; what bfloat16 has is kept."""
    bits = rounded_adamw.random_bits(0, 0, 200_000, torch.device("cpu"))
    for value, below, above in (
        (1.001953125, 1.0, 1.0078125),
        (-3.0, -3.0, -3.0),
        (-1e-3, -0.00099945068, -0.00100708),
    ):
        stored = torch.empty(200_000, dtype=torch.bfloat16)
        rounded_adamw.round_(stored, torch.full((200_000,), value), bits)
        assert all(
            number == pytest.approx(below) or number == pytest.approx(above)
            for number in set(stored.tolist())
        )
        assert stored.double().mean().item() == pytest.approx(value, rel=5e-5)


def steps(dtype, count, gradient, seed=0, **settings):
    weight = nn.Parameter(torch.ones(4096, 1, dtype=dtype))
    holder = nn.Module()
    holder.weight = weight
    optimizer = optim.build(
        holder, Optimizer(**settings), in_16_bits=dtype == torch.bfloat16, seed=seed
    )
    for number in range(count):
        weight.grad = torch.full_like(weight, gradient(number))
        optimizer.step()
    return weight.detach(), optimizer


def test_in_16_bits_small_updates_add_up():
    """Each of 100 updates of 1e-4 would round away: bfloat16 steps by 4e-3 just below 1."""
    exact, _ = steps(torch.float32, 100, lambda _: 0.5, lr=1e-4)
    rounded, _ = steps(torch.bfloat16, 100, lambda _: 0.5, lr=1e-4)
    assert exact.mean().item() == pytest.approx(0.99, abs=1e-5)
    assert rounded.double().mean().item() == pytest.approx(0.99, abs=5e-4)
    nearest = nn.Parameter(torch.ones(4096, 1, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([nearest], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        nearest.grad = torch.full_like(nearest, 0.5)
        plain.step()
    assert (nearest == 1).all()


def test_in_16_bits_the_second_moment_falls_with_the_gradients():
    """0.999 of a bfloat16 number is, rounded to the nearest, that number."""
    _, optimizer = steps(torch.bfloat16, 700, lambda number: 1.0 if number < 100 else 0.0, lr=1e-6)
    [state] = optimizer.state.values()
    wanted = (1 - 0.999**100) * 0.999**600
    assert state["exp_avg_sq"].double().mean().item() == pytest.approx(wanted, rel=0.02)


def test_in_16_bits_a_step_is_adamws_but_for_rounding():
    for decay in (0.0, 0.1):
        exact, _ = steps(
            torch.float32, 5, lambda number: 0.3 * number - 0.5, lr=0.05, weight_decay=decay
        )
        rounded, _ = steps(
            torch.bfloat16, 5, lambda number: 0.3 * number - 0.5, lr=0.05, weight_decay=decay
        )
        assert rounded.double().mean().item() == pytest.approx(
            exact.double().mean().item(), rel=2e-3
        )


def test_in_16_bits_another_seed_rounds_differently():
    """Seeds beyond 32 bits, or swapped with the step, differ; one seed always rounds alike."""
    rounded = {
        seed: steps(torch.bfloat16, 2, lambda _: 0.5, seed=seed, lr=1e-4)[0]
        for seed in (0, 1, 2, 2**30)
    }
    again, _ = steps(torch.bfloat16, 2, lambda _: 0.5, seed=1, lr=1e-4)
    assert torch.equal(again, rounded[1])
    assert len({tuple(weight.flatten().tolist()) for weight in rounded.values()}) == 4
    numbers = list(itertools.product(range(20), repeat=3))
    assert len({rounded_adamw.key_of(*each) for each in numbers}) == len(numbers)


def test_random_bits_are_those_of_splitmix64_at_any_place():
    """Known outputs of the published generator, begun at 0: its n-th output is that of place n."""
    bits = rounded_adamw.random_bits(0, 0, 4, torch.device("cpu"))
    assert [number % 2**64 for number in bits.tolist()[1:]] == [
        0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F,
    ]  # fmt: skip
    assert torch.equal(rounded_adamw.random_bits(0, 2, 2, torch.device("cpu")), bits[2:])


CPU = torch.device("cpu")


def test_the_kernel_gives_the_bits_of_the_reference(interpreted):
    kernel = interpreted("finetune.engine.adamw_kernel")
    for count in (1, 1_023, 5_000):
        assert rounded_adamw.differences(kernel.update, CPU, count) == 0
    assert rounded_adamw.kernel_or_reference(CPU) == (kernel.update, "")


def wrong(change):
    def update(weight, grad, mean, square, factors, key):
        rounded_adamw.update(weight, grad, mean, square, *change(factors, key))

    return update


@pytest.mark.parametrize(
    "change",
    [
        lambda factors, key: (factors, key + 1),
        lambda factors, key: (replace(factors, decay=1.0), key),
        lambda factors, key: (replace(factors, correction=1.0), key),
        lambda factors, key: (replace(factors, mean=factors.mean * 1.01), key),
    ],
    ids=["other random numbers", "no decay", "no correction", "another beta"],
)
def test_a_kernel_with_another_result_is_not_used(monkeypatch, change):
    own = SimpleNamespace(update=wrong(change))
    monkeypatch.setitem(sys.modules, "finetune.engine.adamw_kernel", own)
    used, why = rounded_adamw.kernel_or_reference(CPU)
    assert used is rounded_adamw.update
    assert re.fullmatch(r"\d+ of its numbers are not those of the reference", why)


def test_a_kernel_that_cannot_be_compiled_is_not_used(monkeypatch):
    def update(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    own = SimpleNamespace(update=update)
    monkeypatch.setitem(sys.modules, "finetune.engine.adamw_kernel", own)
    used, why = rounded_adamw.kernel_or_reference(CPU)
    assert (used, why) == (rounded_adamw.update, "RuntimeError: Failed to find C compiler.")
