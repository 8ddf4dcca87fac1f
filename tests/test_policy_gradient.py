"""Learning from rewards: formulas as their papers have them, and no number of a part of a step."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import read_jsonl, short
from invariants import sampled
from invariants.test_topologies import several
from safetensors.torch import load_file
from test_preference import as_trl_wants, cut_at, policy_of

from finetune import config as configs
from finetune.config import objective_fields as fields
from finetune.data.batches import Batches
from finetune.data.examples import Examples, Ragged
from finetune.data.order import Sequences
from finetune.errors import ConfigError
from finetune.models.policy import Answers, Policy
from finetune.objectives import advantages
from finetune.objectives.advantages import Scored
from finetune.objectives.base import total
from finetune.objectives.policy_gradient import LOSSES, Grpo, Ppo, Rloo

pytestmark = pytest.mark.slow

KINDS = {"grpo": (Grpo(), fields.Grpo), "rloo": (Rloo(), fields.Rloo), "ppo": (Ppo(), fields.Ppo)}


def chosen(kind="grpo", **values):
    """(objective, settings); short completions at most 10 tokens long."""
    objective, cls = KINDS[kind]
    rollouts = {"max_new_tokens": 10, "temperature": values.pop("temperature", 1.0)}
    rewards = [{"kind": "exact_match"}]
    return objective, cls(kind=kind, rollouts=rollouts, rewards=rewards, **values)


def completions_of(count=8, masked=()):
    """Prompts with completions of other lengths, as tokens; `masked`: those that nothing learns."""
    random, parts, supervised = np.random.default_rng(0), [], []
    for number in range(count):
        prompt = random.integers(1, 60, random.integers(2, 6))
        answer = random.integers(1, 60, random.integers(1, 9))
        parts.append(np.concatenate([prompt, answer]).astype(np.int32))
        learns = number not in masked
        supervised.append((np.arange(len(parts[-1])) >= len(prompt)) & learns)
    ends = np.cumsum([len(each) for each in parts])
    stream = Ragged(np.concatenate(parts), np.concatenate([[0], ends[:-1]]), ends)
    number = np.arange(count)
    return Examples(
        {"input": stream}, np.concatenate(supervised), number * 0, number, number, ["rows"], "",
        count, 0, 0,
    )  # fmt: skip


def batches_of(examples, columns, size, processes=1):
    """Each process's micro-batches of `size` completions; `columns` are of supervised tokens."""
    arrays = {name: np.zeros(len(examples.supervised), np.float32) for name in columns}
    for name, values in columns.items():
        arrays[name][examples.supervised] = values
    sequences = Sequences(replace(examples, token_columns=arrays), False, 1024, seed=0)
    return [
        Batches(
            sequences, seed=0, global_batch_size=len(examples), micro_batch_size=size, rank=rank,
            num_processes=processes,
        ).at(0)
        for rank in range(processes)
    ]  # fmt: skip


def scored_of(examples, groups=2, seed=0, **more):
    """A phase whose numbers are random, near the policy's."""
    random = np.random.default_rng(seed)
    spans = [examples.supervised[examples.input.span(n)].sum() for n in range(len(examples))]
    ends = np.cumsum(spans)

    def near(size):
        return (-3 + size * random.standard_normal(ends[-1])).astype(np.float32)

    count = len(examples)
    return Scored(
        random.standard_normal(count), np.arange(count) * groups // count, ends,
        np.zeros(count, bool), near(0.5), near(0.5), near(1.0), near(1.0), **more,
    )  # fmt: skip


def step(kind, model, policy, settings, processes):
    """Return (mean of each term, gradients) of a step, whose micro-batches each process has."""
    objective, batches = KINDS[kind][0], [each for micro in processes for each in micro]
    model.zero_grad()
    with torch.no_grad():
        of_processes = [objective.prepare(policy, micro, settings) for micro in processes]
    prepared = {name: sum(each[name] for each in of_processes) for name in of_processes[0]}
    tokens = sum(len(each.labels) for each in batches)
    divisors, means = {"tokens": tokens, **prepared}, {}
    for batch in batches:
        terms = objective.loss(policy, batch, settings, prepared)
        total(terms, divisors).backward()
        for term in terms:
            mean = float(term.sum.detach() / divisors[term.per])
            means[term.name] = means.get(term.name, 0.0) + mean
    loss = sum(t.weight * means[t.name] for t in terms if t.weight)
    return {**means, "whole": loss}, [p.grad.clone() for p in model.parameters()]


def make(kind):
    """A tiny model, with a value head for ppo."""
    model, policy = policy_of(0, ["values"] if kind == "ppo" else [])
    return model, policy


def assert_alike(found, wanted, tolerance=1e-6):
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


