"""Arithmetic of a token, and the utilisation that follows from it, by hand."""

import json
import types

import pytest
import torch
from torch import nn

from finetune.engine import chips
from finetune.models import parameters

LAYER = (
    4 * 8 * 8 + 3 * 8 * 16
)  # q, k, v, o of width 8, and the three matrices of an MLP of width 16


def llama(**changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    config = AutoConfig.for_model(changes.pop("model_type", "llama"), **{**shape, **changes})
    return AutoModelForCausalLM.from_config(config)


def test_matrices_count_and_tables_and_norms_do_not():
    head = 100 * 8
    assert parameters.in_products(llama()) == (2 * LAYER + head, 0), "the embedding is looked up"
    assert parameters.in_products(llama(tie_word_embeddings=True)) == (2 * LAYER + head, 0), (
        "tied: it is the head, too"
    )


def test_frozen_and_adapted_matrices_are_apart():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    )
    assert parameters.in_products(model) == (2 * 2 * (8 + 8) + 800, 2 * LAYER), (
        "the head that is replaced has no part"
    )


def test_only_active_experts_are_counted():
    model = llama(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2)
    router, attention, expert = 4 * 8, 4 * 8 * 8, 3 * 8 * 16
    assert parameters.in_products(model) == (2 * (attention + router + 2 * expert) + 800, 0)


def test_packed_4_bit_weights_count_as_unpacked():
    model = nn.Linear(8, 16, bias=False)
    model.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    model.weight.quant_state = types.SimpleNamespace(shape=torch.Size([16, 8]))
    assert parameters.in_products(model) == (0, 128)


def test_a_change_of_any_weight_is_noticed_slice_by_slice(monkeypatch):
    """A sum in float64 copies what it adds up: of a whole embedding four times its memory."""
    monkeypatch.setattr(parameters, "SLICE", 7)
    model = nn.Linear(5, 4, bias=False, dtype=torch.bfloat16)
    before = parameters.fingerprints(model, lambda p: p)
    assert before == {
        "weight": pytest.approx(float(model.weight.detach().sum(dtype=torch.float64)))
    }
    for place in (0, 6, 7, 13, 14, 19):
        model.weight.data.view(-1)[place] += 1
        assert parameters.fingerprints(model, lambda p: p) != before
        model.weight.data.view(-1)[place] = float("nan")
        assert parameters.not_finite(model) == ["weight"]
        model.weight.data.view(-1)[place] = 0
        before = parameters.fingerprints(model, lambda p: p)
    empty = nn.Linear(5, 4, bias=False)
    assert parameters.fingerprints(empty, lambda p: p[:0]) == {"weight": 0.0}, "another's shard"


def config(**values):
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, **values}
    return types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace(**text))


def test_attention_is_causal_inside_documents():
    """Layers x heads x head size x half of the document, weighted by tokens."""
    assert parameters.attention_per_token(config(), [10]) == 2 * 32 * 5
    assert parameters.attention_per_token(config(head_dim=16), [10]) == 2 * 64 * 5
    assert parameters.attention_per_token(config(), [10, 30]) == 2 * 32 * (10 * 5 + 30 * 15) / 40


def test_a_window_bounds_what_a_token_sees():
    sliding = config(layer_types=["full_attention", "sliding_attention"], sliding_window=4)
    assert parameters.attention_per_token(sliding, [10]) == 32 * 5 + 32 * (4 * 10 - 8) / 10
    assert parameters.attention_per_token(sliding, [4]) == 2 * 32 * 2, (
        "shorter than the window: as without"
    )
    everywhere = config(sliding_window=4)
    assert parameters.attention_per_token(everywhere, [10]) == 2 * 32 * (4 * 10 - 8) / 10


def test_models_without_attention_have_none():
    linear = config(layer_types=["linear_attention", "full_attention"])
    assert parameters.attention_per_token(linear, [10]) == 32 * 5
    assert parameters.attention_per_token(config(num_attention_heads=None), [10]) == 0


def test_the_8b_llama_is_counted_as_the_field_does():
    """6 N + 12 L H Q T / 2: torchtitan's number for Llama-3.1-8B at 8,192 tokens, causal."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    products = 32 * layer + 128256 * 4096
    attention = parameters.attention_per_token(
        config(num_hidden_layers=32, num_attention_heads=32, head_dim=128), [8192]
    )
    assert parameters.flops_per_token(products, 0, attention) == 6 * products + 6 * 32 * 4096 * 8192
    assert (
        parameters.flops_per_token(0, products, attention) == 4 * products + 6 * 32 * 4096 * 8192
    ), "LoRA"


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 3060", 25.5e12),
        ("NVIDIA GeForce RTX 3080 Ti", 68.2e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88.2e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA A1000 Laptop GPU", None),
    ],
)
def test_peak_rates_are_found_by_the_name_of_the_gpu(name, rate):
    found = chips.peak_rate(name)
    assert found == rate if rate is None else found == pytest.approx(rate)


def test_a_chip_that_the_table_lacks_is_measured_by_a_product(monkeypatch):
    """A clock that says 1 ms for every product gives 2 n^3 / 1 ms; what fails gives nothing."""
    times = iter(range(1000))
    monkeypatch.setattr(chips.time, "perf_counter", lambda: next(times) / 1000)
    assert chips.measured_rate(torch.device("cpu"), 32) == pytest.approx(2 * 32**3 / 1e-3)

    def fails(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "mm", fails)
    assert chips.measured_rate(torch.device("cpu"), 32) is None


def test_utilisation_is_of_all_processes_together():
    assert chips.utilisation(1000.0, 1e11, 1e14, 1) == 1.0
    assert chips.utilisation(1000.0, 1e11, 1e14, 2) == 0.5
    assert chips.utilisation(1.0, 1e9, 1e15, 1) == 1e-6
    assert chips.utilisation(1000.0, 1e11, None, 1) is None
    assert chips.utilisation(1000.0, 0.0, 1e14, 1) is None


def test_a_run_keeps_what_its_tokens_cost(workshop):
    run = workshop.train(train__max_steps=1)
    receipt = json.loads((run / "receipt.json").read_text())["parameters"]
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64
    assert (receipt["trained_in_products"], receipt["frozen_in_products"]) == (
        2 * layer + 261 * 32,
        0,
    )
