"""What only a GPU can show. Machines without one skip it, with the reason."""

import contextlib
import functools
import shutil
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, read_jsonl, tiny_llama
from invariants import families
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from finetune import kernels, loop, replay
from finetune.engine import rounded_adamw
from finetune.engine.topology import start
from finetune.models import (
    attention_choice,
    cross_entropy,
    float8,
    liger,
    logits,
    lora_products,
    offload,
    parameters,
    varlen_choice,
)
from finetune.models.attention import attend_within_documents
from finetune.models.cross_entropy import nll_in_chunks
from finetune.models.logits import LogitTransform
from finetune.rollouts import sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
needs_flash = pytest.mark.skipif(
    not attention_choice.has_package("flash-attn"),
    reason="flash-attn is not installed (requirements-cuda.txt)",
)
# Two-layer models with heads of 16.
WIDER = {"hidden_size": 64, "intermediate_size": 128}
GPU_LLAMA = {**TINY_LLAMA, **WIDER}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("window", [None, 5], ids=["full", "sliding"])
@pytest.mark.parametrize("key_heads", [1, 2, 4], ids=["one shared", "grouped", "equal"])
@pytest.mark.parametrize(
    "width", [32, 20, 80], ids="heads of {}".format
)  # the kernels take multiples of 8
def test_fused_kernel_agrees_with_float32_on_the_cpu(causal, window, key_heads, width):
    """Outputs and gradients of the same packs agree to eight roundings of bfloat16 (2^-8 each).

    Inputs, scores, probabilities, the output and its gradient are rounded one after the other:
    bfloat16 on the CPU comes to 2.9 roundings, a document that is a token too long to 98, a window
    that is a token too short to 27.
    """
    torch.manual_seed(0)
    bounds = torch.tensor([0, 7, 8, 40], dtype=torch.int32)
    states = [torch.randn(1, heads, 40, width) for heads in (4, key_heads, key_heads)]

    def attend(device, dtype):
        inputs = [s.to(device, dtype).requires_grad_() for s in states]
        out, _ = attend_within_documents(
            torch.nn.Module(),
            *inputs,
            None,
            sliding_window=window,
            causal=causal,
            cu_seq_lens_q=bounds.to(device),
            max_length_q=32,
        )
        out.float().square().sum().backward()
        return [t.detach().double().cpu() for t in (out, *(i.grad for i in inputs))]

    for fast, exact in zip(
        attend("cuda", torch.bfloat16), attend("cpu", torch.float32), strict=True
    ):
        assert (fast - exact).abs().max() <= 2**-5 * exact.abs().max()


