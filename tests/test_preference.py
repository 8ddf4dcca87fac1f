"""Preference tuning: losses as their papers have them, a reference that is the start of the run."""

import math
import shutil
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, read_jsonl, short, write_jsonl
from fsspec.implementations.memory import MemoryFileSystem
from invariants import families
from test_head import Largest

from finetune import config as configs
from finetune.data.batches import Batches
from finetune.data.examples import Examples, Ragged
from finetune.data.order import Sequences
from finetune.engine.reference import FILE
from finetune.errors import ConfigError, DataError, RunDirectoryError
from finetune.evaluation import held_out
from finetune.evaluation.trained_run import TrainedRun
from finetune.models import attention, cross_entropy, head, scalar_heads
from finetune.models.policy import Policy
from finetune.objectives import OBJECTIVES
from finetune.objectives.base import total
from finetune.objectives.preference import DIVERGENCES, LOSSES, FallingTogether

pytestmark = pytest.mark.slow

KINDS = ("dpo", "orpo", "simpo", "cpo")


def settings(workshop, kind="dpo", **more):
    """The settings of a run on pairs."""
    rows = write_jsonl(workshop.folder / "pairs.jsonl", families.preferences())
    return {
        "data__train": str(rows), "objective__kind": kind, "optimizer__lr": 1e-3,
        "model__config": TINY_LLAMA, **more,
    }  # fmt: skip


# ------------------------------------------------------------------------------------ formulas


def policy_of(seed, heads=(), vocabulary=64):
    """A tiny Llama in float32 that answers as in training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {**TINY_LLAMA, "vocab_size": vocabulary}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.DOCUMENTS)
    scalar_heads.attach(model, heads)
    head.install(model)
    return model, Policy(model)


def pairs_of(count=6):
    """Prompts with a chosen and a rejected answer of other lengths, as tokens, in one pack."""
    random, parts, supervised, labels = np.random.default_rng(0), [], [], []
    for _ in range(count):
        prompt = random.integers(1, 60, random.integers(2, 6))
        for label in (1, 0):
            answer = random.integers(1, 60, random.integers(1, 9))
            parts.append(np.concatenate([prompt, answer]).astype(np.int32))
            supervised.append(np.arange(len(parts[-1])) >= len(prompt))
            labels.append(label)
    ends = np.cumsum([len(each) for each in parts])
    stream = Ragged(np.concatenate(parts), np.concatenate([[0], ends[:-1]]), ends)
    number = np.arange(count)
    return Examples(
        {"input": stream}, np.concatenate(supervised), number * 0, number, number, ["pairs"], "",
        count, 0, 0, example_ends=2 * (number + 1), columns={"label": np.array(labels, np.float32)},
    )  # fmt: skip


def batch_of(examples, view=None, columns=None):
    from dataclasses import replace

    examples = replace(examples, token_columns=columns or {}, **({"view": view} if view else {}))
    sequences = Sequences(examples, True, 1024, seed=0)
    return Batches(sequences, seed=0, global_batch_size=1, micro_batch_size=1).at(0)[0]


def ours(kind, settings, examples, model, policy, reference):
    """Return the loss of one pack, and the gradient of the embedding."""
    objective = OBJECTIVES[kind]
    view = objective.view(settings, None)
    place = {"place": np.arange(len(examples.input.ids))}
    column = np.zeros(len(examples.input.ids), np.float32)
    with torch.no_grad():
        numbered = batch_of(examples, columns=place)
        found = reference(numbered, {"logprobs"}).logprobs
        column[numbered.token_columns["place"].numpy()] = found.numpy()
    batch = batch_of(examples, view, {"reference": column})
    model.zero_grad()
    with torch.no_grad():
        prepared = objective.prepare(policy, [batch], settings)
    terms = objective.loss(policy, batch, settings, prepared)
    loss = total(terms, {**batch.counts, **prepared})
    loss.backward()
    return float(loss.detach()), model.get_input_embeddings().weight.grad.clone()


def chosen_settings(kind, **values):
    return OBJECTIVES[kind].Settings(kind=kind, **values)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_a_pair_without_a_change_has_the_loss_of_its_formula(loss):
    """At the reference both log-ratios are 0: the value by hand."""
    e = 0.1
    wanted = {
        "sigmoid": math.log(2), "hinge": 1.0, "ipo": (1 / (2 * 0.5)) ** 2, "robust": math.log(2),
        "sigmoid_norm": math.log(2),
        "exo_pair": 0.5 * (math.log(0.5 / (1 - e)) + math.log(0.5 / e)),
        "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 2 * (0.5 / 0.5) ** 2,
        "apo_zero": 1.0, "apo_down": 1.0, "discopop": 0.5 * math.log(2) + 0.5,
    }  # fmt: skip
    values = chosen_settings("dpo", beta=0.5, swap_probability=e)
    zero = torch.zeros(1, dtype=torch.float64)
    assert LOSSES[loss].of(zero, zero, values).item() == pytest.approx(wanted[loss], abs=1e-12)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "sppo_hard"])
def test_a_larger_lead_has_a_smaller_loss(loss):
    values = chosen_settings("dpo", beta=0.1, swap_probability=0.1)
    far, near = (
        LOSSES[loss].of(torch.tensor([lead]), torch.tensor([-lead]), values).item()
        for lead in (1.0, 0.5)
    )
    assert far < near


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_divergences_agree_near_the_reference(name):
    """f'' of each is 1 at a ratio of 1, but 1/2 for Jensen and Shannon's."""
    small = torch.tensor([1e-4], dtype=torch.float64)
    slope = DIVERGENCES[name](small, 0.5) / small
    assert slope.item() == pytest.approx(0.5 if name == "js_divergence" else 1, abs=1e-3)


