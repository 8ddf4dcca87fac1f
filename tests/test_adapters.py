"""What adapters do to their inputs, and the products of LoRA on a GPU."""

import pytest
import torch
from conftest import TINY_LLAMA
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.models import adapters, lora_products


class Casts(TorchDispatchMode):
    """Count the numbers that are converted to another dtype."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten._to_copy.default:
            self.count += arguments[0].numel()
        return function(*arguments, **(keywords or {}))


def adapted(dora: bool = False):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY_LLAMA, vocab_size=100))
    model = get_peft_model(
        base.to(torch.bfloat16), LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.1
    return model


def trained(model):
    """Loss, gradients and casts of a pass under autocast."""
    with torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        loss = model(input_ids=torch.arange(50)[None]).logits.float().square().sum()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat([grad.flatten() for grad in grads]), casts.count


def test_inputs_of_adapters_stay_in_16_bits_and_nothing_else_changes():
    plain, without = adapted(), adapted()
    adapters.leave_casts_to_autocast(without)
    (loss, grads, casts), (own_loss, own_grads, own_casts) = trained(plain), trained(without)
    assert own_loss == loss
    assert torch.equal(own_grads, grads)
    assert own_casts < 0.6 * casts


@pytest.mark.parametrize("dora", [False, True])
def test_outside_autocast_inputs_get_the_dtype_of_the_adapter(dora):
    """As in evaluations and exports; weights of DoRA are normed in float32 everywhere."""
    plain, without = adapted(dora), adapted(dora)
    adapters.leave_casts_to_autocast(without)
    ids = torch.arange(20)[None]
    assert torch.equal(without(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert trained(without)[0] == trained(plain)[0]


# ------------------------------------------------------------------------------ LoRA's products


class Pair(nn.Module):
    """Two layers, of which the first has a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(96, 160), nn.Linear(160, 64, bias=False)

    def forward(self, states):
        return self.second(torch.tanh(self.first(states)))


@pytest.fixture
def anywhere(monkeypatch):
    """Take our products on a CPU, too."""
    monkeypatch.setattr(lora_products, "on_gpu", lambda states: True)


def pair(dtype=torch.float32, installed=True, **changes):
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


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_outputs_and_gradients_are_pefts_to_1e_6(monkeypatch, changes):
    """With dropout in evaluation, where peft drops nothing."""
    uses, found = count_uses(monkeypatch), []
    for installed in (True, False):
        model = pair(installed=installed, **changes)
        found.append(answers(model.eval() if "lora_dropout" in changes else model))
    assert len(uses) == 2
    for own, peft in zip(*found, strict=True):
        torch.testing.assert_close(own, peft, rtol=1e-6, atol=1e-6 * peft.abs().max().item())


@pytest.mark.usefixtures("anywhere")
def test_in_16_bits_errors_are_no_larger_than_pefts():
    """One rounding of the sum for three: of the product by B, its scale and the sum."""
    exact = answers(pair(torch.bfloat16, installed=False).double(), dtype=torch.float64)
    own, peft = (
        answers(pair(torch.bfloat16, installed=installed), True, torch.bfloat16)
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


@pytest.mark.usefixtures("anywhere")
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
        model = left_to_peft(pair(installed=installed, **changes), case)
        torch.manual_seed(2)
        with torch.no_grad():
            found.append(model(torch.ones(2, 96)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert len(uses) == num_uses


@pytest.mark.usefixtures("anywhere")
def test_what_is_saved_is_unchanged():
    own, peft = (pair(installed=installed).state_dict() for installed in (True, False))
    assert own.keys() == peft.keys()
    assert all(torch.equal(own[name], peft[name]) for name in own)


@pytest.mark.usefixtures("anywhere")
def test_merging_is_unchanged():
    own, peft = (
        pair(installed=installed).merge_and_unload()(torch.ones(96)) for installed in (True, False)
    )
    assert torch.equal(own, peft)


def test_a_cpu_keeps_pefts_products(monkeypatch):
    uses = count_uses(monkeypatch)
    answers(pair())
    assert not uses


@pytest.mark.usefixtures("anywhere")
def test_a_variable_leaves_them_out(monkeypatch):
    monkeypatch.setenv("FINETUNE_WITHOUT_KERNELS", "lora_products")
    uses = count_uses(monkeypatch)
    answers(pair())
    assert not uses