def test_attention_with_a_mask_has_gradients():
    """cuDNN's had none in torch 2.13: 704 tokens, with logits of -120 and a mask."""
    start.let_masks_have_gradients()
    query, key, value = (0.1 * torch.randn(3, 1, 1, 704, 64, device="cuda")).bfloat16()
    query[..., 0], key[..., 0] = 1.0, -120 * 64**0.5
    query.requires_grad_()
    mask = torch.ones(704, 704, dtype=torch.bool, device="cuda").tril()[None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out.float().square().sum().backward()
    assert query.grad.isfinite().all()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_every_precision_learns(workshop, precision):
    run = workshop.train(
        model__config=GPU_LLAMA, train__precision=precision, train__max_steps=20, train__epochs=5
    )
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert read_jsonl(run / "metrics.jsonl")[-1]["mfu"] > 0, (
        "of the table's rate, or a measured one"
    )


def test_to_notice_changes_takes_no_memory_of_weights():
    """A sum in float64 of a whole weight would take four times the memory of bfloat16."""
    model = torch.nn.Linear(1 << 13, 1 << 13, bias=False, dtype=torch.bfloat16, device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert parameters.fingerprints(model, lambda p: p)["weight"] != 0
    assert torch.cuda.max_memory_allocated() - before < 1.1 * 8 * parameters.SLICE


def test_a_summary_on_a_gpu_ends_with_memory_and_speed(workshop, capsys):
    workshop.check(model__config=GPU_LLAMA)
    memory, speed = capsys.readouterr().out.splitlines()[-2:]
    assert memory.startswith("memory      fits: ")
    assert speed.startswith(("speed       about ", "speed       not measured on "))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_packed_equals_padded(workshop, precision):
    """Same sequences, other layout; half precision rounds each differently."""
    laid = workshop.train("laid", model__config=GPU_LLAMA, train__precision=precision)
    padded = workshop.train(
        "padded", model__config=GPU_LLAMA, train__precision=precision, model__attention="sdpa"
    )
    assert losses(laid) == pytest.approx(losses(padded), rel=2e-2)


@pytest.mark.parametrize("objective", list(families.ROWS))
def test_other_families_have_the_losses_of_float32_in_bf16(workshop, objective):
    """Encoders packed and classified, encoder-decoders padded; the export is opened again."""
    settings = families.settings(workshop, objective)
    exact, half = (
        losses(workshop.train(precision, **settings, train__precision=precision))
        for precision in ("fp32", "bf16")
    )
    assert half == pytest.approx(exact, rel=3e-2)


@pytest.mark.parametrize("objective", families.PACKED)
def test_packed_encoders_equal_padded_ones(workshop, objective):
    settings = families.settings(workshop, objective) | {"train__precision": "bf16"}
    laid = workshop.train("laid", **settings)
    padded = workshop.train("padded", **settings, model__attention="sdpa")
    assert losses(laid) == pytest.approx(losses(padded), rel=3e-2)


def test_products_of_lora_agree_with_pefts(workshop, monkeypatch):
    """Other roundings: one of a sum for three."""
    uses, apply = [], lora_products._Products.apply
    monkeypatch.setattr(
        lora_products._Products, "apply", lambda *given: uses.append(1) or apply(*given)
    )
    settings = {"model__config": GPU_LLAMA, "train__precision": "bf16", "train__compile": False}
    base = workshop.train("base", **settings) / "model"
    adapter = {"model__path": str(base), "model__config": None, "model__init": "pretrained"}
    adapter |= {"model__tokenizer": None, "adapter__kind": "lora", "optimizer__lr": 1e-3}
    own = losses(workshop.train("own", **{**settings, **adapter}))
    assert uses
    uses.clear()
    monkeypatch.setenv("FINETUNE_WITHOUT_KERNELS", "lora_products")
    assert losses(workshop.train("peft", **{**settings, **adapter})) == pytest.approx(own, rel=1e-2)
    assert not uses


def test_inputs_of_layers_leave_the_gpu_and_come_back():
    """Of 16 inputs of 64 MiB three are there at once; gradients keep every bit."""

    def run(offloads):
        torch.manual_seed(0)
        layers = [torch.nn.Linear(4096, 4096, bias=False, device="cuda") for _ in range(16)]
        moves = offload.Offload()
        states = torch.randn(4096, 4096, device="cuda").requires_grad_() * 1.0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for layer in layers:
            recomputed = functools.partial(checkpoint, layer, use_reentrant=False)
            states = (moves.around(recomputed) if offloads else recomputed)(states)
        after_forward = torch.cuda.max_memory_allocated() - before
        states.square().mean().backward()
        return after_forward, [layer.weight.grad for layer in layers]

    (whole, wanted), (moved, found) = run(False), run(True)
    assert all(map(torch.equal, found, wanted))
    assert moved < 5 * 2**26
    assert whole > 15 * 2**26


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_equals_uninterrupted(workshop, precision):
    """With fp16, includes the gradient scaler. CUDA sums in any order, so not to the bit."""
    settings = {
        "model__config": GPU_LLAMA,
        "train__precision": precision,
        "checkpoint__every_steps": 2,
        "checkpoint__keep_last": 9,
    }
    whole = workshop.train("whole", **settings)
    workshop.train("cut", **settings)
    for path in (workshop.run_dir("cut") / "checkpoints").glob("step-*"):
        if path.name > "step-00000002":
            path.rename(workshop.folder / path.name)
    (workshop.run_dir("cut") / "outcome.json").unlink()
    steps = [
        [(line["loss"], line["grad_norm"]) for line in read_jsonl(run / "metrics.jsonl")]
        for run in (whole, workshop.train("cut", **settings))
    ]
    assert all(map(replay.agree, *steps, [replay.TOLERANCE[precision]] * len(steps[0]))), steps
    assert len(steps[0]) == len(steps[1])


@pytest.mark.parametrize("asynchronous", [True, False], ids=["in the background", "waited for"])
def test_every_save_is_written_and_read_back(workshop, asynchronous):
    """Accelerate calls the device of one process `cuda`, without an index; save more than once."""
    settings = {
        "model__config": GPU_LLAMA,
        "train__precision": "bf16",
        "checkpoint__every_steps": 1,
        "checkpoint__asynchronous": asynchronous,
    }
    run = workshop.train(**settings)
    assert [line["step"] for line in read_jsonl(run / "saves.jsonl")] == [1, 2, 3, 4, 5]
    newest = max((run / "checkpoints").glob("step-*"))
    shutil.rmtree(newest)
    (run / "outcome.json").unlink()
    workshop.train(**settings)  # from step 4
    assert newest.is_dir()
    assert len(losses(run)) == 5


@pytest.mark.filterwarnings("ignore")  # what the compiler's modules say while they are imported
def test_compiled_layers_have_no_graph_break(workshop):
    """A break would be in every layer, forward and backward: what is fused ends there."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(
            "no kernel for packs before compute capability 8: documents go one by one, between the "
            "compiled parts"
        )
    torch._dynamo.reset()
    counters.clear()
    workshop.train(
        model__config=GPU_LLAMA, train__precision="bf16", train__compile=True, data__packing=True
    )
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]


def test_fp16_gradient_of_the_head_is_a_sum_in_float32():
    """The sum over 4,096 tokens of one word exceeds fp16's 65,504; no loss scale helps."""
    hidden, targets = torch.full((4096, 64), 32.0), torch.zeros(4096, dtype=torch.long)

    def gradient(device, context):
        head = torch.nn.Linear(64, 16, bias=False, device=device)
        torch.nn.init.zeros_(head.weight)
        with context:
            total = nll_in_chunks(
                head,
                head.forward,
                hidden.to(device).requires_grad_(),
                targets.to(device),
                16,
                LogitTransform(),
            )
        total.backward()
        return head.weight.grad.cpu()

    half = gradient("cuda", torch.autocast("cuda", torch.float16))
    exact = gradient("cpu", contextlib.nullcontext())
    assert exact.abs().max() > 65504
    torch.testing.assert_close(half, exact, rtol=1e-2, atol=1e-2 * float(exact.abs().max()))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixture_of_experts_passes_its_checks(workshop, precision):
    """Attention, head and export are compared although a near-tie may choose another expert."""
    config = {
        **GPU_LLAMA,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    }
    run = workshop.train(model__config=config, train__precision=precision, data__packing=True)
    assert (run / "model").is_dir()


def test_a_step_waits_for_the_gpu_once(workshop, monkeypatch, record_property):
    """Each wait idles the GPU until the host catches up. An H200 showed ten before one was left."""
    train_step, found = loop.train_step, []

    def watched(*arguments, **keywords):
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return train_step(*arguments, **keywords)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                found.append(
                    [
                        f"{w.filename.split('site-packages/')[-1]}:{w.lineno}"
                        for w in caught
                        if "synchronizing" in str(w.message)
                    ]
                )

    monkeypatch.setattr(loop, "train_step", watched)
    workshop.train(
        model__config=GPU_LLAMA,
        train__precision="bf16",
        data__packing=True,
        train__global_batch_size=4,
    )
    waits = found[-1]  # the first steps make what later ones find
    record_property("waits", len(waits))
    assert waits, "the loss is read at the end of a step: a count of none has seen nothing"
    assert len(waits) == 1, dict(Counter(waits))


def completions(device, length=24):
    """Completions of prompts of several lengths by a model whose distributions are not flat."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=300, **WIDER))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.ndim > 1 else 1.0)
    numbers = sampling.numbers_of(3, count=4, places=length)
    prompts = [[1, 7, 9], [1], [5, 6, 7, 8, 9, 10], [4, 4]]
    return sampling.draw(
        model.to(device), prompts, numbers, temperature=0.8, ends={2}, pad=0, together=False,
        beat=lambda: None,
    )  # fmt: skip


def test_a_gpu_draws_the_tokens_that_a_cpu_draws():
    """Padded on the left, so rows of attention without any key must not become NaN."""
    exact, found = completions("cpu"), completions("cuda")
    assert [each.ids for each in found] == [each.ids for each in exact]
    for one, other in zip(found, exact):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
    with torch.autocast("cuda", torch.bfloat16):
        half = completions("cuda")
    assert all(np.isfinite(each.logprobs).all() for each in half)
    same = [(one, other) for one, other in zip(half, exact) if one.ids[0] == other.ids[0]]
    assert same, "distributions are almost the same, so are most first tokens"
    assert max(abs(one.logprobs[0] - other.logprobs[0]) for one, other in same) < 0.1


def test_the_sampler_waits_for_the_gpu_once_whatever_the_length(record_property):
    """Transformers waits once a token, to see which completions have ended; our lines must not."""
    counts = []
    for length in (8, 24):
        completions("cuda", length)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                completions("cuda", length)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w.filename for w in caught if "synchronizing" in str(w.message)]
        counts.append(sum(name.endswith("rollouts/sampling.py") for name in waits))
        record_property(f"waits_{length}", len(waits))
    assert counts[0] == counts[1] > 0, counts


@needs_flash
def test_flash_attention_equals_documents(workshop):
    flash, ours = (
        workshop.train(
            name,
            model__config=GPU_LLAMA,
            train__precision="bf16",
            model__attention=name,
            data__packing=True,
        )
        for name in ("flash_attention_2", "documents")
    )
    assert losses(flash) == pytest.approx(losses(ours), rel=2e-2)


def test_rounded_adamw_is_one_kernel_that_gives_the_bits_of_the_reference():
    """The notes of Triton's compiler, or the number of differences, are in the failure."""
    device = torch.device("cuda", torch.cuda.current_device())
    used, why = rounded_adamw.fastest(device)
    assert why == ""
    assert rounded_adamw.differences(used, device, count=5_000_000) == 0


@pytest.mark.parametrize(
    "part",
    [
        liger.Norm(4096, 1e-5, 0.0, rounds_first=True),
        liger.Norm(128, 1e-6, 0.0, rounds_first=True),
        liger.Norm(2304, 1e-6, 1.0, rounds_first=False),
        liger.Gate(14336, "SwiGLU"),
        liger.Gate(9216, "GeGLU"),
        liger.Gate(8192, "SwiGLU", ("gate_up_proj",)),
    ],
    ids=["Llama's norm", "Qwen's of heads", "Gemma's", "SwiGLU", "GeGLU", "Phi-3's SwiGLU"],
)
def test_norms_and_gates_of_liger_agree_with_float32(monkeypatch, part):
    """In float32 to 1e-6, in 16 bits 1.1 times the error of PyTorch's operations; many rows too."""
    device = torch.device("cuda", torch.cuda.current_device())
    pytest.importorskip("liger_kernel")
    monkeypatch.setattr(liger, "WITHIN", 1e-6)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    assert liger.wrong(part, device, dtypes) == ""
    rows = 40_000 if part.size <= 256 else 3_000  # small norms have another kernel from 32,768
    assert liger.wrong(part, device, (torch.bfloat16,), rows=rows) == ""


@pytest.mark.parametrize("method", [{}, {"model__dtype": "bfloat16"}, "lora"], ids=str)
def test_a_run_with_ligers_kernels_has_the_losses_of_one_without(
    workshop, monkeypatch, capsys, method
):
    pytest.importorskip("liger_kernel")
    base = workshop.train("base", model__config=GPU_LLAMA, train__precision="bf16") / "model"
    settings = pretrained(base, adapter__kind="lora") if method == "lora" else method
    if method != "lora":
        settings = {"model__config": GPU_LLAMA, **method}
    settings |= {"train__precision": "bf16", "data__packing": True}
    settings |= {"train__gradient_checkpointing": 1}
    capsys.readouterr()
    fast = workshop.train("fast", **settings)
    assert "SwiGLU (2) and RMSNorm (5) run by Liger's kernels" in capsys.readouterr().out
    monkeypatch.setenv(kernels.WITHOUT, "rms_norm,swiglu")
    plain = workshop.train("plain", **settings)
    assert losses(fast) == pytest.approx(losses(plain), rel=2e-2)


@pytest.fixture
def in_float8(monkeypatch):
    """Skip where the GPU, or this environment, has no float8; let small products have it."""
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < float8.CAPABILITY:
        pytest.skip("float8 needs compute capability 8.9 (Ada) or newer")
    monkeypatch.setattr(float8, "WORTH", 8)
    torch._dynamo.reset()
    counters.clear()


@pytest.mark.filterwarnings("ignore")  # what torchao's modules say while they are imported
@pytest.mark.parametrize("kind", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_product_in_float8_is_as_exact_as_its_emulation(in_float8, kind, trains):
    """201 tokens, no multiple of 16; products of Llama-3.1-8B, both ways."""
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name(kind)
    device = torch.device("cuda", torch.cuda.current_device())
    for inputs, outputs in ((4096, 14336), (14336, 4096), (64, 96)):
        assert float8.wrong(config, inputs, outputs, trains, device) == ""


@pytest.mark.filterwarnings("ignore")  # what the compiler's modules say while they are imported
@pytest.mark.parametrize(
    ("method", "kind"),
    [("float32 masters", True), ("bf16 weights", "rowwise"), ("lora", True)],
    ids=["float32 masters", "bf16 weights, rowwise", "lora"],
)
def test_a_run_in_float8_learns_as_one_in_bf16(in_float8, workshop, method, kind):
    """Twenty steps, layers compiled without a graph break; the export is verified in bf16."""
    shape = {**GPU_LLAMA, "hidden_size": 256, "intermediate_size": 512}
    settings = {"model__config": shape, "train__precision": "bf16", "data__packing": True}
    settings |= {"train__epochs": 9, "train__max_steps": 20, "optimizer__lr": 1e-3}
    if method == "bf16 weights":
        settings["model__dtype"] = "bfloat16"
    if method == "lora":
        base = workshop.train("base", **settings) / "model"
        settings |= pretrained(base, adapter__kind="lora")
    plain, fast = (
        losses(workshop.train(name, **settings, train__compile=True, train__float8=own))
        for name, own in (("plain", False), ("fast", kind))
    )
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not counters["graph_break"]
    assert fast != plain
    # Of the first loss: while it falls fast, an H200 showed 1.2%.
    assert fast == pytest.approx(plain, abs=2e-2 * plain[0])
    if method != "lora":  # whose base has learned these rows
        assert fast[-1] < fast[0]


@pytest.mark.parametrize("kernel", ["flash_attention_2", *attention_choice.BY_SETTING])
def test_kernels_that_are_there_agree_with_float32(kernel):
    """What `settle` asks before a run, of full and sliding attention, shared and equal heads."""
    device = torch.device("cuda", torch.cuda.current_device())
    capability, shape = torch.cuda.get_device_capability(device), (32, 8, 128, torch.bfloat16)
    work = varlen_choice.Work(*shape, False, documents=(8192,), lengths=(8192,))
    if why := varlen_choice.missing(kernel, work, capability, attention_choice.has_package):
        pytest.skip(why)
    for each in (work, replace(work, key_heads=32), replace(work, has_windows=kernel != "cudnn")):
        assert varlen_choice.wrong(kernel, each, device) == ""
    print(f"{kernel}: {varlen_choice.milliseconds(kernel, work, device):.2f} ms")


def test_the_loss_is_one_kernel_that_agrees_with_pytorchs_operations():
    kernel, why = logits.fused(torch.device("cuda", torch.cuda.current_device()))
    assert why == ""
    assert kernel is not None


def test_the_gradient_of_the_head_is_summed_in_float32_over_chunks(monkeypatch):
    """Products of 16 bits that add to float32 as they write; autocast must not convert them."""
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 2**16)
    head, labels = torch.nn.Linear(64, 1_000, bias=False), torch.randint(1_000, (300,))
    states, found = torch.randn(300, 64), []
    for dtype, device in ((torch.float32, "cpu"), (torch.bfloat16, "cuda")):
        moved = head.to(device)
        moved.weight.grad = None
        hidden = states.to(device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = nll_in_chunks(moved, moved, hidden, labels.to(device), 1_000, LogitTransform())
        loss.backward()
        found.append(moved.weight.grad.cpu().clone())
    exact, own = found
    assert (own - exact).norm() <= 2**-7 * exact.norm()