def test_the_optimum_of_dpo_is_the_tilted_reference():
    """pi = pi_ref exp(r / beta) / Z, for preferences by Bradley and Terry of rewards r."""
    beta, random = 0.7, torch.Generator().manual_seed(0)
    reward = torch.randn(5, generator=random, dtype=torch.float64)
    reference = torch.randn(5, generator=random, dtype=torch.float64).log_softmax(0)
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    prefers = (reward[:, None] - reward[None]).sigmoid()
    values = chosen_settings("dpo", beta=beta)

    def loss():
        ratio = logits.log_softmax(0) - reference
        pair = LOSSES["sigmoid"].of(ratio[:, None], ratio[None], values)
        return (prefers * pair).sum()

    _minimise(logits, loss)
    wanted = (reference + reward / beta).log_softmax(0)
    assert torch.allclose(logits.log_softmax(0), wanted, atol=1e-8)


def test_the_optimum_of_ipo_leads_by_half_of_one_over_beta():
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    values = chosen_settings("dpo", beta=0.4)
    _minimise(logits, lambda: LOSSES["ipo"].of(logits[:1], logits[1:], values).sum())
    assert (logits[0] - logits[1]).item() == pytest.approx(1 / (2 * 0.4), abs=1e-8)


def _minimise(parameter, loss):
    """Newton's steps by LBFGS, until the gradient is gone."""
    exact = {"tolerance_grad": 1e-13, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([parameter], max_iter=500, line_search_fn="strong_wolfe", **exact)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


def test_one_pair_has_no_part_in_the_gradient_of_another():
    examples, (model, policy), (_, reference) = pairs_of(), policy_of(0), policy_of(1)
    values = chosen_settings("dpo")
    _, whole = ours("dpo", values, examples, model, policy, reference)
    parts = [
        ours("dpo", values, examples.subset(np.array(numbers)), model, policy, reference)[1]
        for numbers in ([0, 1, 2], [3, 4, 5])
    ]
    assert torch.allclose(whole, sum(parts) / 2, atol=1e-7)


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_no_tensor_holds_the_logits_of_a_micro_batch(monkeypatch, kind):
    """Nor does a chunk of them: of a vocabulary of 8192, the largest tensor is a weight."""
    size = 8192
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 16 * 4 * size)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 8 * 4 * size)
    examples = pairs_of(16)
    (model, policy), (_, reference) = (policy_of(seed, vocabulary=size) for seed in (0, 1))
    assert examples.supervised.sum() * size > 4 * 32 * size, "four times the largest weight"
    with Largest() as largest:
        ours(kind, chosen_settings(kind), examples, model, policy, reference)
    assert largest.numbers == 32 * size, "the gradient of the projection"


# ----------------------------------------------------------------------------------- beside TRL

