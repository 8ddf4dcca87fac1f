"""The chunked loss equals the loss with all logits, in value and gradients, for every head."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.models import attention, attention_choice, cross_entropy, head

VOCAB = 1009
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
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
    "falcon_h1": {
        "lm_head_multiplier": 0.3, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
    "mixtral": {"num_local_experts": 2},
}  # fmt: skip
FINISHES = {
    "gemma2": head.LogitTransform(1.0, 3.0), "cohere": head.LogitTransform(0.25),
    "granite": head.LogitTransform(0.25),
    "hyperclovax": head.LogitTransform(4.0), "falcon_h1": head.LogitTransform(0.3),
}  # fmt: skip


def make(name, **more):
    torch.manual_seed(0)
    kind = name.split(",")[0]
    config = AutoConfig.for_model(kind, **SIZES | MODELS[name] | more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.add_(
                torch.randn_like(parameter) / 10
            )
    return model.eval()


@pytest.fixture
def chunks_of_a_few(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 4 * VOCAB)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 3 * 4 * VOCAB)


def batch(num_tokens=40, every=2):
    """(inputs, labels, positions): two sequences, where every few tokens one is supervised."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, num_tokens), generator=generator)
    positions = torch.arange(0, 2 * num_tokens, every)
    labels = torch.randint(3, VOCAB, (len(positions),), generator=generator)
    return {"input_ids": ids, "use_cache": False}, labels, positions


def asked(model, inputs, labels, positions, want=("nll",), **more):
    """What the forward of a prepared model answers."""
    return model(**inputs, question=head.Question(labels, positions, frozenset(want), **more))


def nll(model, inputs, labels, positions, smoothing=0.0):
    return asked(model, inputs, labels, positions, label_smoothing=smoothing)["nll"]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(found, wanted, atol=1e-5, of_largest=0.0):
    """Check gradients; `of_largest`: also let a weight's differ by this share of its largest."""
    assert found.keys() == wanted.keys()
    for weight, grad in wanted.items():
        limit = max(atol, of_largest * float(grad.abs().max()))
        torch.testing.assert_close(found[weight], grad, rtol=1e-4, atol=limit, msg=weight)


def with_adapters(model, how, **more):
    """Return a model of peft with adapters whose weights are not zero."""
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, **ADAPTERS[how], **more))


def learned_alike(model, smoothing=0.0, tolerance=1e-5):
    """Return the weights whose gradients are equal with and without chunks; all must be."""
    inputs, labels, positions = batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions].float()
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    plain = gradients(model, loss)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert head.install(base) is None
    fused = nll(model, inputs, labels, positions, smoothing)
    assert fused.dtype == torch.float32
    assert fused.item() == pytest.approx(loss.item(), rel=tolerance)
    found = gradients(model, fused)
    assert found.keys() == plain.keys()
    for name, grad in plain.items():
        assert (found[name] - grad).abs().max() <= tolerance * max(1.0, grad.abs().max()), name
    assert torch.equal(model(**inputs).logits.flatten(0, 1)[positions].float(), logits), (
        "without a question it is as it was"
    )
    return set(found)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient_are_those_of_all_logits(chunks_of_a_few, name, smoothing):
    model = make(name)
    assert head.probe(model) == (FINISHES.get(name, head.LogitTransform()), None)
    names = {name for name, _ in model.named_parameters()}
    unused = {name for name in names if "embed_positions" in name or "expert" in name}
    assert learned_alike(model, smoothing) >= names - unused


@pytest.mark.parametrize("kernel", [attention.DOCUMENTS, "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_traced_under_every_attention_and_without_weights(name, kernel):
    config = AutoConfig.for_model(name.split(",")[0], **SIZES | MODELS[name])
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    if kernel == attention.DOCUMENTS:  # some take no other than eager
        kernel = attention_choice.choose("auto", kind, config, torch.device("cpu"), "fp32")
        kernel = kernel if kernel == attention.DOCUMENTS else "eager"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    assert head.probe(model) == (FINISHES.get(name, head.LogitTransform()), None)


ADAPTERS = {
    "on the layers": {"target_modules": "all-linear"},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on the head, dropout and DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "head trained whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["lm_head", "embed_tokens"],
    },
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
}


@pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ADAPTERS)
def test_adapters_on_the_head_get_the_same_gradients(chunks_of_a_few, how, tied):
    is_whole = how in ("head trained whole", "new tokens")
    more = {"ensure_weight_tying": True} if tied and is_whole else {}
    model = with_adapters(make("llama", tie_word_embeddings=tied), how, **more)
    trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learned_alike(model.eval()) == trains


