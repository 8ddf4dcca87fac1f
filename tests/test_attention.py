"""Attention inside documents equals masked attention, in values and gradients, without a mask."""

import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from finetune.models import attention, attention_choice, attention_probe, varlen_cpu, varlen_gpu

PACKS = {
    "one document": [40],
    "many": [3, 17, 1, 9, 10],
    "of one token": [1, 1, 1],
    "one token": [1],
}


def states(heads, kv_heads, length, width=16, value_width=16, dtype=torch.float32):
    """query, key, value as a layer gives them: [1, H, T, D] views of [1, T, H, D]."""
    generator = torch.Generator().manual_seed(0)
    made = [
        torch.randn(1, length, n, d, generator=generator).to(dtype)
        for n, d in ((heads, width), (kv_heads, width), (kv_heads, value_width))
    ]
    return [tensor.requires_grad_() for tensor in made]


def bounds_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def masked(query, key, value, lengths, window, dropout=0.0, causal=True):
    """The plain way: one mask over the whole pack."""
    length = sum(lengths)
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (number[:, None] == number) & (distance.abs() < (window or length))
    seen &= (distance >= 0) | (not causal)
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, dropout_p=dropout
    ).transpose(1, 2)


def run(how, tensors, *arguments):
    """(output, gradients) of a fixed loss."""
    for tensor in tensors:
        tensor.grad = None
    out = how(*(tensor.transpose(1, 2) for tensor in tensors), *arguments)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return [out.detach(), *(tensor.grad.clone() for tensor in tensors)]


def ours(query, key, value, lengths, window, causal=True):
    return attention._attend(
        query,
        key,
        value,
        bounds_of(lengths),
        max(lengths),
        SimpleNamespace(values=lengths),
        None,
        0.0,
        window,
        causal,
    )


def both(how):
    """Attend as an encoder does: every token sees its whole document."""
    return functools.partial(how, causal=False)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("pack", PACKS)
