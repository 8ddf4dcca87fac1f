"""Distillation: divergences by their definition, from a teacher that fits, whatever shares it."""

import dataclasses
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_LLAMA, losses, pretrained, read_jsonl
from faults.forked import weights
from invariants import sampled
from invariants.test_topologies import several
from test_head import Largest
from test_preference import batch_of, cut_at, pairs_of

from finetune.config import objective_fields as fields
from finetune.errors import ConfigError, ModelError, RunDirectoryError
from finetune.models import attention, cross_entropy, head
from finetune.models.logits import divergence, divergence_from_top
from finetune.models.policy import Answers, Policy
from finetune.objectives import OBJECTIVES, advantages
from finetune.objectives.base import total

pytestmark = pytest.mark.slow
VOCAB = 64
BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]


def logits(seed, vocab=VOCAB, count=30):
    return 3 * torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed))


def model_of(seed, vocab=VOCAB, **more):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    shape = {**TINY_LLAMA, "vocab_size": vocab, **more}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.DOCUMENTS)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8.0 if weight.ndim > 1 else 1.0)  # distributions that are not flat
    head.install(model)
    return model


def taught_by(teacher):
    """Return a companion: a frozen model that answers without gradient."""
    policy = Policy(teacher.eval())

    def answer(batch, want):
        with torch.no_grad():
            return policy(batch, want)

    return answer


def learned(student, companion, batch, **settings):
    """Return the loss of a batch, and the gradients of the student."""
    policy = Policy(student, companion=companion)
    own = fields.Distill(kind="distill", **settings)
    student.zero_grad()
    loss = total(OBJECTIVES["distill"].loss(policy, batch, own, {}), batch.counts)
    loss.backward()
    return float(loss.detach()), [p.grad.clone() for p in student.parameters()]


# ------------------------------------------------------------------------------------ formulas


@pytest.mark.parametrize("beta", BETAS)
def test_the_likeliest_of_all_tokens_are_the_whole_distribution(beta):
    student, teacher = logits(0), logits(1).log_softmax(-1)
    order = torch.argsort(torch.rand(30, VOCAB, generator=torch.Generator().manual_seed(2)))
    one, other = student.clone().requires_grad_(), student.clone().requires_grad_()
    whole = divergence(one, teacher, beta)
    top = divergence_from_top(other, order, teacher.gather(1, order), beta)
    torch.testing.assert_close(top, whole, rtol=1e-5, atol=1e-6)
    for value in (whole, top):
        value.sum().backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_fewer_tokens_never_say_more(beta):
    """What merges events never adds to a divergence; agreement in all of them is 0."""
    student, teacher = logits(0), logits(1).log_softmax(-1)
    before = torch.zeros(30)
    for count in (1, 4, 16, 48, VOCAB):
        known, ids = teacher.topk(count)
        found = divergence_from_top(student, ids, known, beta)
        assert (found >= before - 1e-5).all()
        before = found
    known, ids = teacher.topk(8)
    assert divergence_from_top(teacher, ids, known, beta).abs().max() < 1e-5


def test_a_teacher_that_is_sure_stays_finite():
    """Rounding may leave nothing, or less, beside what was stored."""
    ids, known = torch.tensor([[3, 5]]), torch.tensor([[-1e-7, -16.0]])
    student = logits(0, count=1).requires_grad_()
    for beta in BETAS:
        found = divergence_from_top(student, ids, known, beta)
        assert torch.isfinite(torch.autograd.grad(found.sum(), student)[0]).all()
        assert torch.isfinite(found).all()


