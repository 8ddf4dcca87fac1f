"""Divergences in chunks equal those of all logits, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F
from test_head import (
    ADAPTERS,
    VOCAB,
    Largest,
    asked,
    assert_alike,
    batch,
    chunks_of_a_few,
    gradients,
    make,
    with_adapters,
)

from finetune.models import head
from finetune.models.embeddings import add_noise
from finetune.models.logits import divergence
from finetune.models.policy import Policy

__all__ = ["chunks_of_a_few"]


def mixed(log_p, log_r, beta):
    """The divergence by its definition, from PyTorch's own KL."""

    def kl(log_from, log_to):
        return F.kl_div(log_to, log_from, reduction="none", log_target=True).sum(-1)

    if beta in (0.0, 1.0):
        return kl(log_r, log_p) if beta == 0.0 else kl(log_p, log_r)
    log_m = ((1 - beta) * log_p.exp() + beta * log_r.exp()).log()
    return beta * kl(log_r, log_m) + (1 - beta) * kl(log_p, log_m)


def random_logits():
    return 3 * torch.randn(2, 20, 50, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_a_divergence_is_that_of_its_definition(beta):
    logits, others = random_logits()
    wanted = mixed(logits.log_softmax(-1), others.log_softmax(-1), beta)
    found = divergence(logits, others, beta)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not divergence(logits, logits, beta).abs().max() > 1e-6


def test_near_its_ends_it_tends_to_the_forward_and_reverse_kl():
    """beta KL(r || m) with m = p + beta (r - p) is beta KL(r || p) to first order."""
    logits, others = random_logits() / 10
    for end, near in ((0.0, 0.01), (1.0, 0.99)):
        whole, part = (divergence(logits, others, beta) for beta in (end, near))
        torch.testing.assert_close(part / 0.01, whole, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_chunks_give_the_divergence_of_all_logits(chunks_of_a_few, name, beta):
    model, other = make(name), make(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) / 20)
    inputs, labels, positions = batch()
    log_p, log_r = (
        each(**inputs).logits.flatten(0, 1)[positions].float().log_softmax(-1)
        for each in (model, other)
    )
    plain = mixed(log_p, log_r.detach(), beta)
    wanted = gradients(model, plain.square().sum())
    for each in (model, other):
        head.install(each)
    with torch.no_grad():
        reference = asked(other, inputs, labels, positions, ["distribution"])["distribution"]
    answers = asked(
        model, inputs, labels, positions, ["divergence"], reference=reference, beta=beta
    )
    torch.testing.assert_close(answers["divergence"], plain, rtol=1e-4, atol=1e-5)
    found = gradients(model, answers["divergence"].square().sum())
    assert_alike(found, wanted, atol=1e-4, of_largest=1e-4)


@pytest.mark.parametrize("how", ADAPTERS)
def test_a_reference_without_adapters_stays_without_them(chunks_of_a_few, how):
    """Where the head has adapters, too, or is a trained copy."""
    model, inputs = with_adapters(make("llama"), how).eval(), batch()
    with torch.no_grad():
        log_p = model(**inputs[0]).logits.flatten(0, 1)[inputs[2]].log_softmax(-1)
        with model.disable_adapter():
            log_r = model(**inputs[0]).logits.flatten(0, 1)[inputs[2]].log_softmax(-1)
    head.install(model.get_base_model())
    with torch.no_grad(), model.disable_adapter():
        reference = asked(model, *inputs, ["distribution"])["distribution"]
    answers = asked(model, *inputs, ["divergence"], reference=reference, beta=1.0)
    torch.testing.assert_close(
        answers["divergence"], mixed(log_p, log_r, 1.0), rtol=1e-4, atol=1e-5
    )
    found = gradients(model, answers["divergence"].sum())
    assert any(gradient.any() for gradient in found.values())


def test_the_base_under_adapters_has_neither_dropout_nor_noise():
    """Else the divergence of adapters that do nothing yet would be that of the noise."""
    model = with_adapters(make("llama", attention_dropout=0.5), "on the layers")
    add_noise(model.get_base_model(), 5.0)
    inputs = {**batch()[0], "use_cache": False}
    with torch.no_grad():
        with model.disable_adapter():
            wanted = model.eval()(**inputs).logits
        model.train()
        policy = Policy(model)
        with policy.without_adapters():
            torch.testing.assert_close(model(**inputs).logits, wanted)
        assert all(module.training for module in model.modules())
        assert not torch.allclose(model(**inputs).logits, wanted)
        model.eval()
        with policy.without_adapters():
            pass
    assert not model.training


def test_a_reference_with_adapters_on_the_head_is_refused_without_them(chunks_of_a_few):
    model, inputs = with_adapters(make("llama"), "on the head").eval(), batch()
    head.install(model.get_base_model())
    with torch.no_grad():
        reference = asked(model, *inputs, ["distribution"])["distribution"]
        with pytest.raises(ValueError, match="which are off here"), model.disable_adapter():
            asked(model, *inputs, ["divergence"], reference=reference)


def test_a_model_that_holds_all_logits_answers_alike(chunks_of_a_few):
    found = []
    for holds in (False, True):
        model = with_adapters(make("llama"), "on the layers").eval()
        base = model.get_base_model()
        head.install(base)
        base.holds_all_logits = holds
        with torch.no_grad(), model.disable_adapter():
            reference = asked(model, *batch(), ["distribution"])["distribution"]
        answers = asked(model, *batch(), ["divergence", "nll"], reference=reference, beta=0.5)
        found.append(answers["divergence"])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_no_tensor_ever_holds_all_logits_of_either(chunks_of_a_few):
    model = with_adapters(make("llama"), "on the layers").eval()
    head.install(model.get_base_model())
    given = batch(num_tokens=60, every=1)
    with Largest() as largest:
        with torch.no_grad(), model.disable_adapter():
            reference = asked(model, *given, ["distribution"])["distribution"]
        asked(model, *given, ["divergence"], reference=reference)["divergence"].sum().backward()
    assert largest.numbers < 120 * VOCAB / 4