EVERY = [
    *(("grpo", {"loss": name}) for name in LOSSES),
    ("grpo", {"loss": "gspo", "clip_low": 0.2, "clip_high": 0.2, "beta": 0.1}),
    ("grpo", {"beta": 0.1, "entropy_bonus": 0.01, "dual_clip": 2.0, "temperature": 0.7}),
    ("grpo", {"beta": 0.1, "kl": "in_reward", "scale_advantages": "batch"}),
    ("rloo", {}),
    ("ppo", {}),
]  # fmt: skip
SHORT = short(EVERY, EVERY[6], EVERY[-1])
SHORTER = short(EVERY, EVERY[7])


# --------------------------------------------------------------------------------- exact facts


@pytest.mark.parametrize(("kind", "values"), SHORT, ids=str)
def test_a_step_is_the_same_however_it_is_cut_up_and_shared(kind, values):
    objective, settings = chosen(kind, **values)
    examples, (model, policy) = completions_of(), make(kind)
    columns, _ = objective.columns(scored_of(examples), settings)
    at_once, wanted = step(kind, model, policy, settings, batches_of(examples, columns, 8))
    assert any(gradient.any() for gradient in wanted)
    for size, processes in ((1, 1), (4, 2)):
        parts = batches_of(examples, columns, size, processes)
        means, found = step(kind, model, policy, settings, parts)
        assert means == pytest.approx(at_once, rel=1e-5, abs=1e-6)
        assert_alike(found, wanted)


@pytest.mark.parametrize(("kind", "values"), SHORTER, ids=str)
def test_a_masked_completion_changes_neither_numerator_nor_denominator(kind, values):
    objective, settings = chosen(kind, **values)
    examples, (model, policy) = completions_of(masked={2, 5}), make(kind)
    learned = examples.subset(np.array([0, 1, 3, 4, 6, 7]))
    learned = replace(learned, supervised=examples.supervised)
    columns, _ = objective.columns(scored_of(examples), settings)
    _, found = step(kind, model, policy, settings, batches_of(examples, columns, 4))
    _, wanted = step(kind, model, policy, settings, batches_of(learned, columns, 3))
    assert_alike(found, wanted)


@pytest.mark.parametrize("scale", short(["group", "batch", "none"], "group"))
def test_equal_rewards_give_no_gradient_at_all(scale):
    """Not even by rounding: the mean of eight 0.1 is not 0.1."""
    for kind, values in (("grpo", {"scale_advantages": scale}), ("rloo", {"beta": 0.0})):
        objective, settings = chosen(kind, **values)
        examples, (model, policy) = completions_of(), make(kind)
        scored = replace(scored_of(examples, groups=1), rewards=np.full(8, 0.1))
        columns, _ = objective.columns(scored, settings)
        _, gradients = step(kind, model, policy, settings, batches_of(examples, columns, 8))
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_constant_added_to_all_rewards_changes_nothing(scale):
    examples = completions_of()
    scored = scored_of(examples)
    scored = replace(scored, rewards=np.round(scored.rewards * 8) / 8)
    more = replace(scored, rewards=scored.rewards + 64)
    for kind, values in (("grpo", {"scale_advantages": scale}), ("rloo", {})):
        objective, settings = chosen(kind, **values)
        one, other = (objective.columns(each, settings)[0] for each in (scored, more))
        assert np.array_equal(one["advantages"], other["advantages"])


@pytest.mark.parametrize(("kind", "values"), SHORTER, ids=str)
def test_at_the_first_step_the_ratio_is_one_to_the_bit(kind, values):
    """Old log-probabilities come from the same micro-batches, at the same temperature."""
    objective, settings = chosen(kind, **values)
    examples, (model, policy) = completions_of(), make(kind)
    scored = scored_of(examples)
    place = {"place": np.arange(len(scored.old_logprobs))}
    old = np.zeros(len(scored.old_logprobs), np.float32)
    model.train()
    for batch in batches_of(examples, place, 3)[0]:
        with torch.no_grad():
            answers = policy(batch, {"logprobs"}, temperature=settings.rollouts.temperature)
        old[batch.token_columns["place"].long().numpy()] = answers.logprobs.numpy()
    columns, _ = objective.columns(replace(scored, old_logprobs=old), settings)
    parts = batches_of(examples, columns, 3)
    ratios = []
    for batch in parts[0]:
        terms = {t.name: t for t in objective.loss(policy, batch, settings, {})}
        ratios.append(float(terms["ratio"].sum) == len(batch.labels))
        assert not terms["clip_share_low"].sum + terms["clip_share_high"].sum
    assert all(ratios)


