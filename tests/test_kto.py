"""KTO: answers that are good or bad, beside how far the policy is from its reference elsewhere."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, read_jsonl, short, write_jsonl
from invariants import families
from test_head import Largest
from test_preference import as_trl_wants, cut_at, pairs_of, policy_of

from finetune import config as configs
from finetune.config import objective_fields as fields
from finetune.data.batches import Batches
from finetune.data.mismatched import mismatched, partners
from finetune.data.order import Sequences
from finetune.engine.reference import FILE
from finetune.errors import ConfigError, DataError
from finetune.evaluation import held_out
from finetune.evaluation.trained_run import TrainedRun
from finetune.models import cross_entropy
from finetune.objectives import OBJECTIVES
from finetune.objectives.base import total

pytestmark = pytest.mark.slow

KTO = OBJECTIVES["kto"]
MAX_LENGTH = 1024
LOWER = 0.3  # nats a token that the reference thinks less of every answer, so that z is above 0


def settings(workshop, rows=None, **more):
    """The settings of a run on judged answers."""
    path = write_jsonl(workshop.folder / "judged.jsonl", rows or families.judged())
    return {
        "data__train": str(path), "objective__kind": "kto", "optimizer__lr": 1e-3,
        "model__config": TINY_LLAMA, **more,
    }  # fmt: skip


# ------------------------------------------------------------------------------------ partners


@pytest.mark.parametrize(
    "groups", [range(7), [0, 0, 1, 1, 2, 2], [0, 1], [0, 0, 0, 0, 1], [1, 0, 1]]
)
def test_no_document_gets_an_answer_to_its_own_prompt(groups):
    groups = np.array(list(groups))
    for seed in range(20):
        found = partners(groups, seed)
        assert (groups[found] != groups).all()
        if len(set(np.bincount(groups))) == 1:
            assert sorted(found) == list(range(len(groups))), "each answer once"


def test_partners_follow_from_the_seed():
    first, again, other = (partners(range(9), seed).tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_a_mismatched_document_is_a_prompt_and_the_whole_answer_of_another_row():
    examples = pairs_of()
    other = mismatched(examples, MAX_LENGTH, seed=3)
    prompts, answers = parts(examples)
    made_prompts, made_answers = parts(other)
    assert made_prompts == prompts
    assert made_answers != answers
    assert sorted(made_answers) == sorted(answers), "two answers to each prompt: each once"
    assert mismatched(examples, 6, seed=3).input.lengths.max() == 6


def parts(examples):
    """Prompts and answers of all documents, as lists of tokens."""
    spans = map(examples.input.span, range(len(examples.input.starts)))
    cut = [(examples.input.ids[s].tolist(), int(examples.supervised[s].argmax())) for s in spans]
    return [ids[:begin] for ids, begin in cut], [ids[begin:] for ids, begin in cut]


# ------------------------------------------------------------------------------------ the loss


def batches_of(reference, micro_batch_size=6, count=6):
    """A step of pairs in micro-batches, with log-probabilities of a reference."""
    examples = pairs_of(count)

    def made(of):
        sequences = Sequences(of, False, MAX_LENGTH, seed=0)
        return Batches(sequences, seed=0, global_batch_size=count, micro_batch_size=count)

    def with_reference(of):
        numbers = {"place": np.arange(len(of.input.ids))}
        [batch] = made(replace(of, token_columns=numbers)).at(0)
        column = np.zeros(len(of.input.ids), np.float32)
        with torch.no_grad():
            found = reference(batch, {"logprobs"}).logprobs
        column[batch.token_columns["place"].numpy()] = found.numpy() - LOWER
        return replace(of, token_columns={"reference": column})

    whole = made(with_reference(examples))
    whole.micro_batch_size = micro_batch_size
    beside = with_reference(mismatched(examples, MAX_LENGTH, seed=0))
    whole.mismatched = whole.with_examples(beside)
    return whole


def chosen_settings(**values):
    return fields.Kto(kind="kto", **values)


def step(values, model, policy, batches):
    """Return the loss of a whole step, its gradient, and what was prepared for it."""
    model.zero_grad()
    with torch.no_grad():
        prepared = KTO.prepare(policy, batches, values)
    documents = {"documents": sum(each.counts["documents"] for each in batches)}
    terms = [KTO.loss(policy, each, values, prepared) for each in batches]
    loss = sum(total(each, documents) for each in terms)
    loss.backward()
    return float(loss.detach()), model.get_input_embeddings().weight.grad.clone(), prepared


def ratios(policy, batch):
    with torch.no_grad():
        moved = policy(batch, {"logprobs"}).logprobs - batch.token_columns["reference"]
    return policy.per_document(moved, batch)


def by_hand(values, ratio, label, z):
    """1 - s(b (r - z)) of good answers, 1 - s(b (z - r)) of bad ones, each with its weight."""
    good = values.desirable_weight * (1 - (values.beta * (ratio - z)).sigmoid())
    bad = values.undesirable_weight * (1 - (values.beta * (z - ratio)).sigmoid())
    return torch.where(label > 0.5, good, bad)


@pytest.mark.parametrize("size", [6, 2, 1])
def test_z_is_the_mean_over_the_whole_step_however_it_is_cut_up(size):
    """By hand; z of each micro-batch alone, as in TRL, would give another loss."""
    (model, policy), (_, reference) = policy_of(0), policy_of(1)
    values = chosen_settings(beta=0.4, undesirable_weight=1.5)
    batches = batches_of(reference, size).at(0)
    own, gradient, prepared = step(values, model, policy, batches)
    elsewhere = [ratios(policy, each.mismatched) for each in batches]
    z = torch.cat(elsewhere).mean().clamp(min=0)
    assert z > 0.1, "a z that counts"
    assert float(prepared["drift"] / prepared["mismatched"]) == pytest.approx(float(z), rel=1e-6)

    def loss(zs):
        found = [by_hand(values, ratios(policy, each), each.columns["label"], z)
                 for each, z in zip(batches, zs)]  # fmt: skip
        return float(torch.cat(found).mean())

    assert own == pytest.approx(loss([z] * len(batches)), rel=1e-6)
    if size < 6:
        alone = loss([each.mean().clamp(min=0) for each in elsewhere])
        assert abs(own - alone) > 1e-5 * own
    _, at_once, _ = step(values, model, policy, batches_of(reference).at(0))
    assert (gradient - at_once).abs().max() < 1e-6


def test_z_below_zero_counts_as_zero():
    (model, policy), (_, reference) = policy_of(0), policy_of(1)
    [batch] = batches_of(reference).at(0)
    values = chosen_settings(beta=0.4)
    beside = batch.mismatched
    higher = {"reference": beside.token_columns["reference"] + 5}
    batch = replace(batch, mismatched=replace(beside, token_columns=higher))
    own, _, prepared = step(values, model, policy, [batch])
    assert prepared["drift"] < 0
    wanted = by_hand(values, ratios(policy, batch), batch.columns["label"], 0.0).mean()
    assert own == pytest.approx(float(wanted), rel=1e-6)


def test_no_tensor_holds_the_logits_of_a_micro_batch(monkeypatch):
    """Neither of the rows nor of mismatched documents."""
    size = 8192
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 16 * 4 * size)
    monkeypatch.setattr(cross_entropy, "BLOCK_BYTES", 8 * 4 * size)
    (model, policy), (_, reference) = (policy_of(seed, vocabulary=size) for seed in (0, 1))
    batches = batches_of(reference, 16, count=16).at(0)
    assert all(len(each.labels) > 4 * 32 for each in (batches[0], batches[0].mismatched))
    with Largest() as largest:
        step(chosen_settings(), model, policy, batches)
    assert largest.numbers == 32 * size, "the gradient of the projection"


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "values",
    [{}, {"beta": 0.5, "desirable_weight": 1.3, "undesirable_weight": 0.7},
     {"loss": "apo_zero_unpaired", "beta": 0.3}],
    ids=str,
)  # fmt: skip
def test_loss_and_gradient_of_one_micro_batch_equal_trls(tmp_path, values):
    """There TRL's z, of a micro-batch, is that of the step; the same mismatched pairs."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    from finetune.models.load import bytes_tokenizer

    (model, policy), (frozen, reference) = policy_of(0), policy_of(1)
    whole = batches_of(reference)
    own, gradient, _ = step(chosen_settings(**values), model, policy, whole.at(0))
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", loss_type=values.get("loss", "kto"), beta=values.get("beta", 0.1),
        desirable_weight=values.get("desirable_weight", 1.0),
        undesirable_weight=values.get("undesirable_weight", 1.0), per_device_train_batch_size=2,
    )  # fmt: skip
    rows = [{"prompt": "a", "completion": "b", "label": True},
            {"prompt": "c", "completion": "d", "label": False}]  # fmt: skip
    trainer = trl.KTOTrainer(
        as_trl_wants(model), as_trl_wants(frozen), args=arguments,
        train_dataset=Dataset.from_list(rows), processing_class=bytes_tokenizer(),
    )  # fmt: skip
    trainer.precompute_ref_logps = True  # those of `batches_of`
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, padded_for_trl(whole))
    loss.backward()
    assert own == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    theirs = trainer.model.get_input_embeddings().weight.grad
    assert (gradient - theirs).abs().max() < 1e-6 * max(1, theirs.abs().max())