BY_TRL = [
    *(("dpo", {"loss": name}) for name in LOSSES if name not in ("robust", "exo_pair")),
    ("dpo", {"loss": "robust", "swap_probability": 0.1}),
    ("dpo", {"loss": "exo_pair", "swap_probability": 0.001}),
    ("dpo", {"divergence": "forward_kl"}),
    ("dpo", {"divergence": "js_divergence"}),
    ("dpo", {"divergence": "alpha_divergence", "divergence_alpha": 0.4}),
    ("dpo", {"ld_alpha": 0.3}),
    ("dpo", {"sft_weight": 0.7}),
]


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "values"), BY_TRL, ids=str)
def test_losses_and_gradients_equal_trls(tmp_path, kind, values):
    """Of one batch, in float32. TRL pads: chosen answers first, then rejected ones."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from finetune.models.load import bytes_tokenizer

    examples, (model, policy), (frozen, reference) = pairs_of(), policy_of(0), policy_of(1)
    own, gradient = ours(kind, chosen_settings(kind, **values), examples, model, policy, reference)
    names = ["sigmoid"] if "sft_weight" in values else [values.get("loss", "sigmoid")]
    weights = None
    if "sft_weight" in values:
        names, weights = ["sigmoid", "sft"], [1.0, values["sft_weight"]]
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", loss_type=names, loss_weights=weights, beta=0.1,
        label_smoothing=values.get("swap_probability", 0.0), ld_alpha=values.get("ld_alpha"),
        f_divergence_type=values.get("divergence", "reverse_kl"),
        f_alpha_divergence_coef=values.get("divergence_alpha", 0.5), discopop_tau=0.05,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.DPOTrainer(
        as_trl_wants(model), as_trl_wants(frozen), args=arguments, train_dataset=rows,
        processing_class=bytes_tokenizer(),
    )  # fmt: skip
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, _padded(examples))
    loss.backward()
    assert own == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    theirs = trainer.model.get_input_embeddings().weight.grad
    assert (gradient - theirs).abs().max() < 1e-6 * max(1, theirs.abs().max())


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "values"),
    [("cpo", {"beta": 0.2}), ("simpo", {"beta": 2.0, "gamma": 0.7}), ("orpo", {"beta": 0.3})],
)
def test_objectives_without_a_reference_equal_trls(kind, values):
    """The part that compares; the cross-entropy beside it is of all chosen tokens of the step."""
    pytest.importorskip("trl")
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    examples, (_, policy) = pairs_of(), policy_of(0)
    batch, own = batch_of(examples), chosen_settings(kind, **values)
    with torch.no_grad():
        objective = OBJECTIVES[kind]
        prepared = objective.prepare(policy, [batch], own)
        loss, nll, *_ = objective.loss(policy, batch, own, prepared)
        logprobs = policy(batch, {"logprobs"}).logprobs
        sums = policy.per_document(logprobs, batch)
        lengths = policy.per_document(torch.ones_like(logprobs), batch)
    numbers = sums if kind == "cpo" else sums / lengths
    theirs = SimpleNamespace(
        beta=values["beta"], simpo_gamma=values.get("gamma"), alpha=0.0, label_smoothing=0.0,
        loss_type="simpo" if kind == "simpo" else "sigmoid",
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )  # fmt: skip
    compare, sign = (
        (ORPOTrainer.odds_ratio_loss, -1) if kind == "orpo" else (CPOTrainer.cpo_loss, 1)
    )
    wanted = sign * compare(theirs, numbers[::2], numbers[1::2])[0].sum()
    assert float(loss.sum) == pytest.approx(float(wanted), rel=1e-6)
    assert float(nll.sum / prepared["chosen_tokens"]) == pytest.approx(
        float(-sums[::2].sum() / lengths[::2].sum()), rel=1e-6
    )
    assert nll.weight == {"cpo": 1.0, "simpo": 0.0, "orpo": 1.0}[kind]


def as_trl_wants(model):
    """The same weights in a model that no forward of ours wraps."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_config(model.config, attn_implementation="sdpa")
    plain.load_state_dict(model.state_dict())
    return plain


def _padded(examples):
    order = [*range(0, 12, 2), *range(1, 12, 2)]
    spans = [examples.input.span(number) for number in order]
    longest = max(span.stop - span.start for span in spans)
    batch = {name: torch.zeros(12, longest, dtype=torch.long)
             for name in ("input_ids", "attention_mask", "completion_mask")}  # fmt: skip
    for row, span in enumerate(spans):
        length = span.stop - span.start
        batch["input_ids"][row, :length] = torch.from_numpy(examples.input.ids[span].astype(int))
        batch["attention_mask"][row, :length] = 1
        batch["completion_mask"][row, :length] = torch.from_numpy(examples.supervised[span])
    return batch