@pytest.mark.parametrize(("mine", "other"), [(60, VOCAB), (VOCAB, 60)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_of_two_sizes_the_ids_that_both_have_are_compared(mine, other, beta):
    """As of Qwen2.5, whose sizes fill up one vocabulary to 151,936 or 152,064 rows."""
    student, teacher = logits(0, mine), logits(1, other)
    wanted = divergence(student[:, :60], teacher[:, :60], beta)
    torch.testing.assert_close(divergence(student, teacher, beta), wanted)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_equals_its_teacher_learns_nothing(beta):
    student, teacher = model_of(0), model_of(0)
    loss, gradients = learned(student, taught_by(teacher), batch_of(pairs_of()), beta=beta)
    assert loss == pytest.approx(0, abs=1e-7)
    assert max(float(grad.abs().max()) for grad in gradients) < 1e-6


def test_near_its_ends_the_divergence_tends_to_the_forward_and_reverse_kl():
    """To first order, divided by how far off the end it is."""
    batch = batch_of(pairs_of())
    student, companion = model_of(0), taught_by(model_of(1, num_hidden_layers=1))
    for end, near in ((0.0, 1e-3), (1.0, 1 - 1e-3)):
        whole, _ = learned(student, companion, batch, beta=end)
        part, _ = learned(student, companion, batch, beta=near)
        assert part / 1e-3 == pytest.approx(whole, rel=0.05)


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_loss_and_gradient_equal_trls(beta, temperature):
    """GKD's, of the same tokens in float32."""
    pytest.importorskip("trl")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher, batch = model_of(0), model_of(1), batch_of(pairs_of())
    own, gradients = learned(student, taught_by(teacher), batch, beta=beta, temperature=temperature)
    of_student, of_teacher = (
        model(**batch.inputs).logits.flatten(0, -2)[batch.positions] for model in (student, teacher)
    )
    student.zero_grad()
    loss = GKDTrainer.generalized_jsd_loss(
        of_student[None], of_teacher.detach()[None], batch.labels[None], beta, temperature
    )
    loss.backward()
    assert own == pytest.approx(float(loss.detach()), rel=1e-6, abs=1e-6)
    for mine, weight in zip(gradients, student.parameters()):
        assert (mine - weight.grad).abs().max() < 1e-6 * max(1, weight.grad.abs().max())


@pytest.mark.parametrize("stored", [False, True], ids=["a teacher", "stored"])
def test_no_tensor_holds_all_logits_of_either_model(monkeypatch, stored):
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 7 * 8 * 1009)
    student, teacher = model_of(0, vocab=1009), model_of(1, vocab=1009)
    batch, companion = batch_of(pairs_of(40)), taught_by(teacher)
    tokens = len(batch.labels)
    if stored:
        ids = torch.arange(5).repeat(tokens, 1)
        columns = {"teacher_ids": ids.int(), "teacher_logprobs": torch.full(ids.shape, -3.0)}
        batch, companion = dataclasses.replace(batch, token_columns=columns), None
    with Largest() as largest:
        learned(student, companion, batch, beta=0.5, sft_weight=0.1)
    assert largest.numbers < tokens * 1009 / 4  # the most is a layer's states, of all tokens


# ------------------------------------------------------------------- the reverse KL of completions

END, MOST = 2, 3
"""The token that ends a completion, and the tokens after which it is cut."""
COMPLETIONS = sorted(
    {
        each[: each.index(END) + 1] if END in each else each
        for each in itertools.product(range(3), repeat=MOST)
    }
)
"""All of three tokens: END, or one of two others and what may follow."""
BEGINNINGS = sorted({each[:place] for each in COMPLETIONS for place in range(len(each))})


class Enumerated(Policy):
    """All completions of a table of logits [beginnings, 3], with the exact divergence from another.

    Its tokens are those of COMPLETIONS, one completion after the other.
    """

    def __init__(self, seed):
        super().__init__(model=None, companion=lambda batch, want: Answers(distribution="theirs"))
        random = torch.Generator().manual_seed(seed)
        self.logits, self.others = torch.randn(
            2, len(BEGINNINGS), 3, generator=random, dtype=torch.float64
        )
        self.logits.requires_grad_()
        self.rows = [BEGINNINGS.index(c[:place]) for c in COMPLETIONS for place in range(len(c))]
        self.labels = [token for each in COMPLETIONS for token in each]

    def logprobs(self, logits):
        return logits.log_softmax(-1)[self.rows, self.labels]

    def __call__(self, batch, want, *, beta, **more):
        assert beta == 1
        mine, theirs = (each.log_softmax(-1)[self.rows] for each in (self.logits, self.others))
        return Answers(
            logprobs=self.logprobs(self.logits), divergence=(mine.exp() * (mine - theirs)).sum(-1)
        )

    def sums(self, of_tokens):
        """Add up over each completion."""
        return torch.stack([each.sum() for each in of_tokens.split([*map(len, COMPLETIONS)])])

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits)[0]