def padded_for_trl(batches):
    """The documents of both kinds as TRL's collator lays them."""
    found = {"label": torch.from_numpy(batches.in_memory.examples.columns["label"] > 0.5)}
    for prefix, examples in (
        ("", batches.in_memory.examples), ("KL_", batches.mismatched.in_memory.examples),
    ):  # fmt: skip
        spans = [examples.input.span(number) for number in range(len(examples.input.starts))]
        shape = len(spans), max(span.stop - span.start for span in spans)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            found[prefix + name] = torch.zeros(shape, dtype=torch.long)
        for row, span in enumerate(spans):
            length = span.stop - span.start
            ids = torch.from_numpy(examples.input.ids[span].astype(int))
            found[f"{prefix}input_ids"][row, :length] = ids
            found[f"{prefix}attention_mask"][row, :length] = 1
            learned = torch.from_numpy(examples.supervised[span])
            found[f"{prefix}completion_mask"][row, :length] = learned
        columns = examples.token_columns["reference"]
        found[f"ref_{prefix}logps"] = torch.tensor([columns[span].sum() for span in spans])
    return found


# -------------------------------------------------------------------------------------- a run


def test_the_first_step_is_at_the_reference_and_later_ones_move(workshop):
    run = workshop.train(**settings(workshop), data__eval_fraction=0.2)
    first, *_, last = read_jsonl(run / "metrics.jsonl")
    assert (first["loss"], first["z"], first["desirable_reward"]) == (0.5, 0.0, 0.0)
    assert last["loss"] < 0.5
    assert last["desirable_reward"] > last["undesirable_reward"]
    assert {"z", "accuracy"} <= read_jsonl(run / "eval.jsonl")[-1].keys()


