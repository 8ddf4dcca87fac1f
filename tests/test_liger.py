"""Liger's kernels stand for norms and gates of a model's own modules, and only for right ones."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import tiny_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.configuration_gemma import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.configuration_phi3 import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from finetune import kernels
from finetune.models import liger, recompute
from finetune.models.liger import Gate, Norm

CPU = torch.device("cpu")
FLOAT = (torch.float32,)
PARTS = [
    Norm(24, 1e-6, 0.0, rounds_first=True),
    Norm(24, 1e-6, 0.0, rounds_first=False),
    Norm(24, 1e-6, 1.0, rounds_first=False),
    Gate(40, "SwiGLU"),
    Gate(40, "GeGLU"),
    Gate(40, "SwiGLU", ("gate_up_proj",)),
]


@pytest.mark.parametrize(
    ("norm", "offset", "rounds_first"),
    [
        (LlamaRMSNorm(24, 1e-5), 0.0, True),
        (Olmo2RMSNorm(24, 1e-5), 0.0, False),
        (GemmaRMSNorm(24, 1e-5), 1.0, False),
    ],
    ids=["Llama", "OLMo 2", "Gemma"],
)
def test_a_norm_is_known_by_what_it_computes(norm, offset, rounds_first):
    assert liger.norm_of(norm) == Norm(24, 1e-5, offset, rounds_first)


class Centred(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OtherEpsilon(LlamaRMSNorm):
    def forward(self, hidden_states):
        rms = (hidden_states.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        return self.weight * hidden_states / rms


class Gated(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(24, bias=False), nn.LayerNorm(24), Centred(24), OtherEpsilon(24), Gated(24)],
    ids=lambda norm: type(norm).__name__,
)
def test_other_norms_stay_as_they_are(norm):
    assert liger.norm_of(norm) is None


def mlp(activation="silu", kind=LlamaMLP):
    settings = {"hidden_size": 32, "intermediate_size": 64, "hidden_act": activation}
    configs = {GemmaMLP: GemmaConfig, Phi3MLP: Phi3Config}
    return kind(configs.get(kind, tiny_llama)(**settings))


class Scaled(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 0.9)


class Summed(LlamaMLP):
    def forward(self, x):
        return super().forward(x) + x


SEPARATE, JOINT = ("gate_proj", "up_proj"), ("gate_up_proj",)


@pytest.mark.parametrize(
    ("module", "gate"),
    [
        (mlp(), Gate(64, "SwiGLU", SEPARATE)),
        (mlp("gelu_pytorch_tanh", GemmaMLP), Gate(64, "GeGLU", SEPARATE)),
        (mlp(kind=Phi3MLP), Gate(64, "SwiGLU", JOINT)),
        (mlp("gelu_pytorch_tanh", kind=Phi3MLP), None),
        (mlp("gelu"), None),
        (mlp(kind=Scaled), None),
        (mlp(kind=Summed), None),
        (nn.Linear(4, 4), None),
    ],
    ids=[
        "Llama", "Gemma", "Phi-3", "Phi-3 with gelu", "exact gelu", "scaled", "summed", "no MLP",
    ],
)  # fmt: skip
def test_a_gate_is_known_by_what_it_computes(module, gate):
    assert liger.gate_of(module) == gate


@pytest.fixture
def fused(monkeypatch):
    """Let PyTorch's operations be the kernels; count their calls."""
    calls = []
    monkeypatch.setattr(liger, "has_package", lambda name: True)
    for kind in (Norm, Gate):

        def counted(part, *given):
            calls.append(part.title)
            return part.plain(*given)

        monkeypatch.setattr(kind, "fused", counted)
    return calls


def install(model, **options):
    how = {"on_main": lambda work: work(), "device": CPU, "dtypes": FLOAT}
    return list(liger.install(model, **how | options))


def llama(seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_llama(vocab_size=50))


def gradients(model, ids=None):
    ids = torch.arange(20).reshape(2, 10) if ids is None else ids
    model.train()
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained = ((name, p.grad) for name, p in model.named_parameters() if p.requires_grad)
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in trained}}


@pytest.mark.parametrize("method", ["full", "adapters", "recomputed"])
def test_only_the_modules_of_one_model_change_and_it_computes_the_same(fused, method):
    model, other = llama(), llama()
    if method == "adapters":
        config = LoraConfig(target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, config)
    wanted = gradients(copy.deepcopy(model))
    if method == "recomputed":
        recompute.wrap(model, compiled=False, num_recomputed=2)
    assert install(model) == ["SwiGLU (2) and RMSNorm (5) run by Liger's kernels"]
    assert install(model) == [], "what something else has replaced is left alone"
    fused.clear()
    found = gradients(model)
    # The last norm is in no layer: recomputation runs it once.
    norms, gates = (9, 4) if method == "recomputed" else (5, 2)
    assert (fused.count("RMSNorm"), fused.count("SwiGLU")) == (norms, gates)
    assert found.keys() == wanted.keys()
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-6, atol=1e-7)
    fused.clear()
    gradients(other)
    assert not fused
    assert type(other.model.norm).forward is LlamaRMSNorm.forward


