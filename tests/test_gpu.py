"""What only a GPU can show. Skipped, with the reason, where there is none."""

import importlib.util

import pytest
import torch
from conftest import TINY_LLAMA, losses, read_jsonl

from finetune.models.attention import attend_within_documents

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
needs_flash = pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed (requirements-cuda.txt)"
)
# Two-layer models with heads of 16: the fused kernels take no smaller ones.
GPU_LLAMA = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128}


@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
@pytest.mark.parametrize("key_heads", [1, 4], ids=["grouped", "equal"])
def test_the_fused_kernel_agrees_with_float32_on_the_cpu(window, key_heads):
    """The same packs, outputs and gradients, to bfloat16's rounding (2^-8 of the largest value)."""
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 8, 40], dtype=torch.int32)
    states = [torch.randn(1, heads, 40, 32, dtype=torch.float64) for heads in (4, key_heads, key_heads)]

    def attend(device, dtype):
        inputs = [s.to(device, dtype).requires_grad_() for s in states]
        out, _ = attend_within_documents(
            torch.nn.Module(), *inputs, None, sliding_window=window, cu_seq_lens_q=bounds.to(device), max_length_q=32
        )
        out.sum().backward()
        return [t.detach().double().cpu() for t in (out, *(i.grad for i in inputs))]

    for fast, exact in zip(attend("cuda", torch.bfloat16), attend("cpu", torch.float64), strict=True):
        assert (fast - exact).abs().max() <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(workshop, precision):
    run = workshop.train(model__config=GPU_LLAMA, train__precision=precision, train__max_steps=20, train__epochs=5)
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert "mfu" in read_jsonl(run / "metrics.jsonl")[-1] or "H" not in torch.cuda.get_device_name()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_equals_padded(workshop, precision):
    """Same sequences, other layout; half precision rounds each differently."""
    laid = workshop.train("laid", model__config=GPU_LLAMA, train__precision=precision)
    padded = workshop.train("padded", model__config=GPU_LLAMA, train__precision=precision, model__attention="sdpa")
    assert losses(laid) == pytest.approx(losses(padded), rel=2e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_equals_uninterrupted(workshop, precision):
    """With fp16 the gradient scaler goes on too. CUDA adds up in no fixed order, so not to the bit."""
    settings = {"model__config": GPU_LLAMA, "train__precision": precision, "checkpoint__every_steps": 2, "checkpoint__keep_last": 9}  # fmt: skip
    whole = workshop.train("whole", **settings)
    workshop.train("cut", **settings)
    for path in (workshop.run_dir("cut") / "checkpoints").glob("step-*"):
        if path.name > "step-00000002":
            path.rename(workshop.folder / path.name)
    (workshop.run_dir("cut") / "outcome.json").unlink()
    assert losses(workshop.train("cut", **settings)) == pytest.approx(losses(whole), rel=1e-2)


@needs_flash
def test_flash_attention_equals_documents(workshop):
    flash, ours = (
        workshop.train(
            name, model__config=GPU_LLAMA, train__precision="bf16", model__attention=name, data__packing=True
        )
        for name in ("flash_attention_2", "documents")
    )
    assert losses(flash) == pytest.approx(losses(ours), rel=2e-2)