def test_pairs_count_as_two_rows(workshop):
    rows = families.preferences()
    single = [
        {"prompt": row["prompt"], "completion": answer, "label": label}
        for row in rows
        for label, given in ((True, row["chosen"]), (False, row["rejected"]))
        for answer in (given if isinstance(given, list) else [given])
    ]
    pairs, alone = (
        workshop.train(name, **settings(workshop, given), train__global_batch_size=len(given),
                       train__micro_batch_size=len(given))
        for name, given in (("pairs", rows), ("alone", single))
    )  # fmt: skip
    assert losses(pairs) == pytest.approx(losses(alone), rel=1e-5)


def test_a_micro_batch_is_tried_before_there_is_a_reference(workshop):
    run = workshop.train(**settings(workshop), train__micro_batch_size="auto", train__max_steps=1)
    assert read_jsonl(run / "metrics.jsonl")[0]["z"] == 0


@pytest.mark.parametrize("file", short(["kept", "lost"], "lost"))
def test_a_resumed_run_goes_on_with_the_same_partners_and_reference(workshop, file):
    own = settings(workshop, checkpoint__every_steps=2, checkpoint__keep_last=9)
    whole = losses(workshop.train("whole", **own))
    workshop.train("cut", **own)
    run = cut_at(workshop, 2)
    if file == "lost":
        (run / FILE).unlink()
    assert losses(workshop.train("cut", **own)) == whole


def test_apo_zero_makes_no_mismatched_documents(workshop):
    rows = [{"prompt": "same", "completion": f"{n}", "label": n % 2 > 0} for n in range(16)]
    workshop.check(**settings(workshop, rows), objective__loss="apo_zero_unpaired")
    assert not KTO.mismatches(chosen_settings(loss="apo_zero_unpaired"))


