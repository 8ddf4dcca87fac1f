"""Completions without padding: as likely as the policy finds them, and those of `generate`."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA

from finetune.models import attention, attention_probe, head
from finetune.models.head import Question
from finetune.models.key_values import FEWEST, KeyValues
from finetune.rollouts import unpadded
from finetune.rollouts.sampling import Stopped, draw, numbers_of, why_padded

pytestmark = pytest.mark.slow

ENDS = {2, 5, 9}
PLACES = 24
WINDOW = {"model_type": "mistral", "sliding_window": 6}
EVERY_OTHER_WINDOW = {
    "model_type": "gemma3_text", "sliding_window": 6, "head_dim": 8, "pad_token_id": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
OTHERS = {
    "a window": WINDOW,
    "a window in one layer": EVERY_OTHER_WINDOW,
    "places that are learned": {
        "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0,
    },
    "one head of keys": {"num_key_value_heads": 1},
    "two calls of attention in a layer": {"model_type": "diffllama"},
    "keys wider than values": {
        "model_type": "deepseek_v3", "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
        "head_dim": 8, "num_key_value_heads": 4, "num_attention_heads": 4,
    },
}  # fmt: skip


def made(**changes):
    """Return a tiny model in float32 that attends as in training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {**TINY_LLAMA, "vocab_size": 64, "initializer_range": 0.3, **changes}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.DOCUMENTS)
    head.install(model)
    return model.train()


@pytest.fixture(scope="module")
def model():
    return made()


def prompts(count=32):
    """Prompts of 2 to 40 tokens, each four times as in a group."""
    chance = np.random.default_rng(0)
    each = [
        [1, *chance.integers(10, 64, chance.integers(1, 40)).tolist()] for _ in range(count // 4)
    ]
    return [prompt for prompt in each for _ in range(4)]


def drawn(model, asked, numbers, temperature=0.7, beat=lambda: None):
    settings = {"ends": ENDS, "pad": 0, "together": False, "beat": beat}
    return draw(model, asked, numbers, temperature=temperature, **settings)


@torch.no_grad()
def require_as_likely(model, asked, found, temperature=0.7):
    """Compare the sampler's log-probabilities with those of a pass of training."""
    documents = [[*prompt, *each.ids] for prompt, each in zip(asked, found)]
    lengths, start, positions = [len(each) for each in documents], 0, list[int]()
    for prompt, length in zip(asked, lengths):
        positions += range(start + len(prompt) - 1, start + length - 1)
        start += length
    labels = torch.tensor([token for each in found for token in each.ids])
    question = Question(
        labels, torch.tensor(positions), frozenset({"logprobs"}), temperature=temperature
    )
    ids = torch.tensor([[token for each in documents for token in each]])
    inputs = attention_probe.inputs_of(ids, lengths, getattr(model, "base_model", model))
    wanted = model(**inputs, question=question)["logprobs"].numpy()
    assert np.concatenate([each.logprobs for each in found]) == pytest.approx(wanted, abs=5e-6)


@pytest.mark.parametrize("at_once", [32, 8, 1])
def test_the_sampler_and_training_find_tokens_as_likely(model, at_once):
    asked, numbers = prompts(), numbers_of(0, 3, count=32, places=PLACES)
    asked, numbers = asked[: 4 * at_once], numbers[: 4 * at_once]
    parts = [slice(start, start + at_once) for start in range(0, len(asked), at_once)]
    found = [each for part in parts for each in drawn(model, asked[part], numbers[part], 1.0)]
    require_as_likely(model, asked, found, 1.0)  # padded batches are 1.2e-5 off
    whole = drawn(model, asked, numbers, 1.0)
    assert [each.ids for each in found] == [each.ids for each in whole]


def padded(**changes):
    """Return the same model as a user opens it, whose completions `generate` draws."""
    same = made(**changes)
    same.set_attn_implementation("sdpa")
    return same


def test_tokens_are_those_of_generate(model):
    asked, numbers = prompts(), numbers_of(0, 3, count=32, places=PLACES)
    found, wanted = drawn(model, asked, numbers), drawn(padded(), asked, numbers)
    assert [(each.ids, each.finish_reason) for each in found] == [
        (each.ids, each.finish_reason) for each in wanted
    ]
    assert {each.finish_reason for each in found} == {"stop", "length"}


def test_without_chance_tokens_are_those_of_greedy_generate(model):
    asked, opened = prompts(8)[::4], padded().eval()
    numbers = numbers_of(0, 3, count=len(asked), places=PLACES)
    for prompt, each in zip(asked, drawn(model, asked, numbers, temperature=1e-4)):
        ids = torch.tensor([prompt])
        out = opened.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=PLACES,
            eos_token_id=sorted(ENDS), pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist() == list(each.ids)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(each, id=name, marks=() if name == "a window" else pytest.mark.proof)
        for name, each in OTHERS.items()
    ],
)
def test_other_models_sample_as_they_train(changes):
    changes = {"initializer_range": 0.2, **changes}
    model = made(**changes)
    asked, numbers = prompts(8), numbers_of(0, 3, count=8, places=PLACES)
    found = drawn(model, asked, numbers)
    require_as_likely(model, asked, found)
    assert [each.ids for each in found] == [
        each.ids for each in drawn(padded(**changes), asked, numbers)
    ]


