"""Objectives of a user's own, and of other families of models: cut up, packed or shared between
processes, they learn the same.
"""

import re

import pytest
from conftest import losses, pretrained, read_jsonl, short
from faults.forked import weights
from invariants import families, objectives
from invariants.test_topologies import several

from finetune.data.batches import Batches

FOUR_STEPS = {
    "train__max_steps": 4, "train__epochs": 9, "train__global_batch_size": 4, "optimizer__lr": 1e-3,
    "data__max_length": 256,
    "data__eval_fraction": 0.2,
}  # fmt: skip
WAYS = {
    "at once": {"train__micro_batch_size": 4},
    "one by one": {"train__micro_batch_size": 1},
    "padded": {"train__micro_batch_size": 2, "model__attention": "sdpa"},
}
TERMS = {
    "Unlikelihood": "unlikelihood", "Pairwise": "margin", "Scored": "value", "Near": "divergence",
    "kto": "z", "distill": "divergence",
}  # fmt: skip


ALL = [*objectives.SETTINGS, *families.SETTINGS]
PACKED = [*objectives.SETTINGS, *families.PACKED]


def settings_of(workshop, objective):
    """The settings of one objective; adapters get a base."""
    if objective in families.SETTINGS:
        return FOUR_STEPS | {"data__max_length": 120} | families.settings(workshop, objective)
    own = FOUR_STEPS | objectives.SETTINGS[objective]
    if own.get("adapter__kind") == "lora":
        base = workshop.train("base", train__max_steps=2) / "model"
        return own | pretrained(base) | {"optimizer__lr": 1e-2}
    return own


def curves(run):
    """Every number of its logs that comes from the model."""
    kept = ("loss", "grad_norm", *TERMS.values(), "eval_loss", "cross_entropy")
    lines = [
        line
        for name in ("metrics.jsonl", "eval.jsonl")
        if (run / name).exists()
        for line in read_jsonl(run / name)
    ]
    return [line[name] for line in lines for name in kept if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("objective", short(ALL, "Scored", "mlm", "seq2seq", "dpo"))
def test_splitting_and_layout_of_a_step_change_nothing(workshop, objective):
    own = settings_of(workshop, objective)
    runs = [workshop.train(name.replace(" ", "_"), **own, **way) for name, way in WAYS.items()]
    for run in runs[1:]:
        assert curves(run) == pytest.approx(curves(runs[0]), rel=1e-4)
    assert losses(runs[0])[-1] != losses(runs[0])[0]
    line = read_jsonl(runs[0] / "metrics.jsonl")[-1]
    assert TERMS.get(objective, "loss") in line


def test_a_total_of_only_one_micro_batch_would_be_caught(workshop, monkeypatch):
    """A deliberate break: each sum divided by what the first micro-batch alone counts."""
    monkeypatch.setattr(Batches, "totals", lambda batches, step: batches.at(step)[0].counts)
    own = {**FOUR_STEPS, **objectives.SETTINGS["Dft"], "train__max_steps": 1}
    one, other = (
        workshop.train(f"run{size}", **own, train__micro_batch_size=size) for size in (4, 1)
    )
    assert curves(other) != pytest.approx(curves(one), rel=1e-4)


@pytest.mark.parametrize("objective", short(PACKED, "mlm", "dpo"))
def test_packed_examples_get_the_gradients_they_get_alone(workshop, objective):
    """One step over all rows, so that packs hold the same examples as the steps without them."""
    whole = {
        **settings_of(workshop, objective),
        "train__max_steps": 3,
        "train__global_batch_size": 40,
        "data__eval_fraction": 0,
    }
    alone = workshop.train("alone", **whole, train__micro_batch_size=8)
    packed = workshop.train(
        "packed", **whole | {"data__max_length": 512}, train__micro_batch_size=1, data__packing=True
    )
    assert curves(packed) == pytest.approx(curves(alone), rel=1e-4)


# Processes, and topologies one after the other with their objectives.
# Layers stay whole until a backward pass: after one without gradient they would be stale.
WHOLE = "fsdp2:--fsdp_reshard_after_forward:false"
LAUNCHES = {
    "two": (
        2,
        {
            "ddp": ["Unlikelihood"],
            "fsdp2": ["distill"],
            WHOLE: ["Scored"],
            "zero3": ["seq2seq"],
        },
    ),
    # Sums of documents and their columns, of processes that share a sequence
    "context": (4, {"fsdp2_context": ["dpo"]}),
    "two in full": (
        2,
        {"ddp": ALL, "fsdp2": ALL, WHOLE: ALL, "zero2": ["distill"], "zero3": ALL},
    ),
    "context in full": (4, {"fsdp2_context": PACKED}),
}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("launched", short([*LAUNCHES], "two"))
def test_several_processes_train_like_one(workshop, launched):
    processes, topologies = LAUNCHES[launched]
    settings = {"train__micro_batch_size": 1, "data__packing": True, "train__max_steps": 3}
    settings |= {"evaluation__every_steps": 1}
    unpacked = {*families.SETTINGS} - {*families.PACKED}
    arguments, runs, alone, own = [], [], {}, {}
    for name in sorted({name for names in topologies.values() for name in names}):
        own[name] = settings_of(workshop, name) | settings
        own[name]["data__packing"] = name not in unpacked
        alone[name] = workshop.train(f"{name}_alone", **own[name])
    for topology, names in topologies.items():
        arguments += [f"topology:{topology}"] if processes == 2 else []
        for name in names:
            config = workshop.config(re.sub(r"\W+", "_", f"{topology}_{name}"), **own[name])
            arguments.append(workshop.write(config))
            runs.append((workshop.run_dir(config["run"]["name"]), alone[name]))
    launch = several(workshop.folder, next(iter(topologies)), processes, *arguments)
    assert launch.codes() == [0] * processes, launch.output()
    for shared, single in runs:
        assert curves(shared) == pytest.approx(curves(single), rel=1e-4), shared
        one, other = (weights(run) for run in (shared, single))
        assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one), shared