def test_a_step_divides_by_its_own_tokens_not_by_those_of_the_phase():
    """TRL's dapo divides by the mean of the steps of a generation; by hand, for two steps."""
    objective, settings = chosen(loss="dapo")
    examples, (model, policy) = completions_of(), make("grpo")
    columns, _ = objective.columns(scored_of(examples), settings)
    lengths, ends = scored_of(examples).lengths, scored_of(examples).ends
    assert lengths[:4].sum() != lengths[4:].sum()
    for chosen_ones, part in ((range(4), slice(0, ends[3])), (range(4, 8), slice(ends[3], None))):
        half = examples.subset(np.array(chosen_ones))
        span = slice(half.input.starts[0], half.input.ends[-1])
        half = replace(
            half, streams={"input": Ragged(
                half.input.ids[span], half.input.starts - span.start, half.input.ends - span.start
            )}, supervised=half.supervised[span],
        )  # fmt: skip
        own = {name: values[part] for name, values in columns.items()}
        means, _ = step("grpo", model, policy, settings, batches_of(half, own, 4))
        (batch,) = batches_of(half, own, 4)[0]
        with torch.no_grad():
            ratio = (
                policy(batch, {"logprobs"}).logprobs - batch.token_columns["old_logprobs"]
            ).exp()
        gain = batch.token_columns["advantages"]
        wanted = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.28) * gain).sum() / len(gain)
        assert means["loss"] == pytest.approx(float(wanted), rel=1e-6)


# ----------------------------------------------------------------------------------- beside TRL

BY_TRL = [
    ("grpo", {}, {}),
    ("dr_grpo", {}, {}),
    ("bnpo", {}, {}),
    ("dapo", {}, {"epsilon_high": 0.28}),
    ("gspo", {}, {"loss_type": "grpo", "importance_sampling_level": "sequence",
                  "epsilon": 3e-4, "epsilon_high": 4e-4}),
    ("cispo", {}, {"epsilon_high": 5.0}),
    ("grpo", {"beta": 0.1}, {"beta": 0.1}),
    ("dapo", {"beta": 0.1, "clip_high": 0.2}, {"beta": 0.1}),
    ("dr_grpo", {"dual_clip": 1.5}, {"delta": 1.5}),
    ("bnpo", {"entropy_bonus": 0.05}, {"entropy_coef": 0.05}),
    ("grpo", {"temperature": 0.7}, {"temperature": 0.7}),
    ("dapo", {"clip_high": 0.2, "sampler_correction": "token"}, {}),
    ("grpo", {"sampler_correction": "sequence"}, {}),
]  # fmt: skip


def our_step(kind, own):
    """(model, examples, scored, means, gradients) of one step over all completions at once."""
    examples, (model, policy) = completions_of(), make(kind)
    scored = scored_of(examples)
    columns, _ = KINDS[kind][0].columns(scored, own)
    found = step(kind, model, policy, own, batches_of(examples, columns, 8))
    return model, examples, scored, *found


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("loss", "values", "theirs"), BY_TRL, ids=str)
def test_losses_and_gradients_equal_trls(tmp_path, loss, values, theirs):
    """Of one batch, in float32. The bonus and dapo: TRL divides by tokens of this batch alone."""
    trl = pytest.importorskip("trl")
    settings = {"sampler_correction": "none", "loss": loss, **values}
    arguments = trl.GRPOConfig(
        max_completion_length=10, num_generations=4, steps_per_generation=1,
        **_of_trl(tmp_path), **{"loss_type": loss, **theirs, "beta": 0.0},
    )  # fmt: skip
    _, own = chosen(**settings)
    model, examples, scored, means, gradients = our_step("grpo", own)
    trainer = trl.GRPOTrainer(
        as_trl_wants(model), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments, **_rows(),
    )  # fmt: skip
    trainer.beta = theirs.get("beta", 0.0)  # set here, it asks for no second model by a path
    inputs = padded(examples, scored)
    ahead = inputs["old_per_token_logps"] - inputs.pop("sampling_per_token_logps")
    if own.sampler_correction != "none":
        trainer.use_vllm = True
        weights = (ahead * inputs["completion_mask"]).sum(-1, keepdim=True).exp()
        weights = torch.where(weights > 3, 0, weights)
        is_token = own.sampler_correction == "token"
        inputs["importance_sampling_ratio"] = ahead.exp().clamp(max=3) if is_token else weights
    in_groups = torch.from_numpy(scored.rewards).view(2, 4)
    gain = in_groups - in_groups.mean(1, keepdim=True)
    gain = gain if loss == "dr_grpo" else gain / (in_groups.std(1, keepdim=True) + 1e-4)
    _compare(trainer, {**inputs, "advantages": gain.flatten().float()}, means, gradients)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_equals_trls(tmp_path, beta):
    trl = pytest.importorskip("trl")
    arguments = trl.RLOOConfig(
        max_completion_length=10, num_generations=4, beta=0.0, **_of_trl(tmp_path)
    )
    _, own = chosen("rloo", beta=beta, sampler_correction="none")
    model, examples, scored, means, gradients = our_step("rloo", own)
    trainer = trl.RLOOTrainer(
        as_trl_wants(model), reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments, **_rows(),
    )  # fmt: skip
    inputs = padded(examples, scored)
    old = inputs["old_per_token_logps"] * inputs["completion_mask"]
    gap = inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]
    rewards = torch.from_numpy(scored.rewards) - beta * (gap * inputs["completion_mask"]).sum(1)
    rewards = rewards.view(2, 4)
    gain = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    inputs |= {"old_logps": old.sum(1), "advantages": gain.flatten().float()}
    _compare(trainer, inputs, means, gradients)