# ---------------------------------------------------------------------------------- the reference


def test_at_the_first_step_the_policy_is_its_reference(workshop):
    run = workshop.train(**settings(workshop), train__max_steps=3, evaluation__every_steps=1,
                         data__eval_fraction=0.2)  # fmt: skip
    first, *rest = read_jsonl(run / "metrics.jsonl")
    assert first["margin"] == 0, "the same micro-batches: to the bit"
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert rest[-1]["loss"] < first["loss"]
    assert read_jsonl(run / "eval.jsonl")[-1]["margin"] != 0
    assert (run / FILE).is_file()


def test_without_its_adapters_a_model_is_a_frozen_copy_of_its_base():
    """To the bit, with adapters that have moved; and it comes back as it was."""
    from peft import LoraConfig, get_peft_model

    model, frozen = policy_of(0)
    batch = batch_of(pairs_of())
    with torch.no_grad():
        wanted = frozen(batch, {"logprobs"}).logprobs
    shape = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy = Policy(get_peft_model(model, shape))
    with torch.no_grad():
        moved = policy(batch, {"logprobs"}).logprobs
        with policy.without_adapters():
            assert torch.equal(policy(batch, {"logprobs"}).logprobs, wanted)
        assert not torch.allclose(moved, wanted)
        assert torch.equal(policy(batch, {"logprobs"}).logprobs, moved)


def test_a_run_on_an_adapter_compares_with_that_adapter(workshop):
    """Not with the base under it: LLaMA-Factory's fault 8459."""
    base = workshop.train("base", model__config=TINY_LLAMA) / "model"
    lora = {"adapter__kind": "lora", "optimizer__lr": 1e-1}
    tuned = workshop.train("tuned", **pretrained(base, **lora)) / "model"
    own = settings(workshop) | pretrained(base) | {"adapter__kind": "lora"}
    run = workshop.train("run", **own, adapter__path=str(tuned))
    assert read_jsonl(run / "metrics.jsonl")[0]["margin"] == 0


def test_a_micro_batch_is_tried_before_there_is_a_reference(workshop):
    run = workshop.train(**settings(workshop), train__micro_batch_size="auto")
    assert read_jsonl(run / "metrics.jsonl")[0]["margin"] == 0


def cut_at(workshop, step, name="cut"):
    """Forget what a run did after a step."""
    run = workshop.run_dir(name)
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    (run / "outcome.json").unlink()
    return run


@pytest.mark.parametrize("lost", short([False, True], True))
def test_a_resumed_run_has_the_reference_of_its_start(workshop, lost):
    own = settings(workshop, checkpoint__every_steps=2, checkpoint__keep_last=9)
    whole = losses(workshop.train("whole", **own))
    workshop.train("cut", **own)
    run = cut_at(workshop, 2)
    if lost:
        (run / FILE).unlink()  # computed again, from the weights before the first step
    assert losses(workshop.train("cut", **own)) == whole
    assert (run / FILE).is_file()


class Lasting(MemoryFileSystem):
    """A store in memory under a name that a run takes."""

    protocol = "lasting"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("lasting://"))


def test_a_new_machine_fetches_the_reference(workshop, capsys):
    """The store has it beside the checkpoints; there it goes on where the lost machine was."""
    fsspec.register_implementation("lasting", Lasting, clobber=True)
    memory, url = fsspec.filesystem("lasting"), f"lasting:/{workshop.folder}/store"
    own = settings(workshop, checkpoint__every_steps=2, checkpoint__keep_last=9)
    whole = losses(workshop.train("whole", **own))
    run = workshop.train("cut", **own, checkpoint__storage=url)
    shutil.rmtree(run)
    stored = f"{workshop.folder}/store/cut"
    for name in ("outcome.json", "model", *(f"checkpoints/step-{n:08d}" for n in (4, 5))):
        memory.rm(f"{stored}/{name}", recursive=True)
    capsys.readouterr()
    assert losses(workshop.train("cut", **own, checkpoint__storage=url)) == whole
    assert "computing the log-probabilities" not in capsys.readouterr().out
    assert (run / FILE).read_bytes() == memory.cat(f"{stored}/{FILE}")


