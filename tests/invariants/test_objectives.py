"""Objectives of a user's own: cut up, packed or shared between processes, they learn the same."""

import pytest
from conftest import Workshop, losses, read_jsonl
from faults.forked import fork
from invariants import objectives
from safetensors.torch import load_file

from finetune.data.batches import Batches

SIX = {
    "train__max_steps": 6, "train__epochs": 9, "train__global_batch_size": 4, "optimizer__lr": 1e-3,
    "data__max_length": 256,
    "data__eval_fraction": 0.2,
}  # fmt: skip
WAYS = {
    "at once": {"train__micro_batch_size": 4},
    "one by one": {"train__micro_batch_size": 1},
    "padded": {"train__micro_batch_size": 2, "model__attention": "sdpa"},
}


def curves(run):
    """Every number of its logs that comes from the model."""
    kept = ("loss", "grad_norm", "unlikelihood", "margin", "eval_loss", "cross_entropy")
    lines = [
        line
        for name in ("metrics.jsonl", "eval.jsonl")
        if (run / name).exists()
        for line in read_jsonl(run / name)
    ]
    return [line[name] for line in lines for name in kept if name in line]


@pytest.mark.slow
@pytest.mark.parametrize("objective", objectives.SETTINGS)
def test_splitting_and_layout_of_a_step_change_nothing(workshop, objective):
    own = SIX | objectives.SETTINGS[objective]
    runs = [workshop.train(name.replace(" ", "_"), **own, **way) for name, way in WAYS.items()]
    for run in runs[1:]:
        assert curves(run) == pytest.approx(curves(runs[0]), rel=1e-4)
    assert losses(runs[0])[-1] != losses(runs[0])[0]
    line = read_jsonl(runs[0] / "metrics.jsonl")[-1]
    assert {"Dft": set(), "Unlikelihood": {"unlikelihood"}, "Pairwise": {"margin"}}[
        objective
    ] <= line.keys()


def test_a_total_of_only_one_micro_batch_would_be_caught(workshop, monkeypatch):
    """A deliberate break: each sum divided by what the first micro-batch alone counts."""
    monkeypatch.setattr(Batches, "totals", lambda batches, step: batches.at(step)[0].counts)
    own = {**SIX, **objectives.SETTINGS["Dft"], "train__max_steps": 1}
    one, other = (
        workshop.train(f"run{size}", **own, train__micro_batch_size=size) for size in (4, 1)
    )
    assert curves(other) != pytest.approx(curves(one), rel=1e-4)


@pytest.mark.parametrize("objective", objectives.SETTINGS)
def test_packed_examples_get_the_gradients_they_get_alone(workshop, objective):
    """One step over all rows, so that packs hold the same examples as the steps without them."""
    whole = {
        **SIX,
        **objectives.SETTINGS[objective],
        "train__max_steps": 3,
        "train__global_batch_size": 40,
        "data__eval_fraction": 0,
    }
    alone = workshop.train("alone", **whole, train__micro_batch_size=8)
    packed = workshop.train(
        "packed", **whole | {"data__max_length": 512}, train__micro_batch_size=1, data__packing=True
    )
    assert curves(packed) == pytest.approx(curves(alone), rel=1e-4)


CONTEXT = ["fsdp2_context"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("topologies", "processes"),
    [(["ddp", "zero3"], 2), pytest.param(["fsdp2"], 2, marks=pytest.mark.proof), (CONTEXT, 4)],
    ids=["two", "fsdp2", "context"],
)
def test_several_processes_train_like_one(tmp_path, topologies, processes):
    from invariants.test_topologies import FOUR

    workshop, arguments = Workshop(tmp_path), []
    settings = {**SIX, "train__micro_batch_size": 1, "data__packing": True}
    for name, own in objectives.SETTINGS.items():
        workshop.train(f"{name}_alone", **settings, **own)
    for topology in topologies:
        arguments += [f"topology:{topology}"] if processes == 2 else []
        for name, own in objectives.SETTINGS.items():
            config = workshop.config(f"{topology}_{name}", **settings, **own)
            arguments.append(str(workshop.write(config)))
    logs = [tmp_path / f"{rank}.log" for rank in range(processes)]
    launch = fork(
        "distributed.many_runs", arguments, topologies[0], logs, {}, FOUR.get(topologies[0], [])
    )
    assert launch.codes(280) == [0] * processes, launch.output()
    for topology in topologies:
        for name in objectives.SETTINGS:
            own, alone = workshop.run_dir(f"{topology}_{name}"), workshop.run_dir(f"{name}_alone")
            assert curves(own) == pytest.approx(curves(alone), rel=1e-4), (topology, name)
            one, other = (load_file(run / "model/model.safetensors") for run in (own, alone))
            assert all((one[key] - other[key]).abs().max() < 1e-4 for key in one), (topology, name)
