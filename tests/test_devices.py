"""Every objective on a pretended GPU: no tensor stays on the CPU, and the host waits for none."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, forget_process_state, read_jsonl, short, tiny_llama
from invariants import families, sampled
from on_device import CUDA, OnGpu, on_gpu, pretend_in_runs, pretended

from finetune import config as configs
from finetune import loop, preflight
from finetune.config import objective_fields as fields
from finetune.data.taught import IDS, LOGPROBS
from finetune.engine.checkpoint.saver import Saver
from finetune.engine.companion import Companion
from finetune.engine.token_values import logprobs_as, token_values
from finetune.engine.topology import Topology
from finetune.errors import TrainingDiverged
from finetune.models import build as models
from finetune.models import head
from finetune.models.policy import Policy
from finetune.objectives import OBJECTIVES, preference
from finetune.objectives.base import as_divisors, total, with_blank_reference
from finetune.rollouts import sampling
from finetune.rollouts.rollouts import Rollouts
from finetune.survival.preemption import StopFlag

SMALL = {
    "data__max_length": 256, "train__global_batch_size": 8, "train__micro_batch_size": 4,
    "train__max_steps": 2, "train__precision": "fp32",
}  # fmt: skip
SAMPLED = {
    "grpo": {"objective__beta": 0.1},
    "grpo gspo": {"objective__loss": "gspo", "objective__dual_clip": 3.0},
    "grpo cispo": {"objective__loss": "cispo"},
    "rloo": {}, "ppo": {},
}  # fmt: skip


def prepared(workshop, **settings):
    """Return (config, data) of a run, as the loop has them before it builds the model."""
    path = workshop.write(workshop.config("run", **SMALL | settings))
    config, _ = configs.parse(["--config", str(path)])
    return config, preflight.prepare(config, Topology("fp32", check_only=True))


def built(config, data, seed=0):
    torch.manual_seed(seed)
    heads = OBJECTIVES[config.objective.kind].heads
    return models.build(
        config, data.model_config, data.tokenizer, attention=data.attention, precision="fp32",
        new_token_ids=[], device=torch.device("cpu"), first_inputs=list, with_weights=True,
        heads=heads,
    )[0]  # fmt: skip


def learned(policy, batches, totals, config):
    """Return the terms of a step, and leave its gradients."""
    objective, settings = OBJECTIVES[config.objective.kind], config.objective
    policy.model.train()
    with torch.no_grad():
        found = objective.prepare(policy, batches, settings)
    divisors, terms = {**totals, **as_divisors(found)}, []
    for batch in batches:
        here = objective.loss(policy, batch, settings, found)
        total(here, divisors).backward()
        terms += here
    return [term.sum.detach() for term in terms]


def of_ours(waits):
    """Return what the project's own lines wait for; transformers has some of its own."""
    return [each for each in waits if each.startswith((str(ROOT / "finetune"), __file__))]


def gradients(model):
    return [p.grad for p in model.parameters() if p.grad is not None]


def compare(config, model, batches, totals, companion=None):
    """Learn on the CPU, and on the pretended GPU: the same numbers, without a wait."""
    of_cpu = learned(Policy(model, companion=companion), batches, totals, config)
    wanted = gradients(model)
    model.zero_grad()
    with pretended() as waits:
        if companion is not None:
            on_gpu(companion.policy.model)
        on_gpu(model)
        moved = [batch.to(CUDA) for batch in batches]
        of_gpu = learned(Policy(model, companion=companion), moved, totals, config)
        assert not of_ours(waits)
    torch.testing.assert_close([each.inner for each in of_gpu], of_cpu, rtol=1e-5, atol=1e-5)
    found = gradients(model)
    assert all(isinstance(each, OnGpu) for each in found)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.inner, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", short(sorted(families.ROWS.keys() - {"distill"}), "dpo", "kto"))
def test_objectives_of_rows_compute_on_one_device(workshop, kind):
    packs = {"data__packing": kind in families.PACKED}
    config, data = prepared(workshop, **families.settings(workshop, kind) | packs)
    train = data.train.of_all()
    batches = [with_blank_reference(each) for each in train.at(0)]
    compare(config, built(config, data), batches, train.totals(0))