def minillm(policy, **settings):
    """(a batch of each completion, whose weights are their chances; settings; facts of it)."""
    own = fields.Distill(kind="distill", loss="minillm", beta=1.0, rollouts={}, **settings)
    old, teacher = (policy.logprobs(each).detach() for each in (policy.logits, policy.others))
    count = len(COMPLETIONS)
    scored = advantages.Scored(
        np.zeros(count), np.arange(count), np.cumsum([*map(len, COMPLETIONS)]),
        np.zeros(count, bool), old.numpy(), teacher=teacher.numpy(),
    )  # fmt: skip
    made, facts = OBJECTIVES["distill"].columns(scored, own)
    lengths = torch.tensor([*map(len, COMPLETIONS)])
    weights = policy.sums(old).exp().repeat_interleave(lengths)
    columns = {name: torch.from_numpy(values) for name, values in made.items()}
    batch = SimpleNamespace(
        labels=torch.tensor(policy.labels), token_columns={**columns, "old_logprobs": old},
        weights=weights,
    )  # fmt: skip
    return batch, own, facts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_mean_gradient_over_all_completions_is_that_of_their_reverse_kl(seed):
    """Each as likely as the model has it; without what a token changes for later ones it is not."""
    policy = Enumerated(seed)
    mine, theirs = (policy.sums(policy.logprobs(each)) for each in (policy.logits, policy.others))
    exact = (mine.exp() * (mine - theirs)).sum()
    wanted = policy.gradient(exact)
    batch, own, facts = minillm(policy, length_normalization=False)
    batch.token_columns["advantages"] *= batch.weights  # the divergence has a weight already
    alone, later, _ = (term.sum for term in OBJECTIVES["distill"].loss(policy, batch, own, {}))
    gradients = [policy.gradient(each) for each in (alone, later)]
    assert (sum(gradients) - wanted).abs().max() < 1e-12
    assert (gradients[0] - wanted).abs().max() > 1e-2
    assert float(alone.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    mean = (mine - theirs).detach().mean()
    assert facts["sequence_kl"] == pytest.approx(float(mean), abs=1e-12)


def test_what_a_token_changes_is_divided_by_the_number_of_later_ones():
    """By hand: rewards of two completions, of three tokens and of one."""
    rewards, ends = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 3, 3, 4])
    assert advantages.of_later(rewards, ends, mean=False).tolist() == [6, 4, 0, 0]
    assert advantages.of_later(rewards, ends, mean=True).tolist() == [3, 4, 0, 0]
    assert advantages.of_later(rewards[:0], np.array([0, 0]), mean=True).shape == (0,)


def test_after_the_first_step_of_a_phase_a_token_moves_no_further_than_the_clip():
    policy = Enumerated(0)
    batch, own, _ = minillm(policy)
    gain = batch.token_columns["advantages"]
    with torch.no_grad():
        policy.logits += 0.5 * torch.randn_like(policy.logits)
    ratio = (policy.logprobs(policy.logits) - batch.token_columns["old_logprobs"]).exp()
    stops = ((ratio > 1.2) & (gain > 0)) | ((ratio < 0.8) & (gain < 0))
    assert stops.any()
    _, later, _ = (term.sum for term in OBJECTIVES["distill"].loss(policy, batch, own, {}))
    wanted = policy.gradient(-torch.where(stops, 0, ratio * gain).sum())
    assert (policy.gradient(later) - wanted).abs().max() < 1e-12