def test_evaluate_asks_the_prompts_of_good_answers(workshop, capsys):
    rows = [{"prompt": f"{n}", "completion": f"a{n}", "label": n % 2 > 0} for n in range(40)]
    run = TrainedRun.open(str(workshop.train(**settings(workshop, rows), data__eval_fraction=0.2)))
    prompts = held_out.read(run.held_out, run.reading)
    assert 0 < len(prompts) < 8
    assert f"{8 - len(prompts)} of 8 rows left out" in capsys.readouterr().err
    assert all(prompt.reference == f"a{prompt.question}" for prompt in prompts)
    assert all(int(prompt.question) % 2 for prompt in prompts)


# ------------------------------------------------------------------------------ notes, bad input


@pytest.mark.parametrize(
    ("good", "bad", "weights", "says"),
    [
        (10, 10, (1.0, 1.0), None),
        (12, 9, (1.0, 1.0), None),
        (5, 15, (1.0, 1.0), "0.33 times as much.*objective.desirable_weight: 3.00 or more"),
        (30, 10, (1.0, 1.0), "3.00 times as much.*objective.undesirable_weight: 2.25 or more"),
        (5, 15, (3.0, 1.0), None),
    ],
)
def test_unbalanced_weights_are_noted(good, bad, weights, says):
    values = chosen_settings(desirable_weight=weights[0], undesirable_weight=weights[1])
    notes = KTO.notes(values, {"label": np.array([1.0] * good + [0.0] * bad)})
    assert bool(notes) == bool(says)
    if says:
        assert re.search(says, notes[0])


def test_the_note_stands_before_the_first_step(workshop, capsys):
    rows = [{"prompt": f"{n}", "completion": "a", "label": n > 3} for n in range(16)]
    workshop.check(**settings(workshop, rows))
    assert "note        12 desirable answers with a weight of 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"data__format": "messages"}, "judges answers and reads unpaired or preference"),
        ({"data__truncation": "right"}, "data.truncation: right would cut what a label judges"),
        ({"data__loss_on": "all"}, "data.loss_on: all: a label judges answers"),
        ({"data__streaming": True}, "data.streaming: objective.kind: kto"),
        ({"objective__desirable_weight": 0.0}, "desirable_weight"),
    ],
)
def test_settings_that_do_not_fit_are_errors(workshop, values, says):
    with pytest.raises(ConfigError, match=says):
        configs.from_dict(workshop.config(**settings(workshop, **values)))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "completion": "b"}, r"judged.jsonl:2: no column 'label'"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, r"judged.jsonl:2: column 'label'"),
        ({"prompt": "a", "completion": "", "label": True}, r"judged.jsonl:2: "),
        (
            {"prompt": "q", "completion": "b", "label": False},
            r"judged.jsonl:1: all 2 examples have",
        ),
        (
            {"prompt": "r", "completion": "b", "label": True},
            r"judged.jsonl: none of 2 labels is bad, .*; add some, or train on the good ones with",
        ),
    ],
)
def test_wrong_rows_are_named_by_line(workshop, row, says):
    rows = [{"prompt": "q", "completion": "x", "label": True}, row]
    with pytest.raises(DataError, match=says):
        workshop.check(**settings(workshop, rows))


def test_bad_answers_alone_are_an_error_but_not_in_an_evaluation(workshop):
    bad = [{"prompt": f"{n}", "completion": "a", "label": False} for n in range(4)]
    with pytest.raises(DataError, match=r"judged.jsonl: none of 4 labels is good, .*; add some$"):
        workshop.check(**settings(workshop, bad))
    held_out = write_jsonl(workshop.folder / "held_out.jsonl", bad)
    workshop.check(**settings(workshop, data__eval=str(held_out)))


def test_the_last_answer_alone_is_another_judgement_where_rows_have_several(workshop, capsys):
    texts = ("hi", "ho", "and?", "no")
    turns = [
        {"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts)
    ]
    rows = [{"messages": [*turns[:3], {**turns[3], "content": f"{n}"}], "label": n > 1}
            for n in range(4)]  # fmt: skip
    own = settings(workshop, rows, objective__loss="apo_zero_unpaired", data__loss_on="last_turn")
    workshop.check(**own)
    assert "is the same as completion here" not in capsys.readouterr().out
