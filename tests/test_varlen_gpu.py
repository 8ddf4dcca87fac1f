"""Kernels of a GPU: which there are, which agree with float32, and which a run takes."""

import re
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_LLAMA
from transformers import AutoConfig

from finetune.errors import ModelError
from finetune.models import attention_choice, varlen_choice, varlen_cpu, varlen_gpu
from finetune.models.attention_choice import CUDNN, FLASH_2, FLASH_3, FLASH_4
from finetune.models.varlen_choice import Work, missing

CPU = torch.device("cpu")
WORK = Work(4, 2, 16, torch.bfloat16, False, documents=(40, 24), lengths=(24, 40))
LONG = replace(WORK, documents=(8192,), lengths=(8192,))
HOPPER, BLACKWELL, AMPERE, RTX_50 = (9, 0), (10, 0), (8, 0), (12, 0)


def on_cpu(query, key, value, bounds, longest, lengths, scale, window, causal=True):
    """A kernel in every respect, by PyTorch's attention for CPUs."""
    states = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    return varlen_cpu.one_by_one(*states, bounds, scale, window or 0, causal)[0][0]


@pytest.mark.parametrize(
    ("kernel", "work", "capability", "says"),
    [
        (FLASH_4, LONG, HOPPER, ""),
        (FLASH_4, LONG, RTX_50, ""),
        (FLASH_4, LONG, AMPERE, "needs compute capability 9, 10 or 12 .* this is compute .* 8.0"),
        (FLASH_4, replace(LONG, width=256), HOPPER, ""),
        (FLASH_4, replace(LONG, width=256), BLACKWELL, "no heads of 256"),
        (FLASH_3, LONG, HOPPER, ""),
        (FLASH_3, LONG, BLACKWELL, "needs compute capability 9.0"),
        (CUDNN, LONG, HOPPER, ""),
        (CUDNN, LONG, AMPERE, "on compute capability 9 and 10 only"),
        (CUDNN, replace(LONG, has_windows=True), HOPPER, "sliding windows"),
        (CUDNN, replace(LONG, width=256), HOPPER, "heads of 256"),
        (CUDNN, WORK, HOPPER, "makes a plan for each length, .* have 2 lengths, from 24 tokens"),
        (CUDNN, replace(LONG, lengths=tuple(range(4000, 4009))), HOPPER, "have 9 lengths"),
    ],
)  # fmt: skip
def test_a_kernel_that_cannot_do_the_work_says_why(kernel, work, capability, says):
    why = missing(kernel, work, capability, lambda module: True)
    assert bool(why) == bool(says)
    assert re.search(says, why)


@pytest.mark.parametrize(
    ("kernel", "wheel"), [(FLASH_3, "flash-attn-3"), (FLASH_4, "flash-attn-4")]
)
def test_a_kernel_without_its_package_names_the_wheel(kernel, wheel):
    assert missing(kernel, LONG, HOPPER, lambda module: False).startswith(
        f"{wheel} is not installed"
    )


