"""Layers compile once for all layers and packs, and give the numbers of uncompiled ones."""

import pytest
import torch
from conftest import short, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune.errors import ModelError
from finetune.models import attention, attention_probe, head, lora_products, offload, recompute


def build(**changes):
    torch.manual_seed(0)
    config = tiny_llama(num_hidden_layers=3, vocab_size=300, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.DOCUMENTS)
    head.install(model)
    return model


def nll(model, labels, inputs):
    question = head.Question(labels.flatten(), torch.arange(labels.numel()), frozenset({"nll"}))
    return model(**inputs, question=question)["nll"]


def losses_and_gradients(model, packs):
    found = []
    for lengths in packs:
        ids = torch.randint(
            300, (1, sum(lengths)), generator=torch.Generator().manual_seed(len(lengths))
        )
        loss = nll(model, ids.roll(-1), attention_probe.inputs_of(ids, lengths, model))
        model.zero_grad()
        loss.backward()
        found.append(
            (loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()})
        )
    return found


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.parametrize("recomputed", short([0, 3], 3))
@pytest.mark.slow
def test_one_compilation_serves_all_layers_and_every_pack(monkeypatch, recomputed):
    """Otherwise each new length of a pack would compile for minutes."""
    packs = [[9], [3, 17, 1, 9], [5, 5], [2] * 12, [31, 2, 7], [2]]
    wanted = losses_and_gradients(build(), packs)
    model, counted = build(), []

    def count(graph, inputs):
        counted.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    compile_ = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda forward, **options: compile_(forward, backend=count, fullgraph=True, **options),
    )
    torch._dynamo.reset()
    recompute.wrap(model, compiled=True, num_recomputed=recomputed)
    found = losses_and_gradients(model, packs)
    with torch.no_grad():  # evaluations take the layers as they are
        model.eval()
        ids = torch.ones(1, 8, dtype=torch.long)
        assert nll(model, ids, attention_probe.inputs_of(ids, [8], model)) > 0
    assert len(counted) == 1
    for (loss, grads), (wanted_loss, wanted_grads) in zip(found, wanted):
        torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-5)
        for name, grad in wanted_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.slow
def test_layers_with_adapters_share_a_compilation(monkeypatch):
    """One for the first layer, whose input has no gradient, and one for all others.

    After eight the compiler gives up, and further layers run uncompiled.
    """
    base, counted, compile_ = build(), [], torch.compile
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    lora_products.install(model)

    def count(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda forward, **options: compile_(forward, backend=count, **options)
    )
    torch._dynamo.reset()
    recompute.wrap(base, compiled=True, num_recomputed=0)
    ids = torch.ones(1, 8, dtype=torch.long)
    for lengths in ([8], [3, 5]):
        nll(model, ids, attention_probe.inputs_of(ids, lengths, base)).backward()
    assert len(counted) == 2


def test_recomputed_layers_keep_their_inputs_only():
    """All of three, or one; and what they give is the same, to the bit."""
    recomputing = {count: build() for count in (0, 1, 3)}
    packs = [[9], [3, 17, 1, 9]]
    wanted = losses_and_gradients(recomputing[0], packs)
    for count in (1, 3):
        recompute.wrap(recomputing[count], compiled=False, num_recomputed=count)
        for (loss, grads), (wanted_loss, wanted_grads) in zip(
            losses_and_gradients(recomputing[count], packs), wanted
        ):
            assert torch.equal(loss, wanted_loss)
            assert all(torch.equal(grads[name], grad) for name, grad in wanted_grads.items())

    def kept(model):
        sizes = []
        ids = torch.zeros(1, 64, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()), lambda _: None
        ):
            nll(model, ids, attention_probe.inputs_of(ids, [64], model))
        return sum(sizes)

    none, one, all_ = (kept(model) for model in recomputing.values())
    assert all_ < none / 3
    assert none - one == pytest.approx((none - all_) / 3, rel=0.01)


def test_the_requested_number_of_layers_is_recomputed():
    model = build()
    assert [recompute.chosen(model, wanted) for wanted in (False, True, 1, 3)] == [0, 3, 1, 3]
    with pytest.raises(
        ModelError,
        match="gradient_checkpointing: 4, but LlamaForCausalLM has 3 layers; true recomputes all",
    ):
        recompute.chosen(model, 4)


def test_a_model_whose_layers_are_unknown_is_an_error():
    with pytest.raises(ModelError, match="does not say what the layers of Sequential are"):
        recompute.chosen(torch.nn.Sequential(torch.nn.Linear(2, 2)), True)


def test_without_a_compiler_there_is_an_error_before_the_first_step(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ModelError,
        match="train.compile: needs a C\\+\\+ compiler, and no-such-compiler was not found",
    ):
        recompute.wrap(build(), compiled=True, num_recomputed=0)


def count_copies(monkeypatch):
    """Move inputs on a CPU, too; return the list of (what, layer) in which copies begin."""
    events, numbers = [], {}
    copy, init = offload._Input._copy, offload._Input.__init__

    def made(self, *arguments):
        numbers[id(self)] = len(numbers)
        init(self, *arguments)

    def copying(self, target, source):
        events.append(("out" if target is self._host else "back", numbers[id(self)]))
        copy(self, target, source)

    monkeypatch.setattr(offload.Offload, "is_moved", lambda self, t: t.grad_fn is not None)
    monkeypatch.setattr(offload._Input, "_copy", copying)
    monkeypatch.setattr(offload._Input, "__init__", made)
    return events


@pytest.mark.parametrize("count", [3, 2])
def test_inputs_that_wait_in_host_memory_change_no_bit(monkeypatch, count):
    """The newest input stays; each other is fetched while the layer after it is recomputed."""
    events = count_copies(monkeypatch)
    packs = [[9], [3, 17, 1, 9]]
    wanted = losses_and_gradients(build(), packs)
    moving = build()
    recompute.wrap(moving, compiled=False, num_recomputed=count, offloads=True)
    for (loss, grads), (wanted_loss, wanted_grads) in zip(
        losses_and_gradients(moving, packs), wanted
    ):
        assert torch.equal(loss, wanted_loss)
        assert all(torch.equal(grads[name], grad) for name, grad in wanted_grads.items())
    out = [("out", number) for number in range(count)]
    back = [("back", number) for number in reversed(range(count - 1))]
    assert events[: 2 * count - 1] == out + back


def test_passes_that_overlap_get_their_own_inputs_back(monkeypatch):
    """Two forward passes before either goes backward, as a loss over two answers may."""
    count_copies(monkeypatch)

    def gradients(model):
        ids = torch.arange(12)[None]
        inputs = [attention_probe.inputs_of(ids + shift, [12], model) for shift in (0, 100)]
        first, second = (nll(model, ids, each) for each in inputs)
        (first * second).backward()
        return [p.grad.clone() for p in model.parameters()]

    moving = build()
    recompute.wrap(moving, compiled=False, num_recomputed=3, offloads=True)
    for own, wanted in zip(gradients(moving), gradients(build()), strict=True):
        assert torch.equal(own, wanted)


def test_nothing_moves_on_a_cpu():
    moving = build()
    offloading = recompute.wrap(moving, compiled=False, num_recomputed=3, offloads=True)
    losses_and_gradients(moving, [[9]])
    assert offloading.host_bytes == 0
