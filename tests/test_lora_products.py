"""LoRA's products give what peft's give, and leave to peft what they do not know."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from finetune.models import lora_products


class Pair(nn.Module):
    """Two layers, of which the first has a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 160), nn.Linear(160, 64, bias=False)

    def forward(self, states):
        return self.second(torch.tanh(self.first(states)))


@pytest.fixture(autouse=True)
def anywhere(monkeypatch):
    monkeypatch.setattr(lora_products, "on_gpu", lambda states: True)


def adapted(dtype=torch.float32, installed=True, **changes):
    torch.manual_seed(0)
    options = {"r": 8, "lora_alpha": 20, "target_modules": ["first", "second"], **changes}
    model = get_peft_model(Pair().to(dtype), LoraConfig(**options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not zero, as fresh ones are
            nn.init.normal_(parameter, std=0.1)
    if installed:
        lora_products.install(model)
    return model.train()


def answers(model, autocast=False, dtype=torch.float32):
    """Output and gradients, of the input first."""
    random = torch.Generator().manual_seed(1)
    states = torch.randn(3, 50, 96, generator=random).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(states)
    out.float().square().sum().backward()
    named = [p.grad for p in model.parameters() if p.requires_grad]
    return [out.detach(), states.grad, *named]


def count_uses(monkeypatch):
    uses, apply = [], lora_products._Products.apply
    monkeypatch.setattr(
        lora_products._Products, "apply", lambda *given: uses.append(1) or apply(*given)
    )
    return uses


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_outputs_and_gradients_are_pefts_to_1e_6(monkeypatch, changes):
    """With dropout in evaluation, where peft drops nothing."""
    uses, found = count_uses(monkeypatch), []
    for installed in (True, False):
        model = adapted(installed=installed, **changes)
        found.append(answers(model.eval() if "lora_dropout" in changes else model))
    assert len(uses) == 2
    for own, peft in zip(*found, strict=True):
        torch.testing.assert_close(own, peft, rtol=1e-6, atol=1e-6 * peft.abs().max().item())


def test_in_16_bits_errors_are_no_larger_than_pefts():
    """One rounding of the sum for three: of the product by B, its scale and the sum."""
    exact = answers(adapted(torch.bfloat16, installed=False).double(), dtype=torch.float64)
    own, peft = (
        answers(adapted(torch.bfloat16, installed=installed), True, torch.bfloat16)
        for installed in (True, False)
    )

    def errors(found):
        return [(a.double() - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)]

    for name, of_own, of_peft in zip(range(9), errors(own), errors(peft)):
        assert of_own <= 1.1 * of_peft, name


def left_to_peft(model, case):
    """Bring a model into a state that only peft's forward knows."""
    if case == "disabled":
        model.base_model.disable_adapter_layers()
    elif case == "merged":
        model.merge_adapter()
    elif case == "two adapters":
        config = LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    elif case == "trained bias":
        model.base_model.model.first.base_layer.bias.requires_grad_(True)
    elif case == "hooks":
        for layer in (model.base_model.model.first, model.base_model.model.second):
            layer.base_layer.register_forward_pre_hook(lambda module, given: None)
    return model


@pytest.mark.parametrize(
    ("case", "changes", "num_uses"),
    [
        ("disabled", {}, 0),
        ("merged", {}, 0),
        ("two adapters", {}, 0),
        ("trained bias", {}, 1),
        ("hooks", {}, 0),
        ("dropout", {"lora_dropout": 0.3}, 0),
        ("DoRA", {"use_dora": True}, 0),
        ("bias of B", {"lora_bias": True, "target_modules": ["first"]}, 0),
    ],
)
def test_what_only_peft_knows_stays_with_peft(monkeypatch, case, changes, num_uses):
    uses, found = count_uses(monkeypatch), []
    for installed in (True, False):
        model = left_to_peft(adapted(installed=installed, **changes), case)
        torch.manual_seed(2)
        with torch.no_grad():
            found.append(model(torch.ones(2, 96)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert len(uses) == num_uses


def test_what_is_saved_is_unchanged():
    own, peft = (adapted(installed=installed).state_dict() for installed in (True, False))
    assert own.keys() == peft.keys()
    assert all(torch.equal(own[name], peft[name]) for name in own)


def test_merging_is_unchanged():
    own, peft = (
        adapted(installed=installed).merge_and_unload()(torch.ones(96))
        for installed in (True, False)
    )
    assert torch.equal(own, peft)


def test_a_cpu_keeps_pefts_products(monkeypatch):
    monkeypatch.undo()
    uses = count_uses(monkeypatch)
    answers(adapted())
    assert not uses


def test_a_variable_leaves_them_out(monkeypatch):
    monkeypatch.setenv("FINETUNE_WITHOUT_KERNELS", "lora_products")
    uses = count_uses(monkeypatch)
    answers(adapted())
    assert not uses