@pytest.mark.parametrize("kind", short([*SAMPLED], "grpo", "ppo"))
def test_objectives_of_completions_compute_on_one_device(workshop, kind):
    own = sampled.settings(workshop, kind.split()[0], **SAMPLED[kind])
    config, data = prepared(workshop, **own)
    batch = data.train.largest()
    compare(config, built(config, data), [batch], batch.counts)


def frozen(model):
    """Return a companion as `companion.load` makes it of a process's own copy."""
    finish, _ = head.probe(model)
    projection = model.get_output_embeddings()
    model.requires_grad_(False).eval()
    return Companion(Policy(model), "", None, lambda states: finish(projection(states).float()))


def distilling(workshop, **own):
    """Return (config, data) of a run that distils, without a teacher in a folder."""
    config, data = prepared(workshop, objective__kind="sft")
    return config.model_copy(update={"objective": fields.Distill(kind="distill", **own)}), data


@pytest.mark.parametrize("beta", short([0.0, 0.5, 1.0], 0.5))
def test_a_teacher_beside_the_model_computes_on_one_device(workshop, beta):
    config, data = distilling(workshop, beta=beta, sft_weight=0.5, teacher="beside")
    train, teacher = data.train.of_all(), frozen(built(config, data, seed=1))
    compare(config, built(config, data), train.at(0), train.totals(0), teacher)


def test_stored_distributions_compute_on_one_device(workshop):
    """The likeliest tokens of a teacher, as rows have them."""
    config, data = distilling(workshop, beta=0.5)
    batch = data.train.of_all().at(0)[0]
    ids = torch.arange(5).expand(len(batch.labels), 5).to(torch.int32)
    columns = {IDS: ids, LOGPROBS: torch.full(ids.shape, -2.0)}
    compare(config, built(config, data), [replace(batch, token_columns=columns)], batch.counts)


# ----------------------------------------------------------------------------------- sampling


def model_of(seed, **more):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_llama(vocab_size=60, **more))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(6.0 if weight.ndim > 1 else 1.0)  # distributions that are not flat
    return model


def drawn(model, places):
    numbers = sampling.numbers_of(3, count=4, places=places)
    prompts = [[1, 7, 9], [1, 8], [5, 6, 7, 8], [4]]
    return sampling.draw(
        model, prompts, numbers, temperature=0.7, ends={2}, pad=0, together=False, beat=lambda: None
    )  # fmt: skip


def test_a_gpu_draws_the_same_tokens_and_waits_for_none_of_them():
    """The copy at the end is one, however many tokens; transformers waits once a token."""
    wanted = drawn(model_of(0), 12)
    counts = []
    with pretended() as waits:
        model = on_gpu(model_of(0))
        for places in (12, 24):
            before = len(waits)
            found = drawn(model, places)
            counts.append(of_ours(waits[before:]))
            if places == 12:
                assert [each.ids for each in found] == [each.ids for each in wanted]
                for one, other in zip(found, wanted):
                    np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert len(counts[0]) == len(counts[1]) <= 2, counts


def test_a_policy_that_says_nan_ends_with_a_reason():
    """Its token would be behind the vocabulary, which on a GPU ends the process."""
    model = model_of(0)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(TrainingDiverged, match="NaN while it samples: .* lower optimizer.lr"):
        drawn(model, 4)


@pytest.mark.parametrize(("device", "wanted"), [(CUDA, "pinned"), (torch.device("cpu"), "plain")])
def test_completions_reach_a_gpu_from_page_locked_memory(device, wanted):
    """From other memory each copy makes the host wait."""
    batch = SimpleNamespace(name="plain", pinned=lambda: SimpleNamespace(name="pinned"))
    run = SimpleNamespace(
        asked=SimpleNamespace(phase_of=lambda step: (0, step)),
        around=SimpleNamespace(topology=SimpleNamespace(device=device, part=lambda it: it)),
        _batches=SimpleNamespace(at=lambda step: [batch], totals=lambda step: {"tokens": 3}),
    )
    [found], totals = Rollouts.at(run, 0)
    assert (found.name, totals) == (wanted, {"tokens": 3})


