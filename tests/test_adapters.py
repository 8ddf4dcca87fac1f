"""What adapters do to their inputs."""

import pytest
import torch
from conftest import TINY_LLAMA
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.models import adapters


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
