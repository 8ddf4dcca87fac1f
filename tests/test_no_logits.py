"""No pass of any objective holds a row of logits for each token: not in learning, nor before it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import short
from test_head import Largest
from test_preference import batch_of, pairs_of, policy_of

from finetune import config as configs
from finetune.config import objective_fields as fields
from finetune.engine.passes import _terms
from finetune.engine.token_values import logprobs_as
from finetune.models import cross_entropy
from finetune.models.distributions import TopK
from finetune.objectives import OBJECTIVES
from finetune.objectives.base import total
from finetune.rollouts import sampling

pytestmark = pytest.mark.slow
VOCABULARY = 4001
REWARDED = {"rewards": [{"kind": "exact_match"}], "beta": 0.1}
SETTINGS = {
    "sft": fields.Sft(), "dpo": fields.Dpo(kind="dpo"), "simpo": fields.Simpo(kind="simpo"),
    "orpo": fields.Orpo(kind="orpo"), "cpo": fields.Cpo(kind="cpo"), "kto": fields.Kto(kind="kto"),
    "grpo": fields.Grpo(kind="grpo", **REWARDED), "ppo": fields.Ppo(kind="ppo", **REWARDED),
    "rloo": fields.Rloo(kind="rloo", **REWARDED),
    "distill": configs.Distill(kind="distill", beta=0.5, sft_weight=0.1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def chunks_of_a_few(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 8 * VOCABULARY)


@pytest.fixture(scope="module")
def batch():
    """60 pairs in one pack, with every column that an objective reads; the same as mismatched."""
    found = batch_of(pairs_of(60))
    random, count = torch.Generator().manual_seed(0), len(found.labels)
    names = ("reference", "old_logprobs", "advantages", "returns", "old_values")
    columns = {name: torch.randn(count, generator=random) for name in names}
    ids = torch.arange(5, dtype=torch.int32).repeat(count, 1)
    columns |= {"teacher_ids": ids, "teacher_logprobs": torch.full(ids.shape, -3.0)}
    found = replace(found, token_columns=columns)
    return replace(found, mismatched=found)


def most(batch):
    """A weight of the vocabulary, or the states of a layer; a quarter of all logits is far more."""
    assert len(batch.labels) * VOCABULARY / 4 > 2 * VOCABULARY * 32
    return VOCABULARY * 32


@pytest.mark.parametrize("kind", short([*SETTINGS], "dpo", "grpo"))
def test_an_objective_learns_and_evaluates_without_all_logits(batch, kind):
    objective, settings = OBJECTIVES[kind], SETTINGS[kind]
    _, policy = policy_of(0, objective.heads, VOCABULARY)
    wants = list[frozenset[str]]()
    ask = policy.known
    policy.known = lambda want: wants.append(ask(want)) or wants[-1]
    with Largest() as largest:
        with torch.no_grad():
            prepared = objective.prepare(policy, [batch], settings)
        terms = objective.loss(policy, batch, settings, prepared)
        total(terms, {**batch.counts, **prepared}).backward()
        assert wants[-1] >= objective.asks | objective.heads, "what forecasts count"
        with torch.no_grad():
            _terms(policy, objective, settings, batch, prepared)
    assert largest.numbers <= most(batch)


@pytest.mark.parametrize("name", ["a phase", "the reference", "a teacher"])
def test_what_is_asked_before_a_step_needs_no_logits(batch, name):
    """Log-probabilities at a temperature, with values; of a frozen policy; a teacher."""
    _, policy = policy_of(0, ["values"], VOCABULARY)
    with Largest() as largest, torch.no_grad():
        if name == "a phase":
            policy(batch, {"logprobs", "values"}, temperature=0.7)
        elif name == "the reference":
            logprobs_as("reference")(policy, batch)
        else:
            teacher = policy(batch, {"distribution"}).distribution
            policy(batch, {"divergence"}, reference=teacher, beta=0.3)
            policy(batch, {"divergence"}, reference=TopK(
                batch.token_columns["teacher_ids"].long(), batch.token_columns["teacher_logprobs"]
            ))  # fmt: skip
    assert largest.numbers <= most(batch)


def test_sampling_holds_one_row_of_logits_for_each_completion():
    """Also of the pass over the prompts, 8 of 48 tokens."""
    model, _ = policy_of(0, vocabulary=VOCABULARY)
    with Largest() as largest:
        sampling.draw(
            model, [[5] * 48] * 8, np.full((8, 4), 0.5), temperature=1.0, ends=set(), pad=0,
            together=False, beat=lambda: None,
        )  # fmt: skip
    assert largest.numbers == 8 * VOCABULARY
