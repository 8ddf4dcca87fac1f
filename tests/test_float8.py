"""train.float8: which products run in float8, when, and what stands against it."""

import copy
from importlib import metadata

import pytest
import torch
from conftest import losses, pretrained, tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from finetune import config as configs
from finetune import loop
from finetune.engine import gpu
from finetune.errors import ConfigError, ModelError
from finetune.models import float8, recompute

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"adapter": {"kind": "qlora"}}, "4 or 8 bits already; use adapter.kind: lora"),
        ({"train": {"compile": False}}, "only compiled layers are faster"),
        ({"train": {"precision": "fp16"}}, "all else runs in bf16, and train.precision is fp16"),
        ({"train": {"precision": "fp32"}}, "all else runs in bf16, and train.precision is fp32"),
    ],
    ids=["qlora", "uncompiled", "fp16", "fp32"],
)
def test_settings_that_exclude_float8_are_errors(settings, why):
    model = {"path": "somewhere/model"}
    values = {"run": {"name": "a"}, "model": model, "data": {"train": "rows.jsonl"}, **settings}
    values["train"] = {**settings.get("train", {}), "float8": True}
    with pytest.raises(ConfigError, match=f"train.float8: .*{why}"):
        configs.from_dict(values)


def test_a_cpu_has_no_float8(workshop):
    with pytest.raises(ConfigError, match=r"train\.float8: needs a GPU of compute capability 8\.9"):
        workshop.train(train__float8=True)


@pytest.mark.parametrize(
    ("capability", "version", "why"),
    [
        ((8, 6), "0.18.0", "and NVIDIA A10 has 8.6; remove it"),
        ((8, 9), None, r"it is not installed; pip install 'finetune\[float8\]'"),
        ((9, 0), "0.9.0", "torchao, 0.18 or newer, and 0.9.0 is installed; pip install"),
        ((8, 9), "0.18.0", None),
        ((12, 0), "1.0.0+cu130", None),
    ],
)
def test_an_old_gpu_or_package_is_an_error(monkeypatch, capability, version, why):
    def installed(name):
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    monkeypatch.setattr(metadata, "version", installed)
    if why is None:
        float8.require(GPU)
    else:
        with pytest.raises(ConfigError, match=why):
            float8.require(GPU)


@pytest.mark.parametrize(
    ("inputs", "outputs", "is_worth_it"),
    [
        (4096, 14336, True),
        (4096, 4096, True),
        (2048, 2048, True),
        (4096, 1024, False),  # keys and values of Llama-3.1-8B
        (4096, 16, False),  # of an adapter
        (8192, 4100, False),  # no multiple of 16
    ],
)
def test_only_large_products_are_worth_it(inputs, outputs, is_worth_it):
    layer = nn.Linear(inputs, outputs, device="meta")
    assert float8.is_worth_it(layer) is is_worth_it
    assert not float8.is_worth_it(
        type("Linear4bit", (nn.Linear,), {})(inputs, outputs, device="meta")
    )


def test_float8_compiles_a_short_run_too():
    values = {
        "run": {"name": "a"}, "model": {"path": "somewhere/model"},
        "data": {"train": "rows.jsonl"}, "train": {"float8": "rowwise"},
    }  # fmt: skip
    topology = type("Topology", (), {"device": GPU})
    config, line = gpu.with_compilation(configs.from_dict(values), topology, 1, 1.0)
    assert config.train.compile is True
    assert line == "train.compile: auto compiles the layers, as train.float8 needs it"


KINDS = [
    "tensorwise",
    pytest.param(
        "rowwise",
        marks=pytest.mark.skipif(
            torch.__version__.startswith("2.11."), reason="torch 2.11 has it on no CPU"
        ),
    ),
]