def _of_trl(folder):
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, "per_device_train_batch_size": 8,
    }  # fmt: skip


def _rows():
    from datasets import Dataset

    from finetune.models.load import bytes_tokenizer

    rows = Dataset.from_list([{"prompt": "a"}] * 8)
    return {"train_dataset": rows, "processing_class": bytes_tokenizer()}


def _compare(trainer, inputs, means, gradients):
    trainer.model.zero_grad()
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert means["whole"] == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    assert_alike(gradients, [p.grad for p in trainer.model.parameters()])


def padded(examples, scored):
    """The same as TRL has it: prompts padded on the left, completions on the right."""
    spans = [examples.input.span(number) for number in range(len(examples))]
    learns = [examples.supervised[span] for span in spans]
    ids = [torch.from_numpy(examples.input.ids[span].astype(int)) for span in spans]

    def side(parts, left):
        longest = max(map(len, parts))
        rows = [torch.nn.functional.pad(p, (longest - len(p), 0) if left else (0, longest - len(p)))
                for p in parts]  # fmt: skip
        return torch.stack(rows)

    prompts = [each[~torch.from_numpy(learn)] for each, learn in zip(ids, learns)]
    answers = [each[torch.from_numpy(learn)] for each, learn in zip(ids, learns)]
    found = {
        "prompt_ids": side(prompts, True), "completion_ids": side(answers, False),
        "prompt_mask": side([torch.ones_like(each) for each in prompts], True),
        "completion_mask": side([torch.ones_like(each) for each in answers], False),
        "num_items_in_batch": torch.tensor(sum(map(len, answers))),
    }  # fmt: skip
    numbers = {"old": scored.old_logprobs, "ref": scored.reference,
               "sampling": scored.sampler_logprobs}  # fmt: skip
    for name, values in numbers.items():
        parts = np.split(values, scored.ends[:-1])
        found[f"{name}_per_token_logps"] = side([torch.from_numpy(each) for each in parts], False)
    return found


# -------------------------------------------------------------------------- by enumeration


class Table(Policy):
    """Log-probabilities of tokens by what came before them: a row of logits for each beginning."""

    def __init__(self, logits, sequences):
        """`sequences` int64 [D, T]: all that a batch holds; logits float64 [beginnings, V]."""
        super().__init__(model=None)
        size = logits.shape[1]
        beginning = torch.zeros(sequences.shape, dtype=torch.long)
        for place in range(1, sequences.shape[1]):
            # The empty beginning is 0; that of token t after beginning b is 1 + b * V + t.
            beginning[:, place] = 1 + beginning[:, place - 1] * size + sequences[:, place - 1]
        self.logits, self.where = logits, (beginning.flatten(), sequences.flatten())

    def logprobs(self):
        return self.logits.log_softmax(-1)[self.where]

    def __call__(self, batch, want, **more):
        return Answers(logprobs=self.logprobs(), entropy=torch.zeros(len(batch.labels)))


def documents(count, length, **columns):
    """A batch of completions of one length, with columns of their tokens."""
    number = torch.arange(count)
    return SimpleNamespace(
        labels=torch.zeros(count * length, dtype=torch.long), num_documents=count, group=None,
        document=number.repeat_interleave(length), token_columns=columns,
    )  # fmt: skip


def gradient_of(objective, settings, policy, batch):
    """The gradient of the loss of a step that has this batch alone."""
    policy.logits.grad = None
    prepared = objective.prepare(policy, [batch], settings)
    terms = objective.loss(policy, batch, settings, prepared)
    total(terms, {"tokens": len(batch.labels), **prepared}).backward()
    return policy.logits.grad.clone()


