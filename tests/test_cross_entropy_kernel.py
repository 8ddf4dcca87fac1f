"""The kernel of the loss computes what PyTorch's operations do; a wrong one is refused."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from finetune import kernels
from finetune.errors import ConfigError
from finetune.models import logits
from finetune.models.logits import LogitTransform

CPU = torch.device("cpu")


@pytest.fixture
def kernel(interpreted):
    return interpreted("finetune.models.cross_entropy_kernel")


def test_losses_and_gradients_are_those_of_the_reference(kernel):
    """Scaled and capped logits, weights, label smoothing; a vocabulary of several blocks."""
    assert logits.difference(kernel, CPU) == ""


@pytest.mark.parametrize("value", [0.0, 1e-3, 0.3, 5.0, 80.0, -80.0])
def test_capped_logits_of_any_size_have_their_loss(kernel, value):
    """Near 0 by the series of tanh, elsewhere by its formula; exponentials overflow nowhere."""
    raw, labels = torch.full((1, 7), value), torch.tensor([3])
    raw[0, 3] += 0.01
    finish = LogitTransform(cap=4.0)
    wanted = torch.nn.functional.cross_entropy(finish(raw.double()), labels)
    loss = kernel.cross_entropy_(raw, labels, None, finish, 0.0, True)
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert raw.isfinite().all()


def test_gradients_in_16_bits_are_float32s_rounded_once(kernel):
    """Within one step of bfloat16: the interpreter cuts where a GPU rounds to the nearest."""
    random = torch.Generator().manual_seed(0)
    raw = torch.randn(4, 5_000, generator=random).bfloat16()
    exact, labels = raw.float(), torch.tensor([0, 1, 4_097, 4_999])
    kernel.cross_entropy_(raw, labels, None, LogitTransform(), 0.0, True)
    kernel.cross_entropy_(exact, labels, None, LogitTransform(), 0.0, True)
    assert ((raw.float() - exact).abs() <= exact.abs() / 128).all()


def test_an_evaluation_leaves_the_logits_alone(kernel):
    raw, labels = torch.randn(3, 50), torch.tensor([1, 2, 3])
    before = raw.clone()
    kernel.cross_entropy_(raw, labels, None, LogitTransform(), 0.0, False)
    assert torch.equal(raw, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, in the interpreter
def test_an_infinite_logit_is_an_infinite_or_missing_loss_and_no_hang(kernel):
    for wrong in (torch.nan, torch.inf):
        raw, labels = torch.randn(1, 50), torch.tensor([1])
        raw[0, 7] = wrong
        assert not kernel.cross_entropy_(raw, labels, None, LogitTransform(), 0.0, True).isfinite()


def plain_without(what):
    def cross_entropy_(raw, labels, weights, finish, smoothing, needs_grad):
        if what == "weights":
            weights = None
        if what == "smoothing":
            smoothing = 0.0
        if what == "cap":
            finish = replace(finish, cap=None)
        loss = logits._plain_(raw, labels, weights, finish, smoothing, needs_grad)
        if what == "half the gradient":
            raw *= 0.5
        return loss

    return SimpleNamespace(cross_entropy_=cross_entropy_)


@pytest.mark.parametrize("what", ["weights", "smoothing", "cap", "half the gradient"])
def test_a_kernel_with_another_result_is_refused(what):
    assert logits.difference(plain_without("nothing"), CPU) == ""
    part = "gradient differs by" if "gradient" in what else "loss is"
    assert logits.difference(plain_without(what), CPU).startswith(f"its {part}")


def test_kernels_can_be_left_out_by_name(monkeypatch):
    monkeypatch.setenv(kernels.WITHOUT, "adamw_kernel,cross_entropy_kernel")
    found = kernels.load("finetune.models.cross_entropy_kernel", lambda made: "never asked")
    assert found == (None, "FINETUNE_WITHOUT_KERNELS names it")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("rmsnorm", "did you mean rms_norm?"), ("CUDNN", "did you mean cudnn?"), ("x", "kernels are")],
)
def test_an_unknown_kernel_cannot_be_left_out(monkeypatch, name, hint):
    monkeypatch.setenv(kernels.WITHOUT, f"adamw_kernel, swiglu,{name}")
    assert kernels.is_left_out("swiglu"), "after a space, too"
    with pytest.raises(ConfigError, match=f"no kernel has the name '{name}'; .*{re.escape(hint)}"):
        kernels.require_known()


def test_a_run_refuses_to_leave_out_an_unknown_kernel(workshop, monkeypatch):
    monkeypatch.setenv(kernels.WITHOUT, "adamw")
    with pytest.raises(ConfigError, match="FINETUNE_WITHOUT_KERNELS: no kernel"):
        workshop.check()


def test_a_cpu_takes_the_plain_operations():
    assert logits.fused(CPU) == (None, "")