def test_without_padding_a_gpu_is_waited_for_once_a_token():
    """Completions that have ended leave, so that each token tells what the next pass holds."""
    wanted = drawn(model_of(0), 12)
    with pretended() as waits:
        model = on_gpu(model_of(0))
        model.set_attn_implementation("documents")
        found = drawn(model, 12)
        assert len(of_ours(waits)) <= 12 + 1
    assert [each.ids for each in found] == [each.ids for each in wanted]
    for one, other in zip(found, wanted):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_numbers_of_tokens_come_back_once_a_micro_batch(workshop):
    """What a reference and the log-probabilities of a phase are made of."""
    config, data = prepared(workshop, objective__kind="sft")
    model, topology = built(config, data), Topology("fp32", check_only=True)
    train = data.train.of_all()

    def walk(numbered):
        yield from numbered.at(0)

    of_cpu = token_values(topology, Policy(model), train, walk, logprobs_as("it"))["it"]
    topology.device = CUDA
    with pretended() as waits:
        of_gpu = token_values(topology, Policy(on_gpu(model)), train, walk, logprobs_as("it"))["it"]
        assert len(of_ours(waits)) == len(train.at(0))
    np.testing.assert_allclose(of_gpu, of_cpu, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------ what is found at all


def test_a_tensor_left_on_the_cpu_is_found(workshop, monkeypatch):
    """Deliberate breaks of the kinds that a CPU hides."""
    own = families.settings(workshop, "dpo")
    config, data = prepared(workshop, **own)
    train = data.train.of_all()
    batches = [with_blank_reference(each) for each in train.at(0)]
    for break_, message in (
        (lambda self, values: torch.zeros(len(values)) + values, "on the CPU and the GPU"),
        (lambda self, values: values * (1 + 0 * values.sum().item()), "_local_scalar_dense"),
        (lambda self, values: torch.from_numpy(values.detach().numpy()), "no numpy array"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(preference.Pairs, "only_chosen", break_)
            with pytest.raises((RuntimeError, TypeError, AssertionError), match=message):
                compare(config, built(config, data), batches, train.totals(0))


# ---------------------------------------------------------------------------------- whole runs

ENDS_OF_RUN = {"train__max_steps": 3, "data__eval_fraction": 0.2, "evaluation__every_steps": 2}
OF_TIME = {"seconds", "tokens_per_second", "memory_gb", "rollout_seconds"}


def numbers(workshop, patched, name, settings):
    """Train without saves and export; return every number of the logs."""
    forget_process_state()
    patched.setattr(Saver, "save", lambda *_, **__: None)
    patched.setattr(Saver, "require", lambda *_: None)
    patched.setattr(loop, "finish", lambda *_: None)
    path = workshop.write(workshop.config(name, **SMALL | settings | ENDS_OF_RUN))
    loop.run(*configs.parse(["--config", str(path)]), StopFlag())
    lines = [
        line for log in ("metrics", "eval")
        for line in read_jsonl(workshop.run_dir(name) / f"{log}.jsonl")
    ]  # fmt: skip
    return [value for line in lines for key, value in line.items() if key not in OF_TIME]


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:Ignoring pin_memory")  # what a checkpoint would be staged in
@pytest.mark.parametrize(
    "kind", ["grpo", "ppo", "dpo", "kto", "reward", "process_reward", "distill"]
)
def test_whole_runs_compute_on_one_device(workshop, monkeypatch, kind):
    """Reference, phases, steps, evaluations; saves and export have GPU tests of their own."""
    if kind in SAMPLED:
        own = sampled.settings(workshop, kind, objective__beta=0.05)
    else:
        own = families.settings(workshop, kind)
    with monkeypatch.context() as patched:
        wanted = numbers(workshop, patched, "cpu", own)
    with monkeypatch.context() as patched, pretended() as waits:
        pretend_in_runs(patched)
        found = numbers(workshop, patched, "gpu", own)
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert waits