@pytest.fixture
def torchao(monkeypatch):
    """Skip without torchao; let every product be large enough. A CPU has a slow product of it."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(float8, "WORTH", 8)


def llama(adapters=False):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=48))
    if adapters:
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    return model


def loss_of(model, tokens=21):
    ids = torch.arange(2 * tokens).reshape(2, tokens) % 48
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_training_passes_multiply_in_float8(torchao, adapters, kind):
    """Weights, their names and every evaluation stay; losses and gradients differ by a little."""
    plain = llama(adapters)
    model = copy.deepcopy(plain)
    float8.convert(model, kind)
    found = list(float8.converted(model))
    assert len(found) == 14
    assert model.get_output_embeddings() not in found
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in plain.named_parameters()
    }
    for each in (plain, model):
        each.eval()
    with torch.no_grad():
        assert torch.equal(loss_of(model.train()), loss_of(plain.train())), "without gradients"
    assert torch.equal(loss_of(model.eval()), loss_of(plain.eval()))
    own, right = loss_of(model.train()), loss_of(plain.train())
    assert 0 < abs(own / right - 1) < 0.02
    own.backward()
    right.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert (p.grad - q.grad).norm() < 0.3 * q.grad.norm() + 1e-6, name


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # the compiler's own
@pytest.mark.proof
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "adapters"])
def test_compiled_layers_hold_float8_in_one_graph(torchao, monkeypatch, adapters):
    """A frozen weight costs two products, not three: its gradient is never computed. The sizes and
    strides of all are those that a GPU takes, for any number of tokens.
    """
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    products, compile_ = {"forward": [], "backward": []}, torch.compile

    def counting(name):
        def count(graph, inputs):
            nodes = [node for node in graph.graph.nodes if "mm" in str(node.target)]
            products[name].append(len(nodes))
            return make_boxed_func(graph.forward)

        return count

    backend = aot_autograd(fw_compiler=counting("forward"), bw_compiler=counting("backward"))
    monkeypatch.setattr(
        torch,
        "compile",
        lambda forward, **options: compile_(forward, backend=backend, fullgraph=True, **options),
    )
    monkeypatch.setattr(torch._meta_registrations, "device_hint", lambda tensor: "cuda")
    torch._dynamo.reset()
    model, eager = llama(adapters), llama(adapters)
    for each in (model, eager):
        float8.convert(each, True)
        each.train()
    recompute.wrap(model, compiled=True, num_recomputed=0)
    for tokens in (21, 16, 37):
        torch.testing.assert_close(loss_of(model, tokens), loss_of(eager, tokens))
        loss_of(model, tokens).backward()
    # Seven products a layer, and attention's own in `sdpa`; adapters have two each, and four
    # backward. Nothing wants the gradient of what goes into the first layer under adapters.
    assert set(products["forward"]) == {21 if adapters else 7}
    assert max(products["backward"]) == (7 + 28 if adapters else 14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_a_product_is_as_exact_as_float8_is(torchao, monkeypatch, kind, trains):
    """3.7 % of the output by root mean square, up to 5.9 % of the gradients."""
    from torchao.float8 import Float8LinearConfig

    config = Float8LinearConfig.from_recipe_name(kind)
    assert float8.wrong(config, 64, 96, trains, CPU) == ""
    monkeypatch.setattr(float8, "WITHIN", 0.03)
    assert "its output is 3." in float8.wrong(config, 64, 96, trains, CPU)


def test_a_product_that_fails_or_is_wrong_ends_the_run(torchao, monkeypatch):
    model = llama()
    float8.convert(model, True)
    assert float8.check(model, CPU) == (
        "14 of 14 products in the layers run in float8, with a scale for each tensor"
    )
    monkeypatch.setattr(float8, "wrong", lambda *_: "RuntimeError: no cuBLAS")
    with pytest.raises(ModelError, match="train.float8: cannot be used here: RuntimeError: no cu"):
        float8.check(model, CPU)


@pytest.mark.proof
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_run_saves_resumes_averages_and_exports_plain_weights(
    torchao, workshop, monkeypatch, method
):
    """The export's probe multiplies as those who use the export will, and must agree with it."""
    settings = {"train__precision": "bf16", "train__ema_decay": 0.5, "data__packing": True}
    if method == "lora":
        base = workshop.train("base", model__dtype="bfloat16", train__precision="bf16") / "model"
        settings = pretrained(base, adapter__kind="lora", adapter__r=4, **settings)
    convert, converted = float8.convert, []

    def counted(model, kind):
        convert(model, kind)
        converted.append(len(list(float8.converted(model))))

    monkeypatch.setattr(float8, "require", lambda device: None)
    monkeypatch.setattr(float8, "convert", counted)
    settings |= {"train__float8": True, "checkpoint__every_steps": 2, "checkpoint__keep_last": 9}
    whole = workshop.train("whole", **settings)
    assert converted == [14]
    cut = workshop.train("cut", **settings)
    for path in (cut / "checkpoints").glob("step-*"):
        if path.name > "step-00000002":
            path.rename(workshop.folder / path.name)
    (cut / "outcome.json").unlink()
    assert losses(workshop.train("cut", **settings)) == losses(whole)
    plain = workshop.train("plain", **{**settings, "train__float8": False})
    assert losses(whole) != losses(plain)
    assert losses(whole) == pytest.approx(losses(plain), rel=2e-2)


def test_a_model_of_small_products_is_an_error_before_its_weights_are_read(workshop, monkeypatch):
    monkeypatch.setattr(float8, "require", lambda device: None)
    monkeypatch.setattr(loop, "build", None)
    with pytest.raises(ModelError, match="train.float8: .* no product that is large enough"):
        workshop.train(train__float8=True)