@pytest.mark.parametrize(
    ("kind", "values"), [("rloo", {"beta": 0.0}), ("grpo", {"loss": "dr_grpo"})], ids=str
)
def test_the_mean_gradient_over_all_groups_is_that_of_the_expected_reward(kind, values):
    """All pairs of sequences of three tokens out of three, each as likely as the policy has it.

    The mean of the group holds a half of each completion's own reward, so that grpo's gradient
    without a scale is (G - 1) / G of the true one (Liu et al., 2025); rloo's is the true one.
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(13, 3, generator=random, dtype=torch.float64).requires_grad_()
    all_sequences = torch.tensor(list(itertools.product(range(3), repeat=3)))
    reward = torch.randn(27, generator=random, dtype=torch.float64)
    chance = Table(logits, all_sequences).logprobs().view(27, 3).sum(1).exp()
    (-(chance * reward).sum()).backward()
    wanted = logits.grad.clone()

    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27)).flatten()
    policy = Table(logits, all_sequences[pairs])
    objective, settings = chosen(kind, **values)
    groups = np.arange(len(pairs)) // 2
    old = policy.logprobs().detach().numpy()
    scored = Scored(
        reward[pairs].numpy(), groups, 3 * np.arange(1, len(pairs) + 1),
        np.zeros(len(pairs), bool), old,
    )  # fmt: skip
    of_tokens, _ = objective.advantages(scored, settings)
    likely = chance.detach()[pairs].view(-1, 2).prod(1).repeat_interleave(6) * 729
    columns = {
        "advantages": torch.from_numpy(of_tokens) * likely,
        "old_logprobs": torch.tensor(old),
    }
    found = gradient_of(objective, settings, policy, documents(len(pairs), 3, **columns))
    if kind == "grpo":  # divides by 10 tokens at most, in place of 1, and by the group
        found = found * 10 * 2
    assert (found - wanted).abs().max() < 1e-12


COUNTS = torch.tensor([1, 2, 3, 4, 6])  # how often a bandit of five arms pulls each
OTHERS = torch.tensor([0.3, 0.1, 0.25, 0.15, 0.2], dtype=torch.float64).log()  # the reference


def bandit(beta, kl):
    """(exact gradient of beta KL, gradient of the objective over the exact distribution, terms)."""
    logits = COUNTS.double().log()[None].requires_grad_()
    log_p = logits[0].log_softmax(0)
    exact = beta * (log_p.exp() * (log_p - OTHERS)).sum()
    exact.backward()
    wanted = logits.grad.clone()
    arms = torch.arange(5).repeat_interleave(COUNTS)
    policy = Table(logits, arms[:, None])
    objective, settings = chosen(beta=beta, kl=kl, scale_advantages="none", loss="grpo")
    old = policy.logprobs().detach()
    reference = OTHERS[arms]
    scored = Scored(
        np.zeros(16), np.zeros(16, int), np.arange(1, 17), np.zeros(16, bool), old.numpy(), None,
        reference.numpy(),
    )  # fmt: skip
    of_tokens, _ = objective.advantages(scored, settings)
    columns = {"advantages": torch.tensor(of_tokens), "old_logprobs": old, "reference": reference}
    batch = documents(16, 1, **columns)
    found = objective.loss(policy, batch, settings, {})
    terms = {term.name: float(term.sum.detach()) / 16 for term in found}
    return (
        float(exact.detach()) / beta,
        wanted,
        gradient_of(objective, settings, policy, batch),
        terms,
        policy,
    )


@pytest.mark.parametrize("kl", ["in_loss", "in_reward"])
def test_both_ways_to_stay_near_the_reference_have_the_gradient_of_the_divergence(kl):
    exact, wanted, found, terms, _ = bandit(0.3, kl)
    assert (found - wanted).abs().max() < 1e-15
    assert terms["kl"] == pytest.approx(exact, abs=1e-15), "k3 is unbiased"


def test_estimators_in_the_loss_without_the_ratio_have_other_gradients():
    """Schulman's k1, k2, k3: why the loss offers none of them as it is."""
    _, wanted, _, _, policy = bandit(1.0, "in_loss")
    cases = {}
    for name in ("k1", "k2", "k3"):
        for with_ratio in (False, True):
            log_p = policy.logprobs()
            ahead = OTHERS[policy.where[1]] - log_p
            k = {"k1": -ahead, "k2": ahead.square() / 2, "k3": ahead.exp() - ahead - 1}[name]
            ratio = (log_p - log_p.detach()).exp() if with_ratio else 1.0
            policy.logits.grad = None
            (ratio * k).mean().backward()
            gap = (policy.logits.grad - wanted).norm() / wanted.norm()
            cases[name, with_ratio] = float(gap)
    exact = {key for key, gap in cases.items() if gap < 1e-14}
    assert exact == {("k1", True), ("k2", False), ("k3", True)}
    assert cases["k1", False] == pytest.approx(1), "no signal at all"
    assert min(cases["k2", True], cases["k3", False]) > 0.1