def test_adapters_take_part():
    from peft import LoraConfig, get_peft_model

    base = made(initializer_range=0.2)
    asked, numbers = prompts(8), numbers_of(0, 3, count=8, places=PLACES)
    of_base = drawn(base, asked, numbers)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    for name, values in tuned.named_parameters():
        if "lora_B" in name:  # zero, as they begin
            torch.nn.init.normal_(values, std=0.1)
    found = drawn(tuned, asked, numbers)
    assert [each.ids for each in found] != [each.ids for each in of_base]
    assert tuned.training
    tuned.eval()  # policies learn without dropout
    require_as_likely(tuned, asked, found)


@contextmanager
def tokens_of_passes(model):
    """Yield a list that gets the number of tokens of each pass."""
    passes = list[int]()
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, given, __: passes.append(given[0].numel()))
    yield passes
    hook.remove()


def test_nothing_is_padded_and_what_has_ended_costs_nothing(model):
    asked, numbers = prompts(), numbers_of(0, 3, count=32, places=3 * PLACES)
    with tokens_of_passes(model) as passes:
        lengths = [len(each.ids) for each in drawn(model, asked, numbers)]
    assert passes[0] == sum(len(prompt) for prompt in asked[::4])  # of a group once
    left = [sum(length > place for length in lengths) for place in range(1, max(lengths))]
    assert passes[1:] == [max(each, FEWEST) for each in left]
    assert left[-1] < FEWEST < left[0]


def test_a_completion_that_has_reached_its_own_limit_is_not_continued():
    """Its model has no positions for more, as that of an environment's later turn may not."""
    shape = {**OTHERS["places that are learned"], "max_position_embeddings": 32}
    model, numbers = made(**shape), numbers_of(0, 3, count=2, places=28)
    asked = [[1] * 20, [1] * 4]
    numbers[0, 12:] = np.nan
    found = draw(
        model, asked, numbers, temperature=1.0, ends=set(), pad=0, together=False,
        beat=lambda: None,
    )  # fmt: skip
    assert [(len(each.ids), each.finish_reason) for each in found] == [
        (12, "length"), (28, "length"),
    ]  # fmt: skip
    require_as_likely(model.eval(), asked, found, 1.0)


def test_prompts_are_read_in_passes_of_bounded_size(model, monkeypatch):
    asked, numbers = prompts(), numbers_of(0, 3, count=32, places=PLACES)
    whole = drawn(model, asked, numbers)
    monkeypatch.setattr(unpadded, "READ_TOKENS", 30)
    with tokens_of_passes(model) as passes:
        assert [each.ids for each in drawn(model, asked, numbers)] == [each.ids for each in whole]
    lengths = [len(prompt) for prompt in asked[::4]]
    reached = np.cumsum(passes).tolist()
    reads = passes[: reached.index(sum(lengths)) + 1]
    assert len(reads) > 1
    assert all(read <= 30 or read in lengths for read in reads)


def test_in_16_bits_states_are_kept_in_them(model, monkeypatch):
    seen = list[torch.dtype]()
    attend = KeyValues.attend
    monkeypatch.setattr(
        KeyValues,
        "attend",
        lambda self, query, *more: seen.append(query.dtype) or attend(self, query, *more),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = drawn(model, prompts(4), numbers_of(0, 3, count=4, places=4))
    assert set(seen) == {torch.bfloat16}
    assert len({each.ids for each in found}) > 1


def test_a_request_to_stop_comes_between_tokens(model):
    beats, before = iter(range(5)), torch.get_rng_state()

    def beat():
        if next(beats) == 4:
            raise Stopped

    with pytest.raises(Stopped):
        drawn(model, prompts(4), numbers_of(0, 3, count=4, places=PLACES), beat=beat)
    assert model.training
    assert model.config._attn_implementation == attention.DOCUMENTS
    assert torch.equal(torch.get_rng_state(), before)


def test_where_padding_stays_it_is_said_why(model):
    assert why_padded(model) == ""
    assert why_padded(padded()) == "model.attention is sdpa"