def test_a_damaged_reference_ends_the_run_and_says_what_to_do(workshop):
    own = settings(workshop, checkpoint__every_steps=2, checkpoint__keep_last=9)
    workshop.train("cut", **own)
    path = cut_at(workshop, 2) / FILE
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=f"{FILE} is damaged; remove it"):
        workshop.train("cut", **own)
    path.write_bytes(b"no file of safetensors")
    with pytest.raises(RunDirectoryError, match=f"{FILE} is damaged; remove it"):
        workshop.train("cut", **own)


def test_evaluate_reads_the_chosen_answers_of_the_rows_that_were_held_out(workshop):
    run = TrainedRun.open(str(workshop.train(**settings(workshop), data__eval_fraction=0.1)))
    prompts = held_out.read(run.held_out, run.reading)
    rows = {row["prompt"]: row["chosen"] for row in families.preferences()}
    assert len(prompts) == 4
    assert all(prompt.reference == rows[prompt.question] for prompt in prompts)


def test_an_objective_of_a_users_own_may_compare_with_the_reference(workshop):
    (workshop.folder / "near.py").write_text(
        "from finetune.objectives import Objective, Term\n\n\n"
        "class Near(Objective):\n"
        "    needs = {'reference'}\n\n"
        "    def loss(self, policy, batch, settings, prepared):\n"
        "        logprobs = policy(batch, {'logprobs'}).logprobs\n"
        "        moved = logprobs - batch.token_columns['reference']\n"
        "        return [Term('loss', -logprobs.sum(), per='tokens'),\n"
        "                Term('moved', moved.square().sum(), per='tokens', weight=0.1)]\n"
    )
    run = workshop.train(objective__kind=f"{workshop.folder}/near.py:Near")
    first, *_, last = read_jsonl(run / "metrics.jsonl")
    assert first["moved"] == 0 < last["moved"]


def test_the_log_says_once_that_both_answers_become_less_likely():
    remark, sinks = FallingTogether(window=2), iter(range(8))
    told = [
        remark({"chosen_logprobs": -10.0 - n, "rejected_logprobs": -10.0 - 3 * n, "margin": n})
        for n in sinks
    ]
    assert [bool(each) for each in told] == [False] * 3 + [True] + [False] * 4
    assert "chosen answers have become less likely (-10.5 -> -12.5 nats)" in told[3]
    rises = FallingTogether(window=2)
    assert not any(
        rises({"chosen_logprobs": float(n), "rejected_logprobs": -n, "margin": n}) for n in range(8)
    )


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"objective__loss": "robust"}, "swap_probability: objective.loss: robust needs a number"),
        ({"objective__swap_probability": 0.1}, "would be ignored: objective.loss: sigmoid takes"),
        ({"objective__loss": "apo_zero", "objective__divergence": "forward_kl"}, "by itself"),
        ({"objective__discopop_tau": 0.1}, "discopop_tau: would be ignored: only discopop has it"),
        ({"objective__divergence_alpha": 0.3}, "divergence_alpha: would be ignored"),
        ({"data__streaming": True}, "data.streaming: objective.kind: dpo compares rows"),
        ({"data__truncation": "split"}, "data.truncation: split would part answers"),
        ({"data__loss_on": "all"}, "data.loss_on: would be ignored"),
        ({"data__format": "messages"}, "compares answers and reads preference"),
    ],
)
def test_settings_that_do_not_fit_are_errors(workshop, values, says):
    config = workshop.config(**settings(workshop, **values))
    with pytest.raises(ConfigError, match=says):
        configs.from_dict(config)


def test_preference_tuning_has_its_own_usual_learning_rates(workshop):
    def lr(kind, **more):
        config = workshop.config(**settings(workshop, kind, **more))
        del config["optimizer"]["lr"]
        return configs.from_dict(config).optimizer.lr

    assert [lr(kind) for kind in KINDS] == [1e-6, 5e-6, 1e-6, 1e-6]
    assert lr("dpo", optimizer__kind="lion") == pytest.approx(1e-6 * 4e-6 / 2e-5)