@pytest.mark.parametrize("kl", ["in_loss", "in_reward"])
def test_the_optimum_is_the_tilted_reference(kl):
    """pi = pi_ref exp(r / beta) / Z, by steps along the natural gradient of a bandit."""
    beta, random = 0.4, torch.Generator().manual_seed(1)
    reward = torch.randn(5, generator=random, dtype=torch.float64)
    logits = torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    objective, settings = chosen(beta=beta, kl=kl, scale_advantages="none", loss="grpo")
    for _ in range(8):
        policy = Table(logits, torch.arange(5)[:, None])
        old = policy.logprobs().detach()
        scored = Scored(
            reward.numpy(), np.zeros(5, int), np.arange(1, 6), np.zeros(5, bool), old.numpy(),
            None, OTHERS.numpy(),
        )  # fmt: skip
        columns = {"old_logprobs": old, "reference": OTHERS}
        # Each arm weighs as much as the policy pulls it, also in the part of the divergence.
        columns["advantages"] = torch.tensor(objective.rewards(scored, settings))
        policy.logits.grad = None
        prepared = objective.prepare(policy, [documents(5, 1, **columns)], settings)
        for arm in range(5):
            one = {name: values[arm : arm + 1] for name, values in columns.items()}
            alone = Table(logits, torch.tensor([[arm]]))
            terms = objective.loss(alone, documents(1, 1, **one), settings, prepared)
            (old[arm].exp() * total(terms, {"tokens": 1, "completions": 1})).backward()
        with torch.no_grad():
            logits -= logits.grad / old.exp() / beta
            logits.grad = None
    wanted = (OTHERS + reward / beta).log_softmax(0)
    assert (logits[0].log_softmax(0) - wanted).abs().max() < 1e-8


# ------------------------------------------------------------------------------- advantages


def test_generalised_advantages_have_the_known_limits():
    random, ends = np.random.default_rng(0), np.array([3, 4, 9])
    rewards, values = random.standard_normal((2, 9))
    for gamma in (1.0, 0.9):
        whole, returns = advantages.generalised(rewards, values, ends, gamma, 1.0)
        near, _ = advantages.generalised(rewards, values, ends, gamma, 0.0)
        for start, end in ((0, 3), (3, 4), (4, 9)):
            for at in range(start, end):
                later = np.arange(at, end)
                summed = (gamma ** (later - at) * rewards[later]).sum()
                assert abs(whole[at] - (summed - values[at])) < 1e-12
                assert abs(returns[at] - summed) < 1e-12
                following = values[at + 1] if at + 1 < end else 0.0
                assert abs(near[at] - (rewards[at] + gamma * following - values[at])) < 1e-12


def test_advantages_by_hand():
    rewards, groups = np.array([1.0, 0, 0, 0, 5, 7]), np.array([3, 3, 3, 3, 9, 9])
    centred = np.array([0.75, -0.25, -0.25, -0.25, -1, 1])
    found = advantages.beside_group(rewards, groups, "none")
    assert found == pytest.approx(centred, abs=1e-15)
    found = advantages.beside_group(rewards, groups, "group")
    assert found == pytest.approx(centred / np.array([*[0.5001] * 4, *[2**0.5 + 1e-4] * 2]))
    found = advantages.beside_group(rewards, groups, "batch")
    assert found == pytest.approx(centred / (rewards.std(ddof=1) + 1e-4))
    found = advantages.beside_others(rewards, groups)
    assert found == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, -2, 2])
    assert advantages.beside_others(rewards[:1], groups[:1]) == 0, "nothing to compare with"


def test_completions_of_another_distribution_count_less():
    old = np.log(np.array([0.5, 0.4, 0.9, 0.3], np.float32))
    sampler = np.log(np.array([0.5, 0.1, 0.45, 0.4], np.float32))
    scored = Scored(
        np.zeros(2), np.zeros(2, int), np.array([2, 4]), np.zeros(2, bool), old, sampler
    )
    found = advantages.sampler_weights(scored, "token", 3.0)
    assert found == pytest.approx([1, 3, 2, 0.75])
    found = advantages.sampler_weights(scored, "sequence", 3.0)
    assert found == pytest.approx([0, 0, 1.5, 1.5]), "a ratio of 4 is beyond the cap"
    assert (advantages.sampler_weights(scored, "none", 3.0) == 1).all()


@pytest.mark.parametrize(
    ("length", "of_completions", "dropped"),
    [(64, 0.949, 0.0), (512, 0.73, 0.007), (4096, 0.28, 0.07)],
)
def test_roundings_of_long_completions_leave_few_of_them_by_sequence(
    length, of_completions, dropped
):
    """Log-ratios of 0.03 nats, as 16 bits have: how many of 300 count, (sum w)^2 / sum w^2."""
    ahead = np.random.default_rng(length).normal(-(0.03**2) / 2, 0.03, 300 * length)
    scored = Scored(
        np.zeros(300), np.zeros(300, int), np.arange(1, 301) * length, np.zeros(300, bool),
        ahead.astype(np.float32), np.zeros(300 * length, np.float32),
    )  # fmt: skip
    weights = {how: advantages.sampler_weights(scored, how, 3.0) for how in ("sequence", "token")}
    count = {how: each.sum() ** 2 / (each**2).sum() / len(each) for how, each in weights.items()}
    assert count["token"] > 0.998
    assert count["sequence"] == pytest.approx(of_completions, abs=0.1)
    assert (weights["sequence"] == 0).mean() == pytest.approx(dropped, abs=0.04)