def test_flash_attn_4_is_not_taken_for_flash_attn_2(tmp_path, monkeypatch):
    """flash-attn-4 puts `cute` into a package `flash_attn` that may hold nothing else."""
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info").mkdir()
    (tmp_path / "flash_attn_4-4.0.0b36.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: flash-attn-4\nVersion: 4.0.0b36\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert attention_choice.has_package("flash-attn-4")
    assert not attention_choice.has_package("flash-attn")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("has_windows", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_a_kernel_that_agrees_with_float32_is_taken(key_heads, has_windows, causal):
    work = replace(WORK, key_heads=key_heads, has_windows=has_windows, causal=causal)
    assert varlen_choice.wrong(FLASH_2, work, CPU, on_cpu) == ""


@pytest.mark.parametrize("kernel", [FLASH_4, CUDNN])
def test_a_kernel_is_compared_on_documents_that_it_takes(kernel):
    """cuDNN refuses a document of one token, which no run gives it; the others get one."""
    seen = []

    def noting(query, key, value, bounds, longest, lengths, *rest):
        seen.extend(lengths.values)
        return on_cpu(query, key, value, bounds, longest, lengths, *rest)

    assert varlen_choice.wrong(kernel, WORK, CPU, noting) == ""
    assert (1 in seen) == (kernel != CUDNN)


def joined(query, key, value, bounds, *rest):
    return on_cpu(query, key, value, bounds[[0, 1, 2, 4]], *rest)


def scaled(query, key, value, bounds, longest, lengths, scale, window, causal):
    return on_cpu(query, key, value, bounds, longest, lengths, scale * 1.2, window, causal)


def without_gradient(query, key, value, *rest):
    return on_cpu(query, key, 0.5 * value + 0.5 * value.detach(), *rest)


def without_window(query, key, value, bounds, longest, lengths, scale, window, causal):
    return on_cpu(query, key, value, bounds, longest, lengths, scale, None, causal)


def other_way(query, key, value, bounds, longest, lengths, scale, window, causal):
    return on_cpu(query, key, value, bounds, longest, lengths, scale, window, not causal)


def not_compiled(*_):
    raise RuntimeError("no nvcc here\nand more")


@pytest.mark.parametrize(
    ("attend", "says"),
    [
        (joined, r"its output is \d+.\d% away from float32's, more than 2%"),
        (scaled, "its output is"),
        (without_gradient, r"its gradient of values is 50.\d% away"),
        (without_window, "its output is"),
        (other_way, "its output is"),
        (not_compiled, "RuntimeError: no nvcc here"),
        (lambda *states: on_cpu(*states) * torch.nan, "its output is nan%"),
    ],
    ids=[
        "leaks",
        "other scale",
        "half a gradient",
        "no window",
        "other way",
        "raises",
        "not a number",
    ],
)
def test_a_kernel_that_is_wrong_is_named(attend, says):
    why = varlen_choice.wrong(FLASH_2, replace(WORK, has_windows=True), CPU, attend)
    assert re.search(says, why), why


def test_the_fastest_kernel_is_taken_if_it_is_clearly_faster():
    assert varlen_choice.fastest({FLASH_2: 2.0, FLASH_4: 1.0, CUDNN: 0.9}) == CUDNN
    assert varlen_choice.fastest({FLASH_2: 2.0, FLASH_4: 1.97}) == FLASH_2
    assert varlen_choice.described(FLASH_4, {FLASH_2: 1.9, FLASH_4: 0.9}, {CUDNN: "no plan"}) == (
        "flash_attention_4: 0.9 ms a layer for the longest batch (flash_attention_2 1.9); "
        "cudnn cannot be used: no plan"
    )
    assert varlen_choice.milliseconds(FLASH_2, WORK, CPU, on_cpu, rounds=1) > 0
    assert varlen_choice._first([20_000, 20_000, 5]) == [20_000, 12_768]
    assert varlen_choice._first([7, 5]) == [7, 5]


def test_a_run_that_needs_all_the_memory_is_not_timed(settled, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert settled({FLASH_2: 2.0, FLASH_4: 1.0})[0] == FLASH_4
    monkeypatch.setattr(varlen_choice, "milliseconds", full)
    assert varlen_choice.choose(LONG, CPU)[0] == FLASH_2


@pytest.fixture
def settled(monkeypatch):
    """Settle as on a Hopper GPU whose kernels take these milliseconds, or fail."""

    def settle(took, wanted=None, work=LONG):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
        monkeypatch.setattr(varlen_choice, "has_package", lambda name: name == "flash-attn-4")
        monkeypatch.setattr(varlen_choice, "milliseconds", lambda kernel, *_: took[kernel])
        monkeypatch.setattr(
            varlen_choice, "wrong", lambda kernel, *_: "" if kernel in took else "it is wrong"
        )
        return varlen_choice.choose(work, CPU, wanted)

    return settle


def test_a_run_takes_the_fastest_kernel_that_is_right(settled):
    used, line = settled({FLASH_2: 2.0, FLASH_4: 0.8, CUDNN: 0.9})
    assert used == FLASH_4
    assert line.startswith("flash_attention_4: 0.8 ms")
    assert settled({FLASH_2: 2.0, CUDNN: 0.9}) == (
        CUDNN,
        "cudnn: 0.9 ms a layer for the longest batch (flash_attention_2 2.0); "
        "flash_attention_4 cannot be used: it is wrong",
    )
    assert settled({FLASH_2: 2.0}, work=WORK) == (
        FLASH_2, "flash_attention_2; flash_attention_4 cannot be used: it is wrong",
    )  # fmt: skip


def test_a_kernel_that_the_config_names_is_taken_or_an_error(settled):
    assert settled({FLASH_2: 1.0, FLASH_4: 3.0}, FLASH_4) == (FLASH_4, FLASH_4)
    with pytest.raises(ModelError, match="flash_attention_4 cannot be used: it is wrong; use auto"):
        settled({FLASH_2: 1.0}, FLASH_4)
    with pytest.raises(ModelError, match="flash-attn-3 is not installed; use auto"):
        settled({FLASH_2: 1.0}, FLASH_3)


class Cute(types.ModuleType):
    """flash_attn.cute.interface as 4.0.0b36 has it, by dense attention on a CPU."""

    def _flash_attn_fwd(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, *, max_seqlen_q=None,
        max_seqlen_k=None, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, return_lse=False,
    ):  # fmt: skip
        right = 0 if causal else window_size_right
        assert (return_lse, right) == (True, 0 if causal else window_size_left)
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        scores, _ = self.scores(q, k, cu_seqlens_q, softmax_scale, window_size_left, right)
        sums = scores.logsumexp(-1)
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), self.shared(q, v).float())
        return out.to(q.dtype), sums, None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        assert dout.is_contiguous()
        assert max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
        right = 0 if causal else window_size_right
        scores, _ = self.scores(q, k, cu_seqlens_q, softmax_scale, window_size_left, right)
        assert torch.allclose(scores.logsumexp(-1), lse)
        chances, grad = scores.softmax(-1), dout.float()
        keys, values = (self.shared(q, tensor).float() for tensor in (k, v))
        of_chances = torch.einsum("thd,shd->hts", grad, values)
        of_scores = chances * (of_chances - (chances * of_chances).sum(-1, keepdim=True))
        of_scores *= softmax_scale
        of_query = torch.einsum("hts,shd->thd", of_scores, keys)
        of_key = torch.einsum("hts,thd->shd", of_scores, q.float())
        of_value = torch.einsum("hts,thd->shd", chances, grad)
        summed = (each.unflatten(1, (k.shape[1], -1)).sum(2) for each in (of_key, of_value))
        return of_query.to(q.dtype), *(each.to(q.dtype) for each in summed)

    @staticmethod
    def shared(q, tensor):
        return tensor.repeat_interleave(q.shape[1] // tensor.shape[1], 1)

    def scores(self, q, k, bounds, scale, left, right):
        number = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        seen = number[:, None] == number
        if left is not None:
            seen &= distance <= left
        if right is not None:
            seen &= distance >= -right
        scores = scale * torch.einsum("thd,shd->hts", q.float(), self.shared(q, k).float())
        return scores.masked_fill(~seen, -torch.inf), seen


@pytest.fixture
def flash_4(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", Cute("interface"))
    yield
    varlen_gpu.use(FLASH_2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of 2.14's opcheck
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("has_windows", [False, True])
def test_flash_attention_4_gets_its_arguments_and_gives_its_gradients(flash_4, has_windows, causal):
    work = replace(WORK, has_windows=has_windows, causal=causal)
    assert varlen_choice.wrong(FLASH_4, work, CPU) == ""
    assert varlen_gpu.in_use() == FLASH_2, "a trial changes nothing"
    states = [torch.randn(9, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    arguments = (*states, torch.tensor([0, 4, 9]).int(), 5, 0.25, 3 if has_windows else 0, causal)
    assert set(torch.library.opcheck(varlen_gpu.flash_4, arguments).values()) == {"SUCCESS"}


@pytest.mark.slow
def test_flash_attention_4_is_one_operator_of_a_compiled_layer(flash_4):
    varlen_gpu.use(FLASH_4)
    states = [torch.randn(9, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
    bounds, lengths = torch.tensor([0, 4, 9]).int(), types.SimpleNamespace(values=(4, 5))

    def layer(query, key, value):
        return F.silu(varlen_gpu.attend(query, key, value, bounds, 5, lengths, 0.25, None))

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    results = []
    for form in (layer, compiled):
        out = form(*states)
        results.append([out, *torch.autograd.grad(out.square().sum(), states)])
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*results))


@pytest.mark.slow
def test_cudnn_is_not_compiled_anew_for_each_number_of_documents(monkeypatch):
    """After eight compilations the compiler gives up, and layers run uncompiled."""
    monkeypatch.setattr(varlen_gpu, "_in_use", CUDNN)
    monkeypatch.setattr(varlen_gpu, "_cudnn_document", lambda q, k, v, *_: q[0].transpose(0, 1))
    compiled = []

    def count(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def layer(states, bounds, longest, lengths):
        return 2 * varlen_gpu.attend(2 * states, states, states, bounds, longest, lengths, 1, None)

    torch._dynamo.reset()
    layer, found = torch.compile(layer, backend=count, dynamic=True), []
    for documents in ((9,), (12,), (5, 4), (3, 3, 3), (2, 3, 4, 5)):
        bounds, lengths = torch.tensor([0, *documents]), types.SimpleNamespace(values=documents)
        states = torch.randn(sum(documents), 4, 8)
        out = layer(states, bounds.cumsum(0).int(), max(documents), lengths)
        assert torch.equal(out, 4 * states)
        found.append(len(compiled))
    assert found[0] == found[1] == 1
    assert found[2] == found[-1]


@pytest.mark.parametrize(
    ("config", "num_context", "found"),
    [
        ({}, 1, (4, 2, 8, False)),
        ({"num_key_value_heads": 4, "head_dim": 20}, 1, (4, 4, 24, False)),
        ({}, 4, (1, 1, 8, False)),
        ({"model_type": "mistral", "sliding_window": 64}, 1, (4, 2, 8, True)),
        ({"model_type": "qwen2", "sliding_window": 64}, 1, (4, 2, 8, False)),
        (
            {"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True,
             "max_window_layers": 1},
            1, (4, 2, 8, True),
        ),
    ],
)  # fmt: skip
def test_work_is_read_from_the_config_of_the_model(config, num_context, found):
    model_config = AutoConfig.for_model(**{**TINY_LLAMA, **config})
    work = varlen_choice.work_of(model_config, torch.bfloat16, (5, 3), [3, 5, 3], num_context)
    assert (work.heads, work.key_heads, work.width, work.has_windows) == found
    assert (work.documents, work.lengths) == ((5, 3), (3, 5))
