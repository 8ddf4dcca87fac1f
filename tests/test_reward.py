"""Reward models: what they learn, and that plain transformers opens them with the same scores."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, pretrained, read_jsonl, write_jsonl
from faults.forked import assert_same_end, forget
from invariants import families
from invariants.test_topologies import several
from test_distill import model_of
from test_preference import _minimise as minimise
from test_preference import _padded as padded
from test_preference import batch_of, pairs_of

from finetune.config import objective_fields as fields
from finetune.data.batches import Batches
from finetune.data.built_in_templates import TOKENS
from finetune.data.conversations import Conversation, Message
from finetune.data.order import Sequences
from finetune.data.places import Place
from finetune.errors import DataError, ExportError, ModelError, UserError
from finetune.evaluation import calibration, reward_runs
from finetune.export import model_card
from finetune.export.load import load as opened
from finetune.export.load import load_chat_tokenizer
from finetune.generation.reward_model import RewardModel
from finetune.models import attention, document_scores, head, load
from finetune.models.policy import Policy
from finetune.objectives import OBJECTIVES
from finetune.objectives.base import total
from finetune.objectives.reward import ProcessReward

pytestmark = pytest.mark.slow


def settings(workshop, rows=None, **more):
    """The settings of a run on pairs."""
    path = write_jsonl(workshop.folder / "pairs.jsonl", rows or families.preferences())
    return {
        "data__train": str(path), "objective__kind": "reward", "optimizer__lr": 1e-3,
        "model__config": TINY_LLAMA, **more,
    }  # fmt: skip


def conversation(*texts):
    turns = zip(["user", "assistant"] * len(texts), texts)
    return Conversation(tuple(Message(*turn) for turn in turns), Place("asked", 1))


ASKED = [conversation("1", "+bcdef"), conversation("1", "jkla"), conversation("22", "+a")]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that was trained on answers."""
    from conftest import Workshop

    return str(Workshop(tmp_path_factory.mktemp("base")).train("base") / "model")


# ---------------------------------------------------------------------------------- the export


def test_plain_transformers_opens_the_export_with_the_same_scores(workshop):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own = settings(workshop, data__packing=True, data__template="chatml")
    run = workshop.train(**own, optimizer__head_lr=1e-2)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert (model.config.num_labels, model.config.id2label) == (1, {0: "score"})
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [
        tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in each.messages], tokenize=False
        )
        for each in ASKED
    ]
    card = model_card.card(run / "model", "me/it", run)
    assert "pipeline_tag: text-classification" in card
    assert "AutoModelForSequenceClassification.from_pretrained('me/it')" in card
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted = model(**inputs).logits[:, 0].tolist()
    assert RewardModel(run)(ASKED) == pytest.approx(wanted, abs=1e-6)
    assert len({round(each, 4) for each in wanted}) == 3


