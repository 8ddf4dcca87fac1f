"""The average of the weights follows its formula through training, checkpoints and export."""

import pytest
import torch
from conftest import Workshop, losses, pretrained, read_jsonl
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from finetune.errors import ExportError

EVERY = {
    "checkpoint__every_steps": 1, "checkpoint__keep_last": 99, "data__eval_fraction": 0.2,
    "train__micro_batch_size": 8,
}  # fmt: skip


def weights_of_step(run, step, kind="model"):
    file = run / f"weights-{step}.pt"
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}" / "shards", file)
    return torch.load(file)[kind]


def exported(run):
    return load_file(run / "model/model.safetensors")


@pytest.mark.slow
def test_the_exported_average_follows_its_formula_and_leaves_training_unchanged(workshop):
    plain = workshop.train("plain", **EVERY)
    run = workshop.train(**EVERY, train__ema_decay=0.25)
    assert losses(run) == losses(plain)
    with pytest.raises(
        ExportError, match="no weight changed"
    ):  # so its checkpoint holds what all began with
        workshop.train("start", **EVERY, optimizer__lr=1e-30, train__max_steps=1)
    average = {
        name: tensor.clone()
        for name, tensor in weights_of_step(workshop.run_dir("start"), 1).items()
    }
    for step in range(1, 5):
        decay = min(
            0.25, (1 + step) / (10 + step)
        )  # 2/11, 3/12, 4/13 and 5/14: from step 2 on it is 0.25
        for name, tensor in weights_of_step(plain, step).items():
            average[name] = decay * average[name] + (1 - decay) * tensor
    for name, tensor in exported(run).items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-5, atol=1e-6)
    evals = [read_jsonl(r / "eval.jsonl")[-1]["eval_loss"] for r in (run, plain)]
    assert evals[0] != evals[1]


@pytest.mark.slow
def test_resumed_averages_are_uninterrupted_averages(workshop, tmp_path):
    settings = {**EVERY, "train__ema_decay": 0.9, "evaluation__every_steps": 2}
    whole = workshop.train("run", **settings)
    (tmp_path / "other").mkdir()
    other = Workshop(tmp_path / "other")
    run = other.copy_of(whole, left_out=("outcome.json", "model", "step-00000003", "step-00000004"))
    other.train(**settings)
    assert losses(run) == losses(whole)
    assert read_jsonl(run / "eval.jsonl") == read_jsonl(whole / "eval.jsonl")
    assert all(torch.equal(tensor, exported(whole)[name]) for name, tensor in exported(run).items())


def test_the_best_averages_are_exported(workshop):
    """At this rate the loss goes up and down: the best evaluation is not the last."""
    run = workshop.train(
        train__ema_decay=0.5, data__eval_fraction=0.2, evaluation__every_steps=1,
        evaluation__export_best=True, optimizer__lr=1.0, schedule__kind="constant",
        train__max_steps=6, train__epochs=9,
    )  # fmt: skip
    found = {line["step"]: line["eval_loss"] for line in read_jsonl(run / "eval.jsonl")}
    best = min(found, key=found.get)
    assert best < 6
    averages = weights_of_step(run, best, "ema")
    assert all(torch.equal(tensor, averages[name]) for name, tensor in exported(run).items())


@pytest.mark.slow
def test_averages_of_an_adapter(workshop):
    base = workshop.train("base", train__max_steps=1) / "model"
    run = workshop.train(
        **pretrained(base), adapter__kind="lora", adapter__dropout=0.1, train__ema_decay=0.9
    )
    averages = weights_of_step(run, 5, "ema")
    saved = load_file(run / "model/adapter_model.safetensors")
    for name, tensor in saved.items():
        assert torch.equal(tensor, averages[name.replace(".weight", ".default.weight")])