# ------------------------------------------------------------------------------------- whole runs


def teacher_of(workshop, name="teacher", **changes):
    larger = {**TINY_LLAMA, "hidden_size": 48}
    own = {"model__config": larger, "train__max_steps": 8, "run__seed": 1, **changes}
    return workshop.train(name, **own) / "model"


def test_a_run_comes_near_its_teacher_and_resumes_exactly(workshop, capsys):
    teacher = teacher_of(workshop)
    own = {
        "objective__kind": "distill", "objective__teacher": str(teacher), "train__epochs": 2,
        "train__max_steps": 8, "data__eval_fraction": 0.2, "checkpoint__every_steps": 4,
        "checkpoint__keep_last": 9,
    }  # fmt: skip
    whole = workshop.train("whole", **own)
    assert f"teacher     {teacher}: " in capsys.readouterr().out
    lines = read_jsonl(whole / "metrics.jsonl")
    assert lines[-1]["divergence"] < lines[0]["divergence"] / 2
    assert {"divergence", "cross_entropy"} <= read_jsonl(whole / "eval.jsonl")[-1].keys()
    workshop.train("cut", **own)
    cut = workshop.run_dir("cut")
    shutil.rmtree(cut / "checkpoints" / "step-00000008")
    (cut / "outcome.json").unlink()
    assert losses(workshop.train("cut", **own)) == losses(whole)
    one, other = ((run / "model" / "model.safetensors").read_bytes() for run in (whole, cut))
    assert one == other


@pytest.mark.proof
def test_a_run_does_not_resume_beside_another_teacher(workshop):
    teacher = teacher_of(workshop)
    own = {
        "objective__kind": "distill", "objective__teacher": str(teacher), "train__max_steps": 4,
        "checkpoint__every_steps": 2, "checkpoint__keep_last": 9,
    }  # fmt: skip
    workshop.train("cut", **own)
    cut = workshop.run_dir("cut")
    shutil.rmtree(cut / "checkpoints" / "step-00000004")
    (cut / "outcome.json").unlink()
    other = teacher_of(workshop, "other", run__seed=2)
    shutil.rmtree(teacher)
    shutil.copytree(other, teacher)
    with pytest.raises(RunDirectoryError, match="weights of the teacher"):
        workshop.train("cut", **own)


def on_policy(workshop, **more):
    """Settings of a run whose first weights are those of its teacher, but for what `more` says."""
    teacher = teacher_of(workshop)
    same = sampled.settings(workshop, "distill", **pretrained(teacher), **more)
    del same["objective__rewards"]
    return same | {"objective__teacher": str(teacher), "objective__beta": 1.0}


def test_from_a_teacher_that_it_equals_minillm_learns_exactly_nothing_of_later_tokens(
    workshop, capsys
):
    """Both say the same of each token to the bit; a resumed run is the whole one, to the bit."""
    own = on_policy(workshop, objective__loss="minillm", train__max_steps=3,
                    rollouts={"steps_per_phase": 2}, checkpoint__every_steps=1,
                    checkpoint__keep_last=9)  # fmt: skip
    whole = workshop.train("whole", **own)
    assert "reward" not in capsys.readouterr().out  # without rewards, none is 0
    assert all("reward" not in each for each in read_jsonl(whole / "samples.jsonl"))
    first, second, _ = read_jsonl(whole / "metrics.jsonl")
    assert (first["long_range"], first["sequence_kl"], first["ratio"]) == (0, 0, 1)
    assert first["divergence"] == pytest.approx(0, abs=1e-6)
    assert second["ratio"] != 1
    groups = read_jsonl(whole / "rollouts" / "phase-00001.jsonl")[1:-1]
    rollouts = [each for group in groups for each in group["rollouts"]]
    assert all(each["teacher"] == each["old_logprobs"] for each in rollouts)
    workshop.train("cut", **own)
    cut_at(workshop, 1)
    assert losses(workshop.train("cut", **own)) == losses(whole)
    one, other = (
        (workshop.run_dir(name) / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "cut")
    )
    assert one == other