@pytest.mark.parametrize("kind", ["lora", pytest.param("qlora", marks=pytest.mark.proof)])
def test_peft_opens_an_adapter_with_its_head(workshop, base, kind):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    own = settings(workshop) | pretrained(base) | {"optimizer__lr": 1e-2}
    run = workshop.train(**own, adapter__kind=kind)
    saved = json.loads((run / "model/adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS"
    use = 'AutoPeftModelForSequenceClassification.from_pretrained("me/it", num_labels=1)'
    assert use in model_card.card(run / "model", "me/it", run).replace("'", '"')
    assert "score" in saved["modules_to_save"]
    scores = RewardModel(run)
    if kind == "lora":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
        plain.config.pad_token_id = scores.tokenizer.pad_token_id
        model = PeftModel.from_pretrained(plain, run / "model").eval()
        documents = scores.documents(ASKED)
        with torch.no_grad():
            wanted = [
                model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits.item()
                for ids in documents
            ]
        assert scores(ASKED) == pytest.approx(wanted, abs=1e-6)
    assert len(set(scores(ASKED))) == 3


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_an_export_that_scores_otherwise_is_refused(workshop, base, monkeypatch, kind):
    """A deliberate break: training reads the token before the last."""
    from finetune.models import document_scores

    usual = document_scores.trained
    monkeypatch.setattr(
        document_scores, "trained", lambda m, documents, d: replace(
            usual(m, [each[:-1] for each in documents], d), documents=documents
        ),
    )  # fmt: skip
    own = settings(workshop) | pretrained(base, adapter__kind=kind)
    with pytest.raises(ExportError, match="scores .* of documents after reloading, and"):
        workshop.train(**own)


@pytest.mark.proof
def test_a_merged_adapter_scores_like_the_adapter(workshop, base):
    from finetune.export import merge

    run = workshop.train(**settings(workshop) | pretrained(base), adapter__kind="lora")
    target = workshop.folder / "merged"
    merge.merge([run / "model"], target)
    assert RewardModel(target)(ASKED) == pytest.approx(RewardModel(run)(ASKED), abs=1e-5)


def test_padding_that_ends_answers_is_replaced_or_refused(workshop, bytes_tokenizer, caplog):
    """GPT-2 and many bases have only their EOS to pad with."""
    bytes_tokenizer.pad_token = bytes_tokenizer.eos_token
    bytes_tokenizer.save_pretrained(workshop.folder / "tokenizer")
    own = settings(workshop) | {"model__tokenizer": str(workshop.folder / "tokenizer")}
    run = workshop.train(**own)
    saved = json.loads((run / "model/config.json").read_text())
    pad_id = saved["pad_token_id"]
    assert pad_id not in (bytes_tokenizer.eos_token_id, bytes_tokenizer.bos_token_id, None)
    scores = RewardModel(run)
    assert scores.tokenizer.pad_token_id == pad_id
    alone = [scores([each])[0] for each in ASKED]
    assert scores(ASKED) == pytest.approx(alone, abs=1e-6)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(bytes_tokenizer):
    special = [str(each) for each in bytes_tokenizer.added_tokens_decoder.values()]
    bytes_tokenizer.pad_token = bytes_tokenizer.eos_token
    ends = bytes_tokenizer.convert_tokens_to_ids(special)
    with pytest.raises(ModelError, match="pads and ends answers, .* model.new_tokens"):
        load.part_padding(bytes_tokenizer, set(ends))


# ---------------------------------------------------------------------------------- the loss


def scorer(seed=0):
    """A tiny Llama that scores, in float32, as in training and as transformers has it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    shape = {**TINY_LLAMA, "vocab_size": 64, "num_labels": 1, "pad_token_id": 0}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    make = AutoModelForSequenceClassification.from_config
    plain = make(config, attn_implementation="sdpa")
    model = make(deepcopy(config), attn_implementation=attention.DOCUMENTS)
    model.load_state_dict(plain.state_dict())
    head.install(model)
    return model, plain


def with_margins(examples):
    margins = np.arange(len(examples), dtype=np.float32).repeat(2) / 3
    return replace(examples, columns={**examples.columns, "margin": margins})


def loss_of(model, batch, **values):
    """The loss of a micro-batch, and the gradient of every weight."""
    own = fields.Reward(kind="reward", **values)
    model.zero_grad()
    loss = total(OBJECTIVES["reward"].loss(Policy(model), batch, own, {}), batch.counts)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [0.0, 0.3])
def test_loss_and_gradients_equal_trls(tmp_path, margin, center):
    """Of one pack, in float32. TRL pads: chosen answers first, then rejected ones."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    (model, plain), examples = scorer(), pairs_of()
    examples = with_margins(examples) if margin else examples
    own, gradients = loss_of(model, batch_of(examples), center_rewards_coefficient=center)
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False,
        report_to="none", center_rewards_coefficient=center or None,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    trainer = trl.RewardTrainer(
        plain, args=arguments, train_dataset=rows, processing_class=load.bytes_tokenizer()
    )
    trainer.model.config.pad_token_id = 0
    inputs = {k: v for k, v in padded(examples).items() if k != "completion_mask"}
    if margin:
        inputs["margin"] = torch.from_numpy(examples.columns["margin"][::2])
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    assert own == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in trainer.model.named_parameters():
        assert (gradients[name] - parameter.grad).abs().max() < 1e-6, name


def test_the_score_is_read_at_the_last_token_of_a_document_in_packs_and_rows():
    model, plain = scorer()
    examples = pairs_of()
    documents = [examples.input.ids[examples.input.span(n)] for n in range(12)]
    with torch.no_grad():
        packed = Policy(model)(batch_of(examples), {"scores"}).scores
        alone = [
            plain(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits.item()
            for ids in documents
        ]
    assert sorted(packed.tolist()) == pytest.approx(sorted(alone), abs=1e-6)  # packs shuffle
    assert document_scores.plain(plain, documents, torch.device("cpu")).tolist() == pytest.approx(
        alone, abs=1e-6
    )


def test_one_pair_has_no_part_in_the_gradient_of_another():
    examples, (model, _) = pairs_of(), scorer()
    whole = loss_of(model, batch_of(examples), center_rewards_coefficient=0.3)[1]
    parts = [
        loss_of(model, batch_of(examples.subset(np.array(n))), center_rewards_coefficient=0.3)[1]
        for n in ([0, 1, 2], [3, 4, 5])
    ]
    for name, gradient in whole.items():
        assert torch.allclose(gradient, sum(part[name] for part in parts) / 2, atol=1e-7), name


def test_scores_of_bradley_and_terry_are_recovered_up_to_a_constant():
    """Of the loss of all pairs, each as often as the true scores say that it comes."""
    truth = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    own, pair = fields.Reward(kind="reward"), {"label": torch.tensor([1.0, 0.0])}

    def loss_of_pair(better, worse):
        batch = SimpleNamespace(example=torch.tensor([0, 0]), num_documents=2, columns=pair)
        answers = SimpleNamespace(scores=scores[[better, worse]])
        return OBJECTIVES["reward"].loss(lambda batch, want: answers, batch, own, {})[0].sum

    def loss():
        return sum(
            (truth[i] - truth[j]).sigmoid() * loss_of_pair(i, j)
            for i in range(5) for j in range(5) if i != j
        )  # fmt: skip

    minimise(scores, loss)
    found = (scores - scores.mean()).detach()
    assert torch.allclose(found, truth - truth.mean(), atol=1e-8)


# -------------------------------------------------------------------------------- what it learns


def polite(count, seed):
    """Pairs of random words whose chosen answer says please, anywhere and as long as the other."""
    random, words = np.random.default_rng(seed), ["red", "tall", "new", "cold", "big", "dry"]
    rows = []
    for number in range(count):
        answers = [list(random.choice(words, random.integers(2, 6))) for _ in range(2)]
        answers[0][random.integers(len(answers[0]))] = "please"
        chosen, rejected = map(" ".join, answers)
        rows.append({"prompt": f"say {number}", "chosen": chosen, "rejected": rejected})
    return rows


@pytest.mark.proof
def test_a_learned_rule_holds_for_pairs_that_it_did_not_see(workshop):
    unseen = write_jsonl(workshop.folder / "unseen.jsonl", polite(200, seed=1))
    run = workshop.train(
        **settings(workshop, rows=polite(800, seed=0)), data__eval=str(unseen),
        train__epochs=9, train__max_steps=150, train__global_batch_size=16, data__max_length=256,
        evaluation__every_steps=150,
    )  # fmt: skip
    assert read_jsonl(run / "eval.jsonl")[-1]["accuracy"] > 0.95


@pytest.mark.proof
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_resumes_to_the_bit(workshop, base, kind):
    own = settings(workshop) | pretrained(base) | {
        "adapter__kind": kind, "optimizer__head_lr": 1e-2, "checkpoint__every_steps": 2,
        "checkpoint__keep_last": 3,
    }  # fmt: skip
    run, whole = workshop.train(**own), workshop.folder / "whole"
    shutil.copytree(run, whole)
    forget(run, 2)
    assert_same_end(workshop.train(**own), whole)
    scores, again = RewardModel(whole)(ASKED), RewardModel(run)(ASKED)
    assert scores == again


# ---------------------------------------------------------------------------------- bad input

GOOD = {"prompt": "1", "chosen": "a", "rejected": "b"}
WRONG = {
    "equal answers": ({**GOOD, "rejected": "a"}, {}, "chosen and a rejected answer are equal"),
    "a missing side": ({"prompt": "1", "chosen": "a"}, {}, "no column 'rejected'"),
    "an answer cut away": ({**GOOD, "chosen": "a" * 99}, {}, "over data.max_length 64"),
    "no margin": ({**GOOD}, {"data__columns": {"margin": "lead"}}, "'lead' should be a number"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_is_named_with_its_line(workshop, wrong):
    row, more, says = WRONG[wrong]
    first = {**GOOD, "lead": 1.0} if "data__columns" in more else GOOD
    with pytest.raises(DataError) as refused:
        workshop.train(**settings(workshop, rows=[first, row], data__max_length=64, **more))
    assert says in str(refused.value)
    assert "pairs.jsonl:2" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__config": {**TINY_LLAMA, "model_type": "cohere"}}, "has no class for sequence"),
        ({"model__config": {"model_type": "bert"}}, "is an encoder, and objective.kind: reward"),
        ({"evaluation__sample_prompts": ["hi"]}, "a reward model does not write answers"),
        ({"objective__kind": "dpo", "data__columns": {"margin": "m"}}, "margin would be ignored"),
    ],
)
def test_a_model_or_setting_that_does_not_fit_is_refused(workshop, changes, says):
    with pytest.raises(UserError) as refused:
        workshop.check(**settings(workshop) | changes)
    assert says in str(refused.value)


@pytest.mark.proof
def test_a_reward_model_may_go_on_and_a_classifier_of_several_labels_may_not(workshop):
    first = workshop.train("first", **settings(workshop)) / "model"
    own = settings(workshop) | pretrained(first)
    further = workshop.train("further", **own, train__max_steps=1) / "model"
    before, after = (opened(each).score.weight for each in (first, further))
    assert 0 < (after - before).abs().max() < 2e-3, "a step of a rate of 1e-3"
    model = opened(first)
    model.config.id2label = {0: "a", 1: "b"}
    model.save_pretrained(workshop.folder / "classifier")
    with pytest.raises(UserError, match="is a classifier of 2 labels"):
        workshop.check(**own | {"model__path": str(workshop.folder / "classifier")})


def test_what_gives_no_score_or_holds_no_answer_is_refused(workshop, base):
    with pytest.raises(ModelError, match="gives no single score"):
        RewardModel(base)
    run = workshop.train(**settings(workshop))
    with pytest.raises(ModelError, match="writes no answers; evaluate a reward run by its"):
        load_chat_tokenizer(str(run / "model"), False)
    scores = RewardModel(run)
    with pytest.raises(DataError, match="asked:1: ends with a message of the user"):
        scores([conversation("only a question")])
    with pytest.raises(DataError, match="tokens, and the reward model has only 256 positions"):
        scores([conversation("1", "a" * 300)])


# -------------------------------------------------------------------------------- evaluation


def test_evaluate_shows_what_the_scores_of_held_out_pairs_are_worth(workshop, capsys):
    from finetune.__main__ import main

    own = settings(workshop, rows=polite(120, seed=0), data__max_length=256)
    run = workshop.train(**own, data__eval_fraction=0.4, train__max_steps=None)
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    found = json.loads((run / "evaluation/scores.json").read_text())
    by_run = read_jsonl(run / "eval.jsonl")[-1]
    assert found["accuracy"] == pytest.approx(by_run["accuracy"])
    leads = [pair["chosen"] - pair["rejected"] for pair in found["pairs"]]
    assert np.mean(leads) == pytest.approx(by_run["margin"], abs=1e-5)
    assert len(leads) == len(read_jsonl(run / "held_out.jsonl"))
    assert found["low"] < found["accuracy"] <= found["high"]
    assert "calibration error (ECE)" in shown
    assert "correlation of a lead with how much longer" in shown
    assert main(["evaluate", str(run), "--judge", "x"]) == 2
    assert "--judge: would be ignored" in capsys.readouterr().err


def test_calibration_compares_what_is_expected_with_what_comes_true():
    found = calibration.of([0.55, 0.65, 0.95, 0.95], [True, False, True, True], low=0.5)
    assert [(each.count, each.expected, each.true) for each in found.bins] == [
        (1, 0.55, 1.0), (1, 0.65, 0.0), (2, 0.95, 1.0),
    ]  # fmt: skip
    assert found.ece == pytest.approx((0.45 + 0.65 + 2 * 0.05) / 4)
    assert found.brier == pytest.approx((0.45**2 + 0.65**2 + 2 * 0.05**2) / 4)
    random = np.random.default_rng(0)
    drawn = random.random(20_000)
    honest = calibration.of(drawn, random.random(20_000) < drawn)
    assert honest.ece < 0.01 < calibration.of(drawn**3, random.random(20_000) < drawn).ece


def test_length_that_decides_is_shown():
    pairs = [reward_runs.Pair(f"r:{n}", float(n % 5), 2.0, n % 5 - 2) for n in range(50)]
    found = reward_runs.measured(pairs, list(range(50)))
    assert found["length_correlation"] == pytest.approx(1)
    assert found["accuracy_by_length"] == {"chosen is longer": 1.0, "chosen is shorter": 0.0}
    assert found["accuracy"] == found["share_longer"] == 0.4, "equal scores are not right"
    same = reward_runs.measured([replace(pair, longer=0) for pair in pairs], list(range(50)))
    assert same["length_correlation"] is None
    shown = "\n".join(reward_runs.lines(same, 50, 25))
    assert "50 held-out pairs of 25 rows\naccuracy 40.0% (" in shown
    assert "chosen is longer -" in shown


# ------------------------------------------------------------------------------------ steps


def sums(count, seed=0):
    """Additions step by step; from a wrong one on, steps are wrong."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        numbers, total, is_right = random.integers(1, 9, 4).tolist(), 0, True
        steps, labels = [], []
        for number in numbers[: random.integers(2, 5)]:
            slips = random.random() < 0.25
            steps.append(f"{total}+{number}={total + number}" + "!" * slips)
            total, is_right = total + number, is_right and not slips
            labels.append(is_right)
        rows.append({"prompt": " ".join(map(str, numbers)), "steps": steps, "labels": labels})
    return rows


def steps(workshop, rows=None, **more):
    return settings(workshop, rows or sums(60), objective__kind="process_reward", **more)


def test_a_step_is_scored_as_if_the_answer_ended_there(workshop, capsys):
    from finetune.__main__ import main

    own = steps(workshop, data__eval_fraction=0.3, data__max_length=512)
    run = workshop.train(**own, data__packing=True, train__max_steps=None)
    *_, last = read_jsonl(run / "eval.jsonl")
    rows = read_jsonl(run / "held_out.jsonl")
    scores, labels = RewardModel(run), []
    asked = [
        conversation(row["prompt"], "\n".join(row["steps"][:end]))
        for row in rows for end in range(1, len(row["steps"]) + 1)
    ]  # fmt: skip
    labels = torch.tensor([each for row in rows for each in row["labels"]], dtype=torch.float32)
    found = torch.tensor(scores(asked))
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(found, labels)
    assert last["eval_loss"] == pytest.approx(wanted.item(), abs=1e-5)
    assert last["accuracy"] == pytest.approx(((found > 0) == labels.bool()).float().mean().item())
    assert main(["evaluate", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(labels)} held-out steps of {len(rows)} rows" in shown
    kept = json.loads((run / "evaluation/scores.json").read_text())
    assert kept["accuracy"] == pytest.approx(last["accuracy"])
    assert [each["score"] for each in kept["steps"]] == pytest.approx(found.tolist(), abs=1e-6)


@pytest.mark.parametrize("shape", [{}, {"model_type": "mistral", "sliding_window": 4}], ids=str)
def test_documents_that_begin_alike_have_the_same_states_read_once(shape):
    """Log-probabilities, scores and all gradients; pairs share their prompts."""
    model = model_of(0, **shape)
    examples, found = pairs_of(), []
    for shares in (False, True):
        batch = Batches(
            Sequences(examples, True, 1024, seed=0), seed=0, global_batch_size=1,
            micro_batch_size=1, shares_beginnings=shares,
        ).at(0)[0]  # fmt: skip
        model.zero_grad()
        values = Policy(model)(batch, {"logprobs"}).logprobs
        (values * torch.arange(len(values))).sum().backward()
        put_in = batch.inputs["input_ids"]
        found.append((values.detach(), put_in[0, batch.ends], put_in.shape[1],
                      [p.grad.clone() for p in model.parameters()]))  # fmt: skip
    (one, ends, whole, gradients), (other, same_ends, shared, again) = found
    assert whole - shared > 0
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert torch.equal(ends, same_ends)
    for mine, its in zip(gradients, again):
        torch.testing.assert_close(its, mine, rtol=1e-4, atol=1e-4 * float(mine.abs().max()))


def test_what_steps_share_is_read_once_and_scores_as_if_it_were_not(workshop, monkeypatch):
    """Losses, gradients and evaluations of a run."""
    own = steps(workshop, data__eval_fraction=0.3, data__max_length=512, train__max_steps=4)
    once = workshop.train("once", **own)
    monkeypatch.setattr(ProcessReward, "shares_beginnings", False)
    apart = workshop.train("apart", **own)
    for file, names in (("metrics", ["loss", "grad_norm"]), ("eval", ["eval_loss", "accuracy"])):
        one, other = (read_jsonl(run / f"{file}.jsonl") for run in (once, apart))
        for name in names:
            assert [line[name] for line in one] == pytest.approx(
                [line[name] for line in other], rel=1e-5
            )


@pytest.mark.proof
@pytest.mark.timeout(300)
@pytest.mark.parametrize("topologies", [("ddp", "fsdp2", "zero3"), ("fsdp2_context",)], ids=str)
def test_processes_learn_from_steps_like_one(workshop, topologies):
    """Those that share a sequence read what steps share as often as it stands there."""
    own = steps(workshop, data__max_length=512, train__max_steps=2)
    alone, arguments = workshop.train("alone", **own), []
    for topology in topologies:
        arguments += [f"topology:{topology}"] if len(topologies) > 1 else []
        arguments.append(workshop.write(workshop.config(topology, **own)))
    count = 2 if len(topologies) > 1 else 4
    launched = several(workshop.folder, topologies[0], count, *arguments)
    assert launched.codes() == [0] * count, launched.output()
    for topology in topologies:
        for name in ("loss", "grad_norm"):
            one, other = (
                [line[name] for line in read_jsonl(run / "metrics.jsonl")]
                for run in (workshop.run_dir(topology), alone)
            )
            assert one == pytest.approx(other, rel=1e-4), topology


@pytest.mark.proof
def test_a_process_reward_model_finds_the_first_wrong_step(workshop):
    unseen = write_jsonl(workshop.folder / "unseen.jsonl", sums(100, seed=1))
    run = workshop.train(
        **steps(workshop, rows=sums(600)), data__eval=str(unseen), data__max_length=512,
        train__epochs=9, train__max_steps=200, evaluation__every_steps=200,
    )  # fmt: skip
    assert read_jsonl(run / "eval.jsonl")[-1]["accuracy"] > 0.95


@pytest.mark.proof
def test_single_answers_with_a_label_train_too(workshop):
    rows = [{"prompt": str(n), "completion": "ab"[n % 2], "label": n % 2 == 0} for n in range(20)]
    run = workshop.train(**steps(workshop, rows=rows, data__format="unpaired"))
    assert (run / "model").is_dir()


def test_a_row_of_one_step_is_enough_to_export(workshop):
    one = {"prompt": "1", "steps": ["so 3"], "labels": [True]}
    wrong = {**one, "labels": [False]}
    run = workshop.train(**steps(workshop, rows=[one, wrong], train__max_steps=1))
    assert workshop.outcome(run.name)["state"] == "complete"


STEPS = {"prompt": "1 2", "steps": ["1+2=3", "so 3"], "labels": [True, False]}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"labels": [True]}, "true or false for each of 2 steps, got 1 labels"),
        ({"labels": [True, "perhaps"]}, "label 2 should be true or false, got"),
        ({"steps": []}, "should be a list of texts, one for each step"),
        ({"steps": ["a", ""]}, "should be a list of texts, one for each step"),
        ({"steps": ["a", "b" * 99]}, "over data.max_length"),
        ({"prompt": ""}, "no column with a question"),
    ],
)
def test_wrong_steps_are_named_with_their_line(workshop, changes, says):
    with pytest.raises(DataError) as refused:
        workshop.check(**steps(workshop, rows=[STEPS, STEPS | changes]))
    assert says in str(refused.value)
    assert "pairs.jsonl:2" in str(refused.value)


@pytest.mark.proof
@pytest.mark.parametrize("template", ["question_answer", "chatml", "llama2", "mistral", "gemma"])
def test_held_out_pairs_score_as_in_training_under_any_template(workshop, capsys, template):
    from finetune.__main__ import main

    own = settings(workshop, rows=polite(60, seed=0), data__max_length=400)
    own |= {"data__template": template, "data__eval_fraction": 0.4}
    if template in ("chatml", "llama2"):
        own["data__system_prompt"] = "be kind"
    if template != "chatml" and template in TOKENS:
        own["model__new_tokens"] = list(TOKENS[template])
    run = workshop.train(**own)
    assert main(["evaluate", str(run)]) == 0
    pairs = json.loads((run / "evaluation/scores.json").read_text())["pairs"]
    *_, last = read_jsonl(run / "eval.jsonl")
    for side in ("chosen", "rejected"):
        mean = np.mean([pair[side] for pair in pairs])
        assert mean == pytest.approx(last[f"{side}_score"], abs=1e-5)
