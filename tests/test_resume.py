"""A run that was interrupted ends as one that was not."""

from pathlib import Path

import pytest
import torch
from conftest import Workshop, losses, read_jsonl
from safetensors.torch import load_file


class Interrupted(Exception):
    pass


def train_until(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, step: int, name: str, **changes) -> Path:
    """Train and die, without any goodbye, as step `step` begins."""
    from finetune.engine import step as steps

    whole, done = steps.train_step, []

    def dying(*arguments, **keywords):
        if len(done) == step:
            raise Interrupted
        done.append(1)
        return whole(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(steps, "train_step", dying)
        with pytest.raises(Interrupted):
            workshop.train(name, **changes)
    return workshop.run_dir(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__packing": True},
        {"data__group_by_length": True, "schedule__kind": "cosine", "schedule__warmup_steps": 3},
        {"model__config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "attention_dropout": 0.1, "tie_word_embeddings": True}},
    ],
    ids=["packed", "grouped, cosine", "tied, dropout"],
)  # fmt: skip
def test_resumed_equals_uninterrupted_to_the_bit(workshop, monkeypatch, changes):
    """Interrupted at step 9, two steps after a save, in the middle of the second epoch."""
    settings = {"train__epochs": 3, "train__max_steps": 12, "checkpoint__every_steps": 7, **changes}
    whole = workshop.train("whole", **settings)
    train_until(workshop, monkeypatch, 9, "parts", **settings)
    parts = workshop.train("parts", **settings)
    assert losses(parts) == losses(whole)
    assert [line["lr"] for line in read_jsonl(parts / "metrics.jsonl")] == [
        line["lr"] for line in read_jsonl(whole / "metrics.jsonl")
    ]
    before, after = load_file(whole / "model/model.safetensors"), load_file(parts / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_lora_resumes_to_the_bit(workshop, monkeypatch):
    base = workshop.train("base")
    lora = {
        "model__init": "pretrained", "model__path": str(base / "model"), "model__config": None, "model__tokenizer": None,
        "adapter__kind": "lora", "adapter__dropout": 0.1, "train__max_steps": 6, "train__epochs": 2, "checkpoint__every_steps": 2,
    }  # fmt: skip
    whole = workshop.train("whole", **lora)
    train_until(workshop, monkeypatch, 5, "parts", **lora)
    parts = workshop.train("parts", **lora)
    assert losses(parts) == losses(whole)
    before, after = (load_file(r / "model/adapter_model.safetensors") for r in (whole, parts))
    assert all(torch.equal(before[name], after[name]) for name in before)
    shards = sum(f.stat().st_size for f in (parts / "checkpoints").glob("step-00000006/shards/*"))
    assert shards < (base / "model/model.safetensors").stat().st_size, "frozen weights must not be in a checkpoint"