def padded_to(model, size, folder):
    """A copy of a saved model with more rows for tokens that do not exist, as Qwen2.5's sizes."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    opened = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    opened.resize_token_embeddings(size, mean_resizing=False)
    opened.save_pretrained(folder)
    return folder


def test_a_teacher_with_more_rows_than_tokens_teaches_the_same(workshop):
    """Beside the model and stored; a model with more rows may not sample what its teacher lacks."""
    teacher = teacher_of(workshop)
    padded = padded_to(teacher, 272, workshop.folder / "padded")
    own = {"objective__kind": "distill", "train__max_steps": 2, "objective__beta": 0.5}
    runs = [
        workshop.train(name, **own, objective__teacher=str(which))
        for name, which in (("plain", teacher), ("padded_run", padded))
    ]
    one, other = ([line["divergence"] for line in read_jsonl(r / "metrics.jsonl")] for r in runs)
    assert other == pytest.approx(one, rel=1e-6)
    own |= {**pretrained(padded), "objective__teacher": str(teacher)}
    own["objective__rollouts"] = {"max_new_tokens": 8}
    with pytest.raises(ModelError, match="has 261 rows .*has 272, and could sample a token"):
        workshop.check("larger", **own)


def quantised_as(teacher, form):
    """The model in 4 or 8 bits, as transformers opens it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"load_in_8bit": True} if form == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    }  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(
        teacher, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
    )


@pytest.mark.proof
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_a_teacher_in_few_bits_says_what_its_dequantised_weights_say(workshop, capsys, form):
    teacher = teacher_of(workshop, model__config={**TINY_LLAMA, "hidden_size": 64})
    made, names = {}, ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for name in ("saved", "dequantised"):
        made[name] = workshop.folder / name
        packed = quantised_as(teacher, form)
        (packed if name == "saved" else packed.dequantize()).save_pretrained(made[name])
        for file in names:
            shutil.copy(teacher / file, made[name])
    own = {"objective__kind": "distill", "train__max_steps": 2, "objective__beta": 0.5}
    beside = {name: {"objective__teacher": str(folder)} for name, folder in made.items()}
    beside["loaded"] = {"objective__teacher": str(teacher), "objective__teacher_quantization": form}
    beside["whole"] = {"objective__teacher": str(teacher)}
    found, capsys_of = {}, {}
    for name, which in beside.items():
        run = workshop.train(name, **own, **which)
        found[name] = [line["divergence"] for line in read_jsonl(run / "metrics.jsonl")]
        capsys_of[name] = capsys.readouterr().out
    doubly = "" if form == "int8" else ", doubly quantised"
    assert f"frozen ({form}{doubly}, float32" in capsys_of["saved"]
    assert found["saved"] == found["loaded"]
    # The products of int8 round their inputs, too
    close = 1e-2 if form == "int8" else 1e-5
    assert found["loaded"] == pytest.approx(found["dequantised"], rel=close)
    assert found["loaded"] != pytest.approx(found["whole"], rel=1e-4)
    with pytest.raises(ConfigError, match=r"teacher_quantization: nf4 would be ignored: .*saved"):
        workshop.check("no", **own, **beside["saved"], objective__teacher_quantization="nf4")


