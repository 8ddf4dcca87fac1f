"""The loss without all logits is the loss with them: the same number, the same gradients, for every way to make logits."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.data.batches import IGNORE
from finetune.models import attention, cross_entropy, head

VOCAB = 1009
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},  # a bias at the head
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 64},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "mixtral": {"num_local_experts": 2},
}  # fmt: skip
FINISHES = {
    "gemma2": head.Finish(1.0, 3.0), "cohere": head.Finish(0.25), "granite": head.Finish(0.25),
    "hyperclovax": head.Finish(4.0), "falcon_h1": head.Finish(0.3),
}  # fmt: skip


def make(name, **more):
    torch.manual_seed(0)
    kind = name.split(",")[0]
    config = AutoConfig.for_model(kind, **SIZES | MODELS[name] | more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) / 10)
    return model.eval()


@pytest.fixture
def chunks_of_a_few(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 4 * VOCAB)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 3 * 4 * VOCAB)


def batch(num_tokens=40, every=2):
    """(inputs, targets, learned): two sequences, and something is learned every few tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, num_tokens), generator=generator)
    targets = torch.randint(3, VOCAB, (2, num_tokens), generator=generator)
    targets[:, torch.arange(num_tokens) % every > 0] = IGNORE
    return {"input_ids": ids, "use_cache": False}, targets, (targets.flatten() >= 0).nonzero().flatten()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learned_alike(model, smoothing=0.0, tolerance=1e-5):
    """Names of the weights whose gradients are the same with chunks and without; all that have one must be."""
    inputs, targets, learned = batch()
    logits = model(**inputs).logits.flatten(0, 1)[learned].float()
    loss = F.cross_entropy(logits, targets.flatten()[learned], reduction="sum", label_smoothing=smoothing)
    plain = gradients(model, loss)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert head.install(base) is None
    fused = head.loss_sum(model, inputs, targets, learned, smoothing)
    assert fused.dtype == torch.float32
    assert fused.item() == pytest.approx(loss.item(), rel=tolerance)
    found = gradients(model, fused)
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        assert (found[name] - grad).abs().max() <= tolerance * max(1.0, grad.abs().max()), name
    assert torch.equal(model(**inputs).logits.flatten(0, 1)[learned].float(), logits), "without targets it is as it was"
    return set(found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_all_logits(chunks_of_a_few, name, smoothing):
    model = make(name)
    assert head.probe(model) == (FINISHES.get(name, head.Finish()), None)
    assert learned_alike(model, smoothing) >= {
        name for name, _ in model.named_parameters() if "embed_positions" not in name and "expert" not in name
    }


@pytest.mark.parametrize("kernel", ["documents", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_followed_under_every_attention_and_without_weights(name, kernel):
    config = AutoConfig.for_model(name.split(",")[0], **SIZES | MODELS[name])
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    if kernel == "documents" and attention.choose("auto", kind, config, torch.device("cpu"), "fp32") != kernel:
        kernel = "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    assert head.probe(model) == (FINISHES.get(name, head.Finish()), None)


ADAPTERS = {
    "on the layers": {"target_modules": "all-linear"},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on the head, dropout and DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters_on_the_head_learn_the_same(chunks_of_a_few, how, tied):
    settings = ADAPTERS[how] | (
        {"ensure_weight_tying": True} if tied and how in ("head trained whole", "new tokens") else {}
    )
    model = get_peft_model(
        make("llama", tie_word_embeddings=tied), LoraConfig(r=4, init_lora_weights=False, **settings)
    )
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned_alike(model.eval()) == trains


def test_a_forward_that_cannot_be_followed_keeps_all_logits_and_says_so():
    model = make("llama")
    forward = model.forward

    def unusual(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        out.logits = out.logits.sin()
        return out

    model.forward = unusual
    assert "more than scale or cap" in head.install(model)
    inputs, targets, learned = batch()
    logits = model(**inputs).logits.flatten(0, 1)[learned]
    wanted = F.cross_entropy(logits, targets.flatten()[learned], reduction="sum")
    assert torch.equal(head.loss_sum(model, inputs, targets, learned), wanted)


def test_where_nothing_is_learned_every_weight_still_gets_a_gradient_of_zero():
    model = make("llama")
    head.install(model)
    inputs, targets, learned = batch()
    loss = head.loss_sum(model, inputs, torch.full_like(targets, IGNORE), learned[:0])
    found = gradients(model, loss)
    assert loss.item() == 0
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert not any(grad.any() for grad in found.values())


class Largest(TorchDispatchMode):
    """Remembers the most numbers that any new tensor held."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("how", ["all weights", "on the head", "evaluation"])
def test_no_tensor_ever_holds_all_logits(chunks_of_a_few, how):
    model = make("llama")
    if how == "on the head":
        model = get_peft_model(model, LoraConfig(r=4, **ADAPTERS[how]))
    head.install(model.get_base_model() if how == "on the head" else model)
    inputs, targets, learned = batch(num_tokens=60, every=1)
    with Largest() as largest, torch.set_grad_enabled(how != "evaluation"):
        loss = head.loss_sum(model, inputs, targets, learned)
        if how != "evaluation":
            loss.backward()
    # The gradient of the projection is the largest of all, 1009 x 32; without one it is the scores of 2 heads in 2 rows.
    assert largest.numbers == (VOCAB * 32 if how == "all weights" else 2 * 2 * 60 * 60), "logits would be 120 x 1009"


def test_in_16_bits_the_loss_is_summed_in_32(chunks_of_a_few):
    """bf16 has 8 bits: a sum of a thousand would be off by 4. Each logit has them, their sum must not."""
    model = make("llama").bfloat16()
    inputs, targets, learned = batch()
    logits = model(**inputs).logits.flatten(0, 1)[learned]
    wanted = F.cross_entropy(logits.double(), targets.flatten()[learned], reduction="sum")
    head.install(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert head.loss_sum(model, inputs, targets, learned).item() == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [False, True])
def test_the_start_of_a_run_proves_the_loss_or_falls_back(monkeypatch, wrong):
    model = make("llama")
    if wrong:
        monkeypatch.setattr(head, "probe", lambda base: (head.Finish(1.0, 2.0), None))
    head.install(model)
    said = head.check(model, model, torch.device("cpu"), "fp32")
    assert bool(said) == wrong
    assert model.holds_all_logits == wrong
    inputs, targets, learned = batch()
    logits = model(**inputs).logits.flatten(0, 1)[learned]
    wanted = F.cross_entropy(logits, targets.flatten()[learned], reduction="sum")
    assert head.loss_sum(model, inputs, targets, learned).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_in_float16_the_gradient_of_the_head_is_summed_in_float32():
    """A thousand tokens of 100 each: a sum of about 98,000, where float16 ends at 65,504. No loss scale reaches it."""
    linear = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.full((1000, 8), 100.0)
    targets = torch.zeros(1000, dtype=torch.long)
    with torch.no_grad():
        linear.weight.zero_()
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy.in_chunks(linear, linear.forward, hidden, targets, 50, head.Finish(), 0.0)
    loss.backward()
    assert linear.weight.grad[0].tolist() == pytest.approx([-98_000.0] * 8, rel=1e-3)
