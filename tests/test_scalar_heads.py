"""Value and score heads: what they read, where they are, and where they are left out."""

import shutil

import pytest
import torch
from conftest import pretrained, read_jsonl
from faults.forked import assert_same_end, forget
from invariants import objectives
from safetensors.torch import load_file
from test_head import ADAPTERS, asked, batch, gradients, make, with_adapters

from finetune.config import Optimizer
from finetune.config import own as own_sections
from finetune.engine import optim
from finetune.errors import ConfigError, ModelError
from finetune.models import head, scalar_heads

BOTH = ["scores", "values"]
ENDS = torch.tensor([39, 79])  # of two sequences of 40 tokens


def with_heads(name="llama", wanted=BOTH):
    model = make(name)
    scalar_heads.attach(model, wanted, torch.float32)
    with torch.no_grad():
        for scalar in scalar_heads.of(model).values():
            scalar.weight.normal_()
    head.install(model)
    return model


def last_states(model, inputs):
    """What the output projection reads, [B * T, H]."""
    seen = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, got: seen.append(*got))
    model(**inputs)
    hook.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "llama, tied"])
@pytest.mark.parametrize("holds", [False, True])
def test_values_are_read_where_labels_are_predicted_and_scores_at_the_ends(name, holds):
    model = with_heads(name)
    inputs, labels, positions = batch()
    states = last_states(model, inputs)
    values = states[positions] @ model.value_head.weight[0]
    scores = states[ENDS] @ model.score_head.weight[0]
    wanted = gradients(model, values.square().sum() + scores.exp().sum())
    model.holds_all_logits = holds
    answers = asked(model, inputs, labels, positions, BOTH, ends=ENDS)
    torch.testing.assert_close(answers["values"], values)
    torch.testing.assert_close(answers["scores"], scores)
    found = gradients(model, answers["values"].square().sum() + answers["scores"].exp().sum())
    for weight, gradient in wanted.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-4, atol=1e-4, msg=weight)


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("want", [["nll"], ["scores"], ["values"], ["logprobs", "values"]])
def test_what_is_not_asked_gets_a_gradient_of_zero(want, holds):
    """DDP waits for the gradients of all weights."""
    model = with_heads()
    model.holds_all_logits = holds
    answers = asked(model, *batch(), want, ends=ENDS)
    assert answers.keys() == set(want)
    found = gradients(model, sum(answer.sum() for answer in answers.values()))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, child in scalar_heads.NAMES.items():
        assert bool(found[f"{child}.weight"].any()) == (name in want)
    assert bool(found["lm_head.weight"].any()) == bool({"nll", "logprobs"} & set(want))


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("used", ["nll", "entropy", "values", "scores"])
def test_what_is_asked_but_only_logged_gets_a_gradient_of_zero(used, holds):
    model = with_heads()
    model.holds_all_logits = holds
    answers = asked(model, *batch(), ["nll", "entropy", *BOTH], ends=ENDS)
    found = gradients(model, answers[used].sum())
    alone = asked(model, *batch(), [used], ends=ENDS)[used]
    wanted = gradients(model, alone.sum())
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for weight, gradient in wanted.items():
        torch.testing.assert_close(found[weight], gradient, rtol=1e-5, atol=1e-5, msg=weight)


def test_a_pass_that_fails_leaves_no_hook_behind():
    """It would keep the states of every later pass."""
    model = with_heads()
    model.holds_all_logits = True
    inputs, labels, positions = batch()
    with pytest.raises(IndexError):
        asked(model, inputs, labels, positions + 99, BOTH, ends=ENDS)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_with_a_child_of_that_name_keeps_it():
    model = make("llama")
    model.value_head = torch.nn.Linear(32, 7)
    assert not scalar_heads.of(model)
    weights = dict(model.named_parameters())
    assert scalar_heads.without(weights, model).keys() == weights.keys()
    with pytest.raises(ModelError, match="needs values, but llama has its own value_head"):
        scalar_heads.attach(model, ["values"], torch.float32)


@pytest.mark.parametrize("how", ADAPTERS)
def test_a_head_beside_adapters_of_any_kind_reads_the_same_states(how):
    model = with_adapters(make("llama"), how).eval()
    base = model.get_base_model()
    scalar_heads.attach(base, BOTH, torch.float32)
    head.install(base)
    inputs, labels, positions = batch()
    scores = last_states(base, inputs)[ENDS] @ base.score_head.weight[0]
    answers = asked(model, inputs, labels, positions, BOTH, ends=ENDS)
    torch.testing.assert_close(answers["scores"], scores)


def test_a_document_that_ends_on_another_process_scores_zero_without_a_gradient():
    model = with_heads(wanted=["scores"])
    answers = asked(model, *batch(), ["scores"], ends=torch.tensor([-1, 79]))
    assert answers["scores"][0] == 0
    assert answers["scores"][1] != 0
    grad = gradients(model, answers["scores"][0])
    assert not any(each.any() for each in grad.values())


def test_under_autocast_scores_stay_in_float32():
    """bfloat16 rounds a score near 1 to 1/128: two answers of a pair would often be equal."""
    model = with_heads().bfloat16()
    for scalar in scalar_heads.of(model).values():
        scalar.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = asked(model, *batch(), ["scores"], ends=ENDS)["scores"]
    assert scores.dtype == torch.float32
    assert (scores.bfloat16() != scores).any()


def test_a_model_without_the_head_says_so():
    with pytest.raises(ValueError, match="no head for scores"):
        asked(with_heads(wanted=["values"]), *batch(), ["scores"], ends=ENDS)


def test_heads_have_a_learning_rate_of_their_own_and_are_no_hidden_matrix():
    model = with_adapters(make("llama"), "on the layers")
    scalar_heads.attach(model.get_base_model(), BOTH, torch.float32)
    groups = optim.parameter_groups(model, Optimizer(lr=1e-4, head_lr=1e-3))
    of_heads = {id(scalar.weight) for scalar in scalar_heads.of(model.get_base_model()).values()}
    (group,) = [g for g in groups if of_heads & {id(p) for p in g["params"]}]
    assert {id(p) for p in group["params"]} == of_heads
    assert group["scale"] == pytest.approx(10)
    assert not group["hidden"]


def test_the_config_knows_the_heads_that_models_can_get():
    assert scalar_heads.NAMES.keys() == own_sections.HEADS


def test_a_rate_of_heads_that_are_not_there_is_refused(workshop):
    with pytest.raises(ConfigError, match="head_lr: would be ignored: .*has no value or score"):
        workshop.check(optimizer__head_lr=1e-3)


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_heads_train_resume_to_the_bit_and_are_left_out_of_the_export(workshop, adapter):
    base = workshop.train("base", train__max_steps=1)
    settings = {
        **objectives.SETTINGS["Scored"], **pretrained(base / "model"), "adapter__kind": adapter,
        "optimizer__lr": 1e-3, "optimizer__head_lr": 1e-2, "data__max_length": 256,
        "train__max_steps": 4, "checkpoint__every_steps": 2, "checkpoint__keep_last": 3,
    }  # fmt: skip
    run, whole = workshop.train(**settings), workshop.folder / "whole"
    metrics = read_jsonl(run / "metrics.jsonl")
    assert metrics[-1]["value"] != metrics[0]["value"]
    (exported,) = (load_file(path) for path in (run / "model").glob("*.safetensors"))
    assert exported
    assert not [name for name in exported if "value_head" in name or "score_head" in name]
    shutil.copytree(run, whole)
    forget(run, 2)
    assert_same_end(workshop.train(**settings), whole)