@pytest.mark.proof
@pytest.mark.parametrize("loss", ["gkd", "minillm"])
def test_completions_of_the_student_are_learned_from_its_teacher(workshop, loss):
    """The same however a step is cut up; rewards are only logged."""
    teacher = teacher_of(workshop, train__max_steps=20)
    own = {
        "objective__kind": "distill", "objective__teacher": str(teacher), "objective__beta": 1.0,
        "objective__loss": loss,
        "objective__rollouts": {"max_new_tokens": 8, "cut_answers": "learn", "passes": 2},
        "train__epochs": 4, "train__max_steps": 20,
    }  # fmt: skip
    run = workshop.train("run", **own)
    lines = read_jsonl(run / "metrics.jsonl")
    assert lines[-1]["divergence"] < lines[0]["divergence"] / 2
    assert "reward" not in lines[0]
    assert lines[0]["completion_length"] > 1
    sealed = (run / "rollouts" / "phase-00001.jsonl").read_text()
    # Else a pass over all completions that nothing would read
    assert ("old_logprobs" in sealed) == ('"teacher"' in sealed) == (loss == "minillm")
    own |= {"train__max_steps": 4, "train__micro_batch_size": 1}
    own |= {"objective__rewards": [{"kind": "exact_match"}], "data__eval_fraction": 0.1}
    alone = workshop.train("alone", **own)
    own["train__micro_batch_size"] = 4
    assert losses(workshop.train("four", **own)) == pytest.approx(losses(alone), rel=1e-4)
    assert read_jsonl(alone / "metrics.jsonl")[0]["reward"] == 0
    assert "reward" in read_jsonl(alone / "eval.jsonl")[-1]


@pytest.mark.proof
@pytest.mark.parametrize(
    ("loss", "form"), [("gkd", None), ("minillm", None), ("minillm", "nf4")], ids=str
)
def test_processes_learn_like_one_from_their_own_completions(workshop, loss, form):
    """A copy of the teacher for each process, or shards; in few bits always a copy."""
    teacher = teacher_of(workshop, train__max_steps=20)
    own = sampled.settings(
        workshop, "distill", objective__teacher=str(teacher),
        objective__beta=1.0 if loss == "minillm" else 0.5, objective__loss=loss,
        objective__teacher_quantization=form, train__micro_batch_size=4,
    )  # fmt: skip
    del own["objective__rewards"]
    alone, arguments = workshop.train("alone", **own), []
    for topology in ("ddp", "fsdp2", "zero2", "zero3"):
        config = workshop.config(topology, **own)
        arguments += [f"topology:{topology}", workshop.write(config)]
    launch = several(workshop.folder, "ddp", 2, *arguments)
    assert launch.codes() == [0, 0], launch.output()
    for topology in ("ddp", "fsdp2", "zero2", "zero3"):
        run = workshop.run_dir(topology)
        assert losses(run) == pytest.approx(losses(alone), rel=1e-4), topology
        one, other = weights(run), weights(alone)
        assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one), topology


# -------------------------------------------------------------------------------------- bad input


def with_teacher(workshop, teacher, **changes):
    own = {"objective__kind": "distill", "objective__teacher": str(teacher), **changes}
    return workshop.check("student", **own)


def test_a_teacher_with_another_tokenizer_is_refused(workshop):
    teacher = teacher_of(workshop, model__new_tokens=["<|a|>"])
    with pytest.raises(ModelError, match=r"objective.teacher: its tokenizer is another: 1 of 262"):
        with_teacher(workshop, teacher)


@pytest.mark.proof
def test_ids_that_differ_name_the_first_token(workshop):
    teacher = teacher_of(workshop)
    path = teacher / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"2 of 261 tokens differ, such as 'a' \(.*id .*id "):
        with_teacher(workshop, teacher)


def test_a_folder_that_is_no_model_is_refused(workshop):
    teacher = teacher_of(workshop)
    with pytest.raises(ModelError, match=r"objective.teacher: .* is a run directory"):
        with_teacher(workshop, teacher.parent)
    with pytest.raises(ModelError, match=r"objective.teacher: .*no such folder"):
        with_teacher(workshop, "no/such/folder")


@pytest.mark.proof
def test_a_teacher_with_too_few_positions_is_refused(workshop):
    short = {**TINY_LLAMA, "max_position_embeddings": 64}
    teacher = teacher_of(workshop, model__config=short, data__max_length=64,
                         data__truncation="right")  # fmt: skip
    with pytest.raises(ConfigError, match=r"objective.teacher: .*only 64 positions"):
        with_teacher(workshop, teacher)