def test_ppo_gives_the_reward_at_the_end_and_the_divergence_at_each_token():
    objective, settings = chosen("ppo", beta=0.5, gae_lambda=1.0)
    zeros = np.zeros(3, np.float32)
    scored = Scored(
        np.array([2.0, -1.0]), np.arange(2), np.array([2, 3]), np.zeros(2, bool),
        np.array([-1, -2, -3], np.float32), None, np.array([-2, -2, -1], np.float32), zeros,
    )  # fmt: skip
    columns, facts = objective.columns(scored, settings)
    assert columns["returns"] == pytest.approx([1.5, 2.0, 0.0])
    assert columns["advantages"].mean() == pytest.approx(0, abs=1e-7)
    assert columns["advantages"].std(ddof=1) == pytest.approx(1, rel=1e-3)
    assert facts["reward_std"] == 1.5
    assert facts["explained_variance"] == 0, "values of 0 know nothing"


@pytest.mark.proof
def test_a_value_head_learns_known_returns():
    objective, settings = chosen("ppo", value_clip=10.0, value_weight=1.0)
    examples, (model, policy) = completions_of(), make("ppo")
    columns, _ = objective.columns(scored_of(examples), settings)
    columns = {**columns, "advantages": 0 * columns["advantages"]}
    batches = batches_of(examples, columns, 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    errors = []
    for _ in range(80):
        means, _ = step("ppo", model, policy, settings, batches)
        errors.append(means["value_loss"])
        optimizer.step()
    assert errors[-1] < 0.05 * errors[0]


def test_values_learn_the_returns_and_move_no_further_than_the_clip():
    objective, settings = chosen("ppo", value_clip=0.5, value_weight=1.0)
    columns = {"old_values": torch.full((4,), 0.1), "returns": torch.tensor([1.0, 1, 1, -1])}
    values = torch.tensor([0.2, 0.7, 1.2, 0.7], requires_grad=True)
    (term,) = objective.further_terms(
        Answers(values=values), SimpleNamespace(token_columns=columns), settings
    )
    term.sum.backward()
    assert values.grad.tolist() == pytest.approx([-0.8, 0, 0, 1.7], abs=1e-6)


# ------------------------------------------------------------------------------ running away


def test_limits_of_divergence_and_entropy_say_why_a_run_ends():
    objective, settings = chosen(stop_kl=0.5, stop_entropy=[0.1, 4.0])
    assert objective.wants_reference(settings), "without a weight of the divergence, too"
    assert not objective.runs_away({}, settings)
    assert not objective.runs_away({"kl": 0.5, "entropy": 4.0}, settings)
    why = objective.runs_away({"kl": 0.625, "entropy": 1.0}, settings)
    assert why == "kl is 0.625, above objective.stop_kl: 0.5"
    why = objective.runs_away({"kl": 0.0, "entropy": 0.05}, settings)
    assert why == "entropy is 0.05, outside objective.stop_entropy: [0.1, 4]"


def test_a_run_that_runs_away_ends_early_also_after_a_resume(workshop, monkeypatch):
    """A step decides, also one that tracking leaves out; the first attempt fails at its export."""
    (workshop.folder / "high.py").write_text(
        "from finetune.objectives import Objective, Term\n\n\n"
        "class High(Objective):\n"
        "    def loss(self, policy, batch, settings, prepared):\n"
        "        return [Term('loss', policy(batch, {'nll'}).nll, per='tokens')]\n\n"
        "    def runs_away(self, terms, settings):\n"
        "        return 'it is high' if terms.get('loss', 0.0) > 1 else ''\n"
    )
    own = {"objective__kind": f"{workshop.folder}/high.py:High", "tracking__log_every_steps": 4}
    with monkeypatch.context() as broken:
        broken.setattr("finetune.loop.finish", lambda run, untrained: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            workshop.train("run", **own)
    run = workshop.train("run", **own)
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1]
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["state"] == "complete"
    assert outcome["reason"].startswith(
        "stopped early, of 5 steps, because it is high; the last weights, of step 1"
    )


# ----------------------------------------------------------------------------------------- runs


def test_the_value_head_learns_and_is_left_out_of_the_export(workshop):
    run = workshop.train(**sampled.settings(workshop, "ppo", train__max_steps=2))
    lines = read_jsonl(run / "metrics.jsonl")
    assert [line["ratio"] for line in lines] == [1, 1]
    assert lines[0]["explained_variance"] == 0 != lines[1]["explained_variance"]
    assert "value_head.weight" not in weights(run)


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["rloo", "ppo"])
def test_rewards_rise(workshop, kind):
    more = {"optimizer__lr": 3e-2, "schedule__kind": "constant", "objective__beta": 0.0}
    run = workshop.train(**sampled.settings(workshop, kind, train__max_steps=12, **more))
    rewards = [line["reward"] for line in read_jsonl(run / "metrics.jsonl")]
    assert sum(rewards[-3:]) > 1.25 * sum(rewards[:3])


