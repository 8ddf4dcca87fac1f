"""Objectives where they are rarely tried: on a base in 4 bits, with compiled layers."""

import shutil

import pytest
import torch
from conftest import TINY_LLAMA, Workshop, pretrained, read_jsonl, write_jsonl
from invariants import sampled
from safetensors.torch import load_file
from test_preference import cut_at

from finetune.export.load import load

pytestmark = [pytest.mark.slow, pytest.mark.proof]
BASE = TINY_LLAMA | {"hidden_size": 64}
QLORA = {"adapter__kind": "qlora", "adapter__r": 4}
FOUR = {
    "train__max_steps": 4, "train__global_batch_size": 8, "train__micro_batch_size": 4,
    "train__epochs": 9, "checkpoint__every_steps": 2, "checkpoint__keep_last": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("base"))
    return str(made.train("base", model__config=BASE) / "model")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    made = Workshop(tmp_path_factory.mktemp("teacher"))
    return str(made.train("teacher", model__config=BASE, run__seed=1) / "model")


PAIRS = [{"prompt": f"{n}?", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(16)]
JUDGED = [{"prompt": f"{n}?", "completion": f"yes {n}", "label": n % 3 > 0} for n in range(16)]
STEPS = [{"prompt": f"{n}?", "steps": ["so", f"{n}"], "labels": [True, n > 8]} for n in range(16)]
CASES = {
    "reward": PAIRS, "dpo": PAIRS, "kto": JUDGED, "process_reward": STEPS, "distill": None,
    "distill of the student": None, "grpo": None, "ppo": None, "grpo with norms": None,
}  # fmt: skip


def settings(workshop, base, teacher, case):
    """The settings of a run; grpo compares with the base, adapters off or in a copy."""
    kind, rows, own = case.split()[0], CASES[case], {**pretrained(base), **FOUR}
    if kind in ("grpo", "ppo"):
        own = sampled.settings(workshop, kind, objective__beta=0.05) | own
        own["train__global_batch_size"] = 16
    if kind == "distill":
        own["objective__teacher"] = teacher
    if case == "distill of the student":
        own |= {"objective__rollouts": {"max_new_tokens": 12}, "train__micro_batch_size": 2}
    if rows is not None:
        own["data__train"] = str(write_jsonl(workshop.folder / "rated.jsonl", rows))
    return {**own, "objective__kind": kind}


NUMBERS = {"step", "epoch", "lr", "loss", "grad_norm", "reward", "kl", "margin", "divergence", "z"}


def seen(run):
    lines = read_jsonl(run / "metrics.jsonl")
    return [{name: line[name] for name in NUMBERS & line.keys()} for line in lines]


@pytest.mark.parametrize("case", CASES)
def test_it_starts_resumes_exactly_and_exports(workshop, base, teacher, case):
    """The export was opened and compared by the run; what is resumed ends with the same bytes."""
    own = settings(workshop, base, teacher, case) | QLORA
    own |= {"adapter__train_norms": True} if "norms" in case else {}
    run = workshop.train("cut", **own)
    whole = shutil.copytree(run, workshop.folder / "whole")
    [saved] = (whole / "model").glob("adapter_model.safetensors")
    if "kl" in seen(run)[0]:
        assert seen(run)[0]["kl"] == 0, "what is compared with is what was trained"
        assert seen(run)[-1]["kl"] > 0
    if case == "dpo":
        assert seen(run)[0]["margin"] == 0
    cut_at(workshop, 2)
    again = workshop.train("cut", **own)
    assert seen(again) == seen(whole)
    assert (again / "model" / saved.name).read_bytes() == saved.read_bytes()
    assert any(load_file(saved)[name].any() for name in load_file(saved) if "lora_B" in name)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", [case for case in CASES if "norms" not in case])
def test_compiled_layers_learn_the_same(workshop, base, teacher, monkeypatch, case):
    """By aot_eager, which captures the same graphs, and generates no code."""
    own = settings(workshop, base, teacher, case)
    alone = seen(workshop.train("alone", **own))
    compile_, calls = torch.compile, []

    def counted(*arguments, **keywords):
        calls.append(keywords)
        return compile_(*arguments, **keywords, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", counted)
    compiled = seen(workshop.train("compiled", **own, train__compile=True))
    assert len(calls) == BASE["num_hidden_layers"]
    for one, other in zip(compiled, alone, strict=True):
        assert one == {name: pytest.approx(value, rel=1e-4, abs=1e-6)
                       for name, value in other.items()}  # fmt: skip


def test_adapters_switched_off_are_a_frozen_copy_to_the_bit(workshop, base):
    run = workshop.train(**settings(workshop, base, None, "dpo"), **QLORA)
    model = load(run / "model")
    copy = load(run / "model").unload()
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.equal(off, copy(input_ids=ids).logits)
        assert not torch.equal(off, model(input_ids=ids).logits)