def test_compiled_layers_keep_what_the_compiler_fuses(fused):
    model = llama()
    assert install(model, compiled=recompute.layers(model)) == [
        "RMSNorm (1) run by Liger's kernels"
    ]
    assert "forward" not in vars(model.model.layers[0].input_layernorm)


@pytest.mark.parametrize(
    ("states", "weight", "takes"),
    [
        (torch.float32, torch.float32, True),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float32, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
    ],
)
def test_a_norm_whose_result_is_wider_than_its_input_stays_pytorchs(states, weight, takes):
    """Of a trained norm under adapters, or Qwen's norms of queries: a kernel would round it."""
    given = torch.randn(2, 24, dtype=states), torch.randn(24, dtype=weight)
    assert PARTS[0].takes(*given) is takes
    assert PARTS[2].takes(*given), "Gemma rounds to the dtype of the input itself"
    assert not PARTS[0].takes(given[0][:0], given[1]), "a kernel of no rows cannot be launched"


@dataclass(frozen=True)
class Doubled(Gate):
    what: str = "output"

    def fused(self, *given):
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, gate, up):
                ctx.save_for_backward(gate, up)
                out = self.plain(gate, up)
                return 2 * out if what == "output" else out.half() if what == "dtype" else out

            @staticmethod
            def backward(ctx, grad):
                with torch.enable_grad():
                    both = [each.detach().requires_grad_() for each in ctx.saved_tensors]
                    one, two = torch.autograd.grad(self.plain(*both), both, grad)
                return 2 * one if what == "first" else one, 2 * two if what == "second" else two

        what = self.what
        if what == "error":
            raise RuntimeError("out of registers\nand more")
        return Wrong.apply(*given)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("output", "in float32 its output is 1.0e+00 away from float32's"),
        ("first", "in float32 its gradient of its first input is 1.0e+00 away from float32's"),
        ("second", "in float32 its gradient of its second input is 1.0e+00 away from float32's"),
        ("dtype", "in float32 its output is"),
        ("error", "RuntimeError: out of registers"),
        ("nothing", ""),
    ],
)
def test_a_kernel_with_another_result_is_refused(what, why):
    found = liger.wrong(Doubled(40, "SwiGLU", what=what), CPU, FLOAT)
    assert found.startswith(why)
    assert bool(found) == bool(why)


@dataclass(frozen=True)
class WrongForMany(Norm):
    def fused(self, states, weight):
        return self.plain(states, weight) * (2 if len(states) > 32_768 else 1)


def test_a_small_norm_is_checked_with_many_rows_too(monkeypatch):
    """There Liger runs another kernel, as for the heads of Qwen 3."""
    monkeypatch.setattr(liger, "has_package", lambda name: True)
    of_heads, of_states = (WrongForMany(size, 1e-6, 0.0, rounds_first=True) for size in (64, 512))
    assert liger.problem(of_heads, CPU, FLOAT).startswith("in float32 its output is 1.0e+00")
    assert liger.problem(of_states, CPU, FLOAT) == ""


def test_what_is_not_used_is_one_line_that_says_why(fused, monkeypatch):
    monkeypatch.setenv(kernels.WITHOUT, "adapter_casts,rms_norm")
    assert install(llama()) == [
        "SwiGLU (2) run by Liger's kernels",
        "note: RMSNorm by several kernels for one, because FINETUNE_WITHOUT_KERNELS names rms_norm",
    ]
    monkeypatch.delenv(kernels.WITHOUT)
    monkeypatch.setattr(liger, "has_package", lambda name: False)
    assert install(llama()) == [
        "note: SwiGLU and RMSNorm by several kernels for one, because liger-kernel is not "
        "installed (pip install 'finetune[kernels]')"
    ]


@pytest.fixture
def ligers_own(interpreted, monkeypatch):
    """Let Triton's interpreter run Liger's kernels: they call functions of CUDA, and casts of
    numbers, which it passes as Python's.
    """
    pytest.importorskip("liger_kernel")
    # The interpreter of 3.6 cannot loop to a computed end with today's NumPy.
    pytest.importorskip("triton", minversion="3.7")
    import triton.language as tl
    from triton.runtime import interpreter

    class Number(float):
        def to(self, dtype):
            return self

    usual = interpreter._implicit_cvt
    monkeypatch.setattr(
        interpreter,
        "_implicit_cvt",
        lambda value: Number(value) if type(value) is float else usual(value),
    )
    norm = interpreted("liger_kernel.ops.rms_norm")
    monkeypatch.setattr(norm, "rsqrt", lambda x: tl.rsqrt(x))
    gate = interpreted("liger_kernel.ops.geglu")
    monkeypatch.setattr(
        gate, "tanh", lambda x: 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * x, 80.0)) + 1.0)
    )


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.title} {part.__dict__}")
def test_ligers_kernels_equal_pytorchs_operations(ligers_own, monkeypatch, part):
    """In float32 to 1e-6; float16 stands for bfloat16, which the interpreter cannot compute."""
    monkeypatch.setattr(liger, "WITHIN", 1e-6)
    assert liger.wrong(part, CPU, (torch.float32, torch.float16), rows=5) == ""