def weights(run):
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.proof
def test_a_resumed_run_has_the_values_and_the_head_of_the_whole(workshop):
    """Cut inside a phase of two steps, and learned from twice."""
    own = sampled.settings(
        workshop, "ppo", rollouts={"steps_per_phase": 2, "passes": 2}, checkpoint__every_steps=1,
        checkpoint__keep_last=9,
    )  # fmt: skip
    names = ("loss", "grad_norm", "value_loss", "kl", "reward", "explained_variance")

    def seen(run):
        return [[line[name] for name in names] for line in read_jsonl(run / "metrics.jsonl")]

    whole = workshop.train("whole", **own)
    workshop.train("cut", **own)
    cut_at(workshop, 1)
    again = workshop.train("cut", **own)
    assert seen(again) == seen(whole)
    one, other = weights(again), weights(whole)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["grpo", "rloo", "ppo"])
@pytest.mark.parametrize("topologies", [("ddp", "fsdp2", "zero3"), ("fsdp2_context",)], ids=str)
def test_several_processes_and_passes_learn_the_same(workshop, kind, topologies):
    """The sum of a surrogate is near 0, where rounding is all of it: its gradient counts."""
    own = {
        "train__max_steps": 4, "train__micro_batch_size": 2, "optimizer__lr": 1e-3,
        "rollouts": {"steps_per_phase": 2, "passes": 2},
    }  # fmt: skip
    alone = workshop.train("alone", **sampled.settings(workshop, kind, **own))
    arguments, runs = [], []
    for topology in topologies:
        config = workshop.config(topology, **sampled.settings(workshop, kind, **own))
        arguments += [f"topology:{topology}"] if len(topologies) > 1 else []
        arguments.append(workshop.write(config))
        runs.append(workshop.run_dir(topology))
    processes = 2 if len(topologies) > 1 else 4
    launched = several(workshop.folder, topologies[0], processes, *arguments)
    assert launched.codes() == [0] * processes, launched.output()
    names = ("grad_norm", "entropy", "ratio", "reward", "clip_share_high", "kl", "value_loss")
    for run in runs:
        for one, other in zip(*(read_jsonl(each / "metrics.jsonl") for each in (run, alone))):
            for name in names:
                assert (name in one) == (name in other)
                assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-3, abs=1e-6)
        one, other = (weights(each) for each in (run, alone))
        assert all((one[key] - other[key]).abs().max() < 1e-5 for key in one)


@pytest.mark.parametrize(
    ("kind", "values", "says"),
    [
        ("grpo", {"rollouts": {"group_size": 1}}, "group_size: 1 completion has no others"),
        ("rloo", {"rollouts": {"group_size": 1}}, "group_size: 1 completion has no others"),
        ("grpo", {"objective__kl": "in_reward"}, "objective.kl: would be ignored"),
        ("grpo", {"objective__loss": "cispo", "objective__dual_clip": 3.0}, "cispo caps every"),
        (
            "ppo",
            {"objective__sampler_correction": "none", "objective__sampler_cap": 2.0},
            "_cap: w",
        ),
        ("ppo", {"objective__stop_entropy": [3.0, 1.0]}, "give the lower limit first"),
        ("grpo", {"optimizer__head_lr": 1e-3}, "optimizer.head_lr: would be ignored"),
        ("ppo", {"objective__kl": "in_loss"}, "objective.kind is ppo; it belongs to grpo"),
    ],
)
def test_settings_that_do_not_fit_are_errors(workshop, kind, values, says):
    with pytest.raises(ConfigError, match=says):
        configs.from_dict(workshop.config(**sampled.settings(workshop, kind, **values)))


def test_a_value_head_has_a_rate_of_its_own_and_one_completion_of_a_prompt_is_enough(workshop):
    own = sampled.settings(workshop, "ppo", optimizer__head_lr=1e-3, rollouts={"group_size": 1})
    config = configs.from_dict(workshop.config(**own))
    assert (config.optimizer.head_lr, config.objective.rollouts.group_size) == (1e-3, 1)