MESSAGE = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"chosen": "b", "rejected": "b"}, "the chosen and a rejected answer are equal"),
        ({"chosen": "b", "rejected": ["c", "b"]}, "the chosen and a rejected .* the same tokens"),
        ({"chosen": [MESSAGE], "rejected": [MESSAGE]}, "the chosen and a rejected answer are eq"),
        ({"chosen": "b", "rejected": ""}, "column 'rejected' is empty"),
        ({"chosen": None, "rejected": "c"}, "column 'chosen' is empty"),
        ({"chosen": "b", "rejected": ["c", ""]}, "column 'rejected' is empty"),
        ({"chosen": "b"}, "no column 'rejected'"),
        ({"rejected": "b"}, "no column 'chosen'"),
        ({"chosen": "b", "rejected": "c" * 200}, "261 tokens in 2 documents, over data.max_length"),
        ({"chosen": "b" * 200, "rejected": "c"}, "rows of several documents are not cut"),
    ],
)
def test_wrong_pairs_are_named_by_line(workshop, row, says):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = write_jsonl(workshop.folder / "rows.jsonl", [good, {"prompt": "a", **row}])
    own = settings(workshop) | {"data__train": str(rows)}
    with pytest.raises(DataError, match=f"rows.jsonl:2: .*{says}"):
        workshop.check(**own)


def test_a_pair_that_is_too_long_is_dropped_whole(workshop, capsys):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    long = {**good, "chosen": "b" * 200}
    rows = write_jsonl(workshop.folder / "rows.jsonl", [*[good] * 8, long])
    own = settings(workshop) | {"data__train": str(rows), "data__truncation": "drop"}
    workshop.check(**own)
    assert "9 rows: 1 dropped, 8 trained on" in capsys.readouterr().out


TEMPLATE = (
    "{%% for m in messages %%}{%% if m.role == 'user' %%}%s{{ m.content }}:{%% else %%}"
    "{{ m.content }}{{ eos_token }}{%% endif %%}{%% endfor %%}"
)


def test_a_template_that_writes_the_prompt_in_another_way_is_an_error(workshop):
    """It shows how long the answer will be, so that log-probabilities cannot be compared."""
    (workshop.folder / "t.jinja").write_text(TEMPLATE % "{{ messages[-1].content | length }}")
    with pytest.raises(DataError, match=r"pairs.jsonl:\d+: data.template .* renders the prompt of"):
        workshop.check(**settings(workshop, data__template=str(workshop.folder / "t.jinja")))


def test_a_format_of_a_users_own_may_not_change_the_prompt(workshop):
    """One more space before the rejected answer."""
    (workshop.folder / "own.py").write_text(
        "def pair(row):\n"
        "    good = {'prompt': row['prompt'], 'completion': row['chosen']}\n"
        "    bad = {'prompt': row['prompt'] + ' ', 'completion': 'x'}\n"
        "    return {'documents': [good, bad], 'fields': {'label': [1, 0]}}\n"
    )
    own = settings(workshop, data__format=f"{workshop.folder}/own.py:pair")
    with pytest.raises(
        DataError, match=r"pairs.jsonl:1: the template writes the prompt in another"
    ):
        workshop.check(**own)


def test_both_answers_follow_the_prompt_as_it_is_tokenised_alone(workshop):
    """A chosen answer that would merge with the end of the prompt: trl's fault 1153."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finetune.data.chat_templates import load
    from finetune.data.tokenised import Options, tokenise

    vocabulary = ["[", "]", "a", "b", "c", "ab", "</s>"]
    model = models.BPE({name: n for n, name in enumerate(vocabulary)}, [("a", "b")])
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Split("[", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (workshop.folder / "t.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    rows = write_jsonl(
        workshop.folder / "rows.jsonl", [{"prompt": "[a", "chosen": "b", "rejected": "c"}]
    )
    template = load(
        str(workshop.folder / "t.jinja"), "preference", None, tokenizer.special_tokens_map, {}, None
    )
    options = Options("preference", {}, "line", None, "completion", 64, "error")
    made = tokenise([str(rows)], template, tokenizer, options)
    chosen, rejected = (tokenizer.convert_ids_to_tokens(ids) for ids in made.ids)
    assert (chosen, rejected) == (["[", "a", "b", "</s>"], ["[", "a", "c", "</s>"])
    assert [each.tolist() for each in made.supervised] == [[False, False, True, True]] * 2
    assert tokenizer.tokenize("[ab") == ["[", "ab"], "together they would merge"