def test_varlen_attention_equals_masked_attention(pack, kv_heads, window):
    lengths = PACKS[pack]
    tensors = states(4, kv_heads, sum(lengths))
    for own, wanted in zip(
        run(ours, tensors, lengths, window), run(masked, tensors, lengths, window)
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_both_ways_equals_masked_attention(dtype, kv_heads, window):
    tensors, lengths = states(4, kv_heads, 40, dtype=dtype), PACKS["many"]
    own, wanted = (run(both(how), tensors, lengths, window) for how in (ours, masked))
    exact = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(own, wanted):
        torch.testing.assert_close(one, other, rtol=exact, atol=exact)


@pytest.mark.parametrize("peaked", [1, 20], ids=["even scores", "peaked scores"])
@pytest.mark.parametrize("off", [0, 4], ids=["centred values", "values off centre"])
@pytest.mark.parametrize("window", [None, 3])
def test_in_16_bits_it_is_as_accurate_as_pytorchs_own(window, off, peaked):
    query, key, value = (tensor.detach() for tensor in states(4, 2, 40, dtype=torch.bfloat16))
    tensors = [tensor.requires_grad_() for tensor in (query * peaked, key, value + off)]
    exact = run(
        masked,
        [tensor.detach().float().requires_grad_() for tensor in tensors],
        PACKS["many"],
        window,
    )
    own, plain = (
        run(ours, tensors, PACKS["many"], window),
        run(masked, tensors, PACKS["many"], window),
    )
    for one, other, wanted, name in zip(own, plain, exact, ("out", "query", "key", "value")):
        error, usual = ((each.float() - wanted).square().mean().sqrt() for each in (one, other))
        assert error <= (1.0 if name in ("query", "key") else 1.3) * usual, (name, error, usual)


def test_values_of_another_width_than_keys_use_the_fallback():
    """As in latent attention, where keys carry positions besides."""
    tensors = states(4, 4, 40, value_width=8)
    for own, wanted in zip(
        run(ours, tensors, PACKS["many"], None), run(masked, tensors, PACKS["many"], None)
    ):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
def test_the_operator_passes_pytorchs_operator_check():
    """Run PyTorch's own operator check: shapes without values, gradients, no hidden mutation."""
    query, key, value = (
        tensor.detach().transpose(1, 2).requires_grad_() for tensor in states(4, 2, 40)
    )
    for causal in (True, False):
        arguments = (query, key, value, bounds_of(PACKS["many"]), 0.25, 0, causal)
        checks = torch.library.opcheck(varlen_cpu.one_by_one, arguments)
        assert set(checks.values()) == {"SUCCESS"}


def varlen_reference(
    query, key, value, bounds_q, bounds_k, longest_q, longest_k, *, scale, window_size, **grouped
):
    """Stand in for PyTorch's CUDA kernel: query [T, H, D], key and value [T, KV, D]."""
    assert query.shape[-1] % 8 == 0, "the kernel takes heads of multiples of 8"
    assert torch.equal(bounds_q, bounds_k)
    lengths = bounds_q.diff().tolist()
    assert longest_q == longest_k == max(lengths)
    window = window_size[0] + 1 if window_size[0] >= 0 else None
    assert window_size[1] in (0, window_size[0])
    states = [
        each.transpose(0, 1)[None] for each in (query * scale * query.shape[-1] ** 0.5, key, value)
    ]
    return masked(*states, lengths, window, causal=window_size[1] == 0)[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("width", [16, 20, 100])
def test_heads_of_any_width_fit_the_fused_kernel(monkeypatch, width, window, causal):
    """Heads of 100, as in OpenLLaMA-3B, are padded to 104; the scale must still be that of 100."""
    monkeypatch.setattr(varlen_gpu.torch_versions, "varlen_attn", varlen_reference)
    lengths = PACKS["many"]

    def fused(query, key, value):
        return attention._varlen(
            query, key, value, bounds_of(lengths), max(lengths), None, width**-0.5, window, causal
        )

    tensors = states(4, 2, sum(lengths), width=width, value_width=width)
    right = run(functools.partial(masked, causal=causal), tensors, lengths, window)
    for own, wanted in zip(run(fused, tensors), right):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_asking_for_gpu_features_causes_no_graph_break(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def layer(states):
        return states + 1 if attention._has_flash_kernels(torch.device("cuda:0")) else states

    assert layer(torch.zeros(1)).item() == 1


def test_the_fallback_reads_no_bounds_from_the_device():
    """Bounds on the meta device have no values; reading them on a GPU would wait in every layer."""
    lengths = PACKS["many"]
    query, key, value = (
        tensor.detach().transpose(1, 2) for tensor in states(4, 2, sum(lengths), value_width=8)
    )
    unknown = bounds_of(lengths).to("meta")
    out = attention._attend(
        query, key, value, unknown, max(lengths), SimpleNamespace(values=lengths), None, 0.0, None
    )
    torch.testing.assert_close(out, masked(query, key, value, lengths, None))


def test_transformers_builds_no_mask_and_detects_no_packs(monkeypatch):
    """Looking for them waits for the GPU once a pass."""
    from conftest import TINY_LLAMA
    from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

    looked = []
    find = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(
        masking_utils,
        "find_packed_sequence_indices",
        lambda *given: looked.append(given) or find(*given),
    )
    values = TINY_LLAMA | {"vocab_size": 300}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_choice.DOCUMENTS)
    model(**attention_probe.inputs_of(torch.ones(1, 8, dtype=torch.long), [3, 5], model))
    assert not looked


@pytest.mark.parametrize(
    ("moved", "has_experts", "wanted"),
    [([], False, False), ([4], False, True), ([4], True, False), ([2, 3, 4], True, True)],
    ids=[
        "equal",
        "one token of a dense model",
        "one token that met another expert",
        "a leak into three tokens",
    ],
)
def test_one_flipped_expert_passes_the_attention_check(moved, has_experts, wanted):
    logits = torch.linspace(-1, 1, 8 * 30).view(8, 30)
    other = logits + 1e-4
    other[moved] += 0.5
    assert attention_probe.logits_differ(logits, other, 5e-2, has_experts) == wanted
    assert attention_probe.logits_differ(logits, logits * float("nan"), 5e-2, has_experts)


@pytest.mark.parametrize("sees", [0, 1], ids=["itself", "the next token"])
def test_a_mixture_of_experts_that_sees_one_token_ahead_is_refused(sees):
    """Like a flipped expert it moves only one token of the probe, but the same one each time."""
    from conftest import TINY_LLAMA
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.errors import ModelError

    sizes = {
        **TINY_LLAMA,
        "model_type": "mixtral",
        "vocab_size": 300,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**sizes), attn_implementation=attention_choice.DOCUMENTS
    )
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + out.roll(-sees, dims=1))
    with (
        pytest.raises(ModelError, match="see those after it") if sees else contextlib.nullcontext()
    ):
        attention_probe.check(model, model, attention_choice.DOCUMENTS, torch.device("cpu"), "fp32")


def test_the_fallback_compiles_once_for_any_number_of_documents():
    """After eight of them PyTorch would give up, and leave the layers uncompiled."""
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=count)
    def layer(query, key, value, lengths):
        return attention._one_by_one(query * 1, key, value, lengths, 0.25, 0.0, 0) + 1

    for number in range(1, 13):
        tensors = (tensor.detach().transpose(1, 2) for tensor in states(2, 2, 40))
        lengths = [40 - number + 1] + [1] * (number - 1)
        layer(*tensors, SimpleNamespace(values=lengths))
    assert len(graphs) <= 2, "what comes before the documents, and what after"