def test_settings_that_would_be_ignored_are_refused(workshop):
    teacher = workshop.folder
    with pytest.raises(ConfigError, match="objective.rewards: would be ignored without"):
        with_teacher(workshop, teacher, objective__rewards=[{"kind": "exact_match"}])
    with pytest.raises(ConfigError, match="objective.rewards: an evaluation of completions"):
        with_teacher(workshop, teacher, objective__rollouts={}, data__eval_fraction=0.1)
    with pytest.raises(ConfigError, match="dynamic_sampling: would be ignored: .*distill learns"):
        with_teacher(workshop, teacher, objective__rollouts={"dynamic_sampling": 1.0})
    with pytest.raises(
        ConfigError, match="objective.rollouts: the rows hold no distributions for new"
    ):
        workshop.check("student", objective__kind="distill", objective__rollouts={})
    with pytest.raises(ConfigError, match="objective.sft_weight: the rows' own answers are not"):
        with_teacher(workshop, teacher, objective__rollouts={}, objective__sft_weight=0.1)
    of_completions = {"objective__loss": "minillm", "objective__beta": 1.0}
    with pytest.raises(ConfigError, match="objective.loss: minillm learns from completions of"):
        with_teacher(workshop, teacher, **of_completions)
    of_completions["objective__rollouts"] = {"temperature": 0.5}
    with pytest.raises(ConfigError, match="objective.temperature: 1, but .* sampled at 0.5"):
        with_teacher(workshop, teacher, **of_completions)
    with pytest.raises(ConfigError, match="objective.beta: 0, but objective.loss: minillm"):
        with_teacher(workshop, teacher, objective__loss="minillm", objective__rollouts={})
    with pytest.raises(ConfigError, match="length_normalization: would be ignored"):
        with_teacher(workshop, teacher, objective__length_normalization=False)
    with pytest.raises(ConfigError, match="objective.teacher_revision: would be ignored"):
        with_teacher(workshop, teacher, objective__teacher_revision="main")
    with pytest.raises(ConfigError, match="objective.teacher_dtype: would be ignored"):
        workshop.check("student", objective__kind="distill", objective__teacher_dtype="float32")


@pytest.mark.proof
def test_another_architecture_with_its_tokenizer_teaches(workshop):
    gpt = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    teacher = teacher_of(workshop, model__config=gpt)
    run = workshop.train(objective__kind="distill", objective__teacher=str(teacher),
                         train__max_steps=1)  # fmt: skip
    assert read_jsonl(run / "metrics.jsonl")[0]["divergence"] > 0


# ------------------------------------------------------------------------------------------ memory


@pytest.mark.proof
def test_the_forecast_counts_the_teacher(workshop):
    """Whole where each process has a copy, a part and a whole projection where they have shards."""
    from finetune import config as configs
    from finetune.engine.topology.launch import ParallelConfig
    from finetune.forecast.choice import Chooser

    teacher = teacher_of(workshop)

    def forecast(parallel, **changes):
        file = workshop.write(workshop.config("plan", **changes))
        config = configs.parse(["--config", str(file)])[0]
        return Chooser(config, precision="fp32", on_gpu=False).forecast(parallel, 1)

    own = {"objective__kind": "distill", "objective__teacher": str(teacher)}
    one, four = ParallelConfig("single", 1), ParallelConfig("fsdp2", 4)
    alone, beside = forecast(one), forecast(one, **own)
    size = 4 * sum(p.numel() for p in _opened(teacher).parameters())
    assert beside.device["teacher"] == pytest.approx(size)
    assert beside.peak >= alone.peak + size
    shared = forecast(four, **own).device["teacher"]
    assert shared == pytest.approx(size / 4 + 4 * 48 * 261)
    own["objective__teacher_quantization"] = "nf4"
    packed = sum(
        p.numel() for name, p in _opened(teacher).named_parameters()
        if "proj" in name
    )  # fmt: skip
    for parallel in (one, four):
        few = forecast(parallel, **own).device["teacher"]
        assert few == pytest.approx(size - packed * (4 - (4 + 0.127) / 8), rel=1e-4)


def _opened(model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model)