def test_an_untraceable_forward_keeps_all_logits_with_a_note():
    model = make("llama")
    forward = model.forward

    def unusual(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        out.logits = out.logits.sin()
        return out

    model.forward = unusual
    assert "more than scale or cap" in head.install(model)
    inputs, labels, positions = batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    assert torch.equal(nll(model, inputs, labels, positions), wanted)


def test_a_batch_without_labels_gives_every_weight_a_zero_gradient():
    model = make("llama")
    head.install(model)
    inputs, labels, positions = batch()
    loss = nll(model, inputs, labels[:0], positions[:0])
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
    inputs, labels, positions = batch(num_tokens=60, every=1)
    with Largest() as largest, torch.set_grad_enabled(how != "evaluation"):
        loss = nll(model, inputs, labels, positions)
        if how != "evaluation":
            loss.backward()
    # The gradient of the projection is the largest of all, 1009 x 32; without one it is the scores
    # of 2 heads in 2 rows.
    assert largest.numbers == (VOCAB * 32 if how == "all weights" else 2 * 2 * 60 * 60), (
        "logits would be 120 x 1009"
    )


def test_in_16_bits_the_loss_is_summed_in_32(chunks_of_a_few):
    """bf16 has 8 bits, so a sum of a thousand would be off by 4; only single logits may be bf16."""
    model = make("llama").bfloat16()
    inputs, labels, positions = batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    wanted = F.cross_entropy(logits.double(), labels, reduction="sum")
    head.install(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert nll(model, inputs, labels, positions).item() == pytest.approx(
            wanted.item(), rel=1e-6
        )


@pytest.mark.parametrize("wrong", [False, True])
def test_the_start_of_a_run_proves_the_loss_or_falls_back(monkeypatch, wrong):
    model = make("llama")
    if wrong:
        monkeypatch.setattr(head, "probe", lambda base: (head.LogitTransform(1.0, 2.0), None))
    head.install(model)
    message = head.check(model, model, torch.device("cpu"), "fp32")
    assert bool(message) == wrong
    assert model.holds_all_logits == wrong
    inputs, labels, positions = batch()
    logits = model(**inputs).logits.flatten(0, 1)[positions]
    wanted = F.cross_entropy(logits, labels, reduction="sum")
    assert nll(model, inputs, labels, positions).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_in_float16_the_gradient_of_the_head_is_summed_in_float32():
    """A thousand tokens of 100 sum to 98,000, but float16 ends at 65,504; no loss scale helps."""
    linear = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.full((1000, 8), 100.0)
    targets = torch.zeros(1000, dtype=torch.long)
    with torch.no_grad():
        linear.weight.zero_()
    with torch.autocast("cpu", torch.float16):
        loss = cross_entropy.nll_in_chunks(
            linear, linear.forward, hidden, targets, 50, head.LogitTransform()
        )
    loss.backward()
    assert linear.weight.grad[0].tolist() == pytest.approx([-98_000.0] * 8, rel=1e-3)


# Log-probabilities and entropies


def of_all_logits(model, inputs, labels, positions, temperature=1.0):
    logits = model(**inputs).logits.flatten(0, 1)[positions].float()
    log_SV = torch.log_softmax(logits / temperature, -1)
    return log_SV.gather(1, labels[:, None])[:, 0], -(log_SV.exp() * log_SV).sum(-1)


@pytest.mark.parametrize(
    ("name", "temperature", "holds"),
    [*((name, 1.0, False) for name in MODELS), ("gemma2", 0.7, False), ("gemma2", 0.7, True)],
)
def test_log_probabilities_and_entropies_are_those_of_all_logits_and_so_are_their_gradients(
    chunks_of_a_few, name, temperature, holds
):
    """The temperature divides what the model makes of its logits, here capped ones."""
    model = make(name)
    given = batch()
    factors = torch.randn(len(given[1]), generator=torch.Generator().manual_seed(2))
    logprobs, entropy = of_all_logits(model, *given, temperature)
    wanted = gradients(model, (logprobs * factors).sum() + 0.1 * (entropy * factors).sum())
    head.install(model)
    model.holds_all_logits = holds
    answers = asked(model, *given, want=("logprobs", "entropy"), temperature=temperature)
    torch.testing.assert_close(answers["logprobs"], logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answers["entropy"], entropy, rtol=1e-5, atol=1e-5)
    found = gradients(
        model, (answers["logprobs"] * factors).sum() + 0.1 * (answers["entropy"] * factors).sum()
    )
    assert_alike(found, wanted, atol=1e-4, of_largest=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_minus_the_sum_of_log_probabilities(chunks_of_a_few, name):
    model = make(name)
    head.install(model)
    answers = asked(model, *batch(), want=("nll", "logprobs"))
    assert answers["nll"].item() == pytest.approx(-answers["logprobs"].sum().item(), rel=1e-6)
    wanted = gradients(model, answers["nll"])
    found = gradients(model, -asked(model, *batch(), want=["logprobs"])["logprobs"].sum())
    assert_alike(found, wanted, of_largest=1e-5)


@pytest.mark.parametrize("how", ADAPTERS)
def test_log_probabilities_reach_adapters_on_the_head(chunks_of_a_few, how):
    model = with_adapters(make("llama"), how).eval()
    logprobs, _ = of_all_logits(model, *batch())
    wanted = gradients(model, logprobs.exp().sum())
    head.install(model.get_base_model())
    found = gradients(model, asked(model, *batch(), want=["logprobs"])["logprobs"].exp().sum())
    assert_alike(found, wanted)


@pytest.mark.parametrize("how", ["all weights", "on the head"])
def test_weights_of_tokens_multiply_their_losses(chunks_of_a_few, how):
    model = make("llama")
    if how == "on the head":
        model = with_adapters(model, how).eval()
    inputs, labels, positions = batch()
    weights = torch.rand(len(labels), generator=torch.Generator().manual_seed(3))
    logprobs, _ = of_all_logits(model, inputs, labels, positions)
    wanted = gradients(model, -(logprobs * weights).sum())
    head.install(model.get_base_model() if how == "on the head" else model)
    loss = asked(model, inputs, labels, positions, weights=weights)["nll"]
    assert loss.item() == pytest.approx(-(logprobs * weights).sum().item(), rel=1e-5)
    assert_alike(gradients(model, loss), wanted)


@pytest.mark.parametrize("trains", [True, False])
def test_no_tensor_holds_all_logits_for_log_probabilities(chunks_of_a_few, trains):
    model = make("llama")
    head.install(model)
    inputs, labels, positions = batch(num_tokens=60, every=1)
    with Largest() as largest, torch.set_grad_enabled(trains):
        answers = asked(model, inputs, labels, positions, want=("logprobs", "entropy"))
        if trains:
            (answers["logprobs"] + answers["entropy"]).sum().backward()
    assert largest.numbers <= VOCAB * 32, "logits would be 120 x 1009"
