"""The same run under every topology: the same losses, gradients and weights as one process alone.

A tiny model, answers of very different lengths, an epoch whose last step is too small for all
processes. Every file of accelerate_configs/ and ds_configs/ is launched here, or in
tests/distributed/test_nodes.py.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_LLAMA, Workshop, losses, made_once, read_jsonl
from distributed.many_runs import whole_of
from distributed.test_nodes import FILES as ON_NODES
from faults.forked import Launch, forget, fork, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# float32: sums in another order; over 20 steps they grew to 1.4e-6 of the loss and 1.5e-5 of the
# gradient norm. Gradient norms are compared as well, since Adam divides a wrong factor out again.
LOSS, NORM, WSIX = 1e-5, 1e-4, 1e-4
# bf16 keeps 8 bits, in which DeepSpeed computes norms and residuals, too, where autocast leaves
# float32: 2.6e-3 of the gradient norm over four seeds. At ten times the learning rate roundings
# grow into other runs, by up to a quarter.
HALF, SLOWLY = 6e-3, {"optimizer__lr": 1e-3}
SIX = {
    "train__max_steps": 6,
    "train__epochs": 9,
    "train__micro_batch_size": 2,
    "data__eval_fraction": 0.2,
}
CASES = {
    "untied": {},
    "tied": {"model__config": {**TINY_LLAMA, "tie_word_embeddings": True}},
    "packed_recomputed_clipped": {
        "data__packing": True,
        "train__gradient_checkpointing": True,
        "train__micro_batch_size": 1,
        "train__max_grad_norm": 0.1,
    },
    "padded_clipped": {
        "model__attention": "sdpa",
        "data__group_by_length": True,
        "train__max_grad_norm": 0.1,
    },
    "lora": {
        "adapter__kind": "lora",
        "adapter__modules_to_save": ["input_layernorm", "norm", "post_attention_layernorm"],
        "model__new_tokens": ["<|a|>"],
        "evaluation__sample_prompts": ["what is 3 times three"],
        "evaluation__sample_max_new_tokens": 4,
    },
    "qlora": {"adapter__kind": "qlora"},
    "bf16": {"train__precision": "bf16", **SLOWLY},
    "weights_in_bf16": {"model__dtype": "bfloat16", "train__precision": "bf16", **SLOWLY},
    "as_many_as_fit": {"train__micro_batch_size": "auto"},
    "compiled": {"train__compile": True},
}
NOT_ZERO = ["weights_in_bf16", "as_many_as_fit"]
ALL, PLAIN = [case for case in CASES if case not in NOT_ZERO], ["untied", "tied"]
LIKE_UNTIED = ["as_many_as_fit", "compiled"]  # whose run by one process is that of "untied"
# Of each launch: processes, and topologies one after the other, with their cases. Each case runs
# under one kind of sharing; tests/faults/test_elastic.py has tied weights under FSDP2, and
# tests/invariants/test_trajectories.py a quantised base of one process.
SHORT = {
    "two": (2, {
        "ddp": ["as_many_as_fit"], "fsdp2": ["lora", "weights_in_bf16"], "fsdp2_offload": ["tied"],
        "zero1": ["padded_clipped"], "zero2": ["bf16"],
        "zero3": ["packed_recomputed_clipped"],
    }),
}  # fmt: skip
LONG = {
    "single": (1, {"single": PLAIN}), "cpu_debug": (2, {"cpu_debug": PLAIN}),
    "ddp": (2, {"ddp": list(CASES)}),
    "fsdp2": (2, {"fsdp2": list(CASES)}), "fsdp2 of one": (1, {"fsdp2": PLAIN}),
    "fsdp2_offload": (2, {"fsdp2_offload": [*PLAIN, "lora"]}),
    "hybrid": (4, {"fsdp2_hybrid": PLAIN}),
    "context in full": (4, {"fsdp2_context": ["untied", "packed_recomputed_clipped"]}),
    "zero1": (2, {"zero1": [*PLAIN, "lora"]}), "zero1 of one": (1, {"zero1": PLAIN}),
    "zero2": (2, {"zero2": ALL}),
    "zero2 of one": (1, {"zero2": PLAIN}),
    "zero3": (2, {"zero3": [case for case in ALL if case != "compiled"]}),
    "zero3 of one": (1, {"zero3": PLAIN}),
    "zero3_offload": (2, {"zero3_offload": [*PLAIN, "lora"]}),
}  # fmt: skip
LAUNCHES = SHORT | LONG
# Trained a second time from the checkpoint of step 4, to the same bits: in the short form by one of
# each way to save. tests/faults/test_kills.py resumes DDP.
RESUMED = {"fsdp2": "lora", "zero2": "bf16", "zero3": "packed_recomputed_clipped"}
RESUMED_IN_LONG = {**RESUMED, "ddp": "as_many_as_fit"}
FOUR = {
    name: f"--parallelism_config_{what}_size 2 --parallelism_config_dp_shard_size 2".split()
    for name, what in (("fsdp2_hybrid", "dp_replicate"), ("fsdp2_context", "cp"))
}


def test_each_way_to_save_is_resumed_in_the_short_form():
    short = {name: cases for _, found in SHORT.values() for name, cases in found.items()}
    assert {name for name, case in RESUMED.items() if case not in short[name]} == set()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Callable[[str], Path]:
    """Return a function: the run of a case by one process, trained when first asked for."""

    def run_of(case: str) -> Path:
        case = "untied" if case in LIKE_UNTIED else case

        def train(folder: Path) -> None:
            Workshop(folder).train(**settings(case, run_of))

        return Workshop(made_once(tmp_path_factory, f"alone-{case}", train)).run_dir()

    return run_of


def settings(case: str, alone: Callable[[str], Path]) -> dict:
    changes = {**SIX, **CASES[case]}
    if "adapter__kind" in changes:
        changes |= {
            "model__init": "pretrained",
            "model__path": str(alone("tied") / "model"),
            "model__config": None,
            "model__tokenizer": None,
        }
    return changes


def several(folder: Path, topology: str, processes: int, *arguments: object) -> Launch:
    """Run many_runs.py to the end in processes with the launcher's environment."""
    logs = [folder / f"{rank}.log" for rank in range(processes)]
    launch = fork(
        "distributed.many_runs", [*map(str, arguments)], topology, logs, {}, FOUR.get(topology, [])
    )
    launch.codes(500)
    return launch


def difference(run, reference) -> dict[str, float]:
    """Return the largest relative difference of losses, norms, weights and evaluations."""
    found = {}
    for name in ("loss", "grad_norm"):
        pairs = [
            (one[name], other[name])
            for one, other in zip(
                *(read_jsonl(r / "metrics.jsonl") for r in (reference, run)), strict=True
            )
        ]
        found[name] = max(abs(one - other) / one for one, other in pairs)
    one, other = weights(reference), weights(run)
    assert {n: (w.shape, w.dtype) for n, w in one.items()} == {
        n: (w.shape, w.dtype) for n, w in other.items()
    }
    found["weight"] = max(float((one[name] - other[name]).abs().max()) for name in one)
    one, other = (read_jsonl(r / "eval.jsonl")[-1]["eval_loss"] for r in (reference, run))
    found["eval"] = abs(one - other) / one
    return found


def agree(found: dict[str, float], half: bool = False) -> bool:
    if half:
        return max(found["loss"], found["eval"], found["grad_norm"]) <= HALF
    return (
        max(found["loss"], found["eval"]) <= LOSS
        and found["grad_norm"] <= NORM
        and found["weight"] <= WSIX
    )


def files_of(
    workshop: Workshop, alone: Callable[[str], Path], topology: str, cases: list[str],
    resumed: str | None,
):  # fmt: skip
    """List many_runs.py's arguments for one topology: each case, one of them resumed at step 4."""
    saves = {"checkpoint__every_steps": 4, "checkpoint__keep_last": 9}
    for case in cases:
        is_resumed = case == resumed
        own = {**settings(case, alone), "run__dir": str(workshop.folder / topology)}
        config = workshop.write(workshop.config(case, **own, **saves if is_resumed else {}))
        file = config.rename(workshop.folder / f"{topology}-{case}.yaml")
        yield file
        if is_resumed:
            yield from (f"forget:{workshop.folder / topology / case}:4", file)


@pytest.mark.parametrize(
    "launched",
    [pytest.param(name, marks=pytest.mark.proof if name in LONG else ()) for name in LAUNCHES],
)
def test_every_topology_trains_like_one_process(alone, workshop, launched, capfd):
    processes, topologies = LAUNCHES[launched]
    resumed_case = RESUMED_IN_LONG if launched in LONG else RESUMED
    files = []
    for topology, cases in topologies.items():
        files += [f"topology:{topology}"] if processes == 2 else []
        files += files_of(workshop, alone, topology, cases, resumed_case.get(topology))
    launch = several(workshop.folder, next(iter(topologies)), processes, *files)
    assert launch.codes() == [0] * processes, launch.output()
    output = launch.logs[0].read_text()
    for topology, cases in topologies.items():
        runs = {case: workshop.folder / topology / case for case in cases}
        found = {case: difference(run, alone(case)) for case, run in runs.items()}
        assert not {
            case: value for case, value in found.items() if not agree(value, "bf16" in case)
        }
        resumed = runs.get(resumed_case.get(topology))
        if resumed:
            assert f"{resumed}/checkpoints/step-00000004 at step 4" in output
            assert_equal(resumed, whole_of(resumed))
        if resumed and (topology, resumed.name) == ("fsdp2", "lora"):
            moved = workshop.folder / "moved/lora"  # one process goes on with what two have saved
            shutil.copytree(whole_of(resumed), moved)
            forget(moved, 4)
            own = settings("lora", alone) | {"checkpoint__every_steps": 4}
            workshop.train("lora", **own, checkpoint__keep_last=9, run__dir=str(moved.parent))
            assert "lora/checkpoints/step-00000004 at step 4" in "".join(capfd.readouterr())
            assert agree(difference(moved, alone("lora")))
        receipt = json.loads((runs[cases[0]] / "receipt.json").read_text())
        kind = {"cpu_debug": "ddp"}.get(topology, topology)
        assert (receipt["num_processes"], receipt["topology"]) == (processes, kind)


@pytest.mark.proof  # test_recompute.py compares losses and gradients of compiled layers
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_train_like_the_others(alone, workshop, monkeypatch):
    """In one process, by aot_eager: it captures the same graphs, and generates no code."""
    aot_eager = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", aot_eager)
    run = workshop.train("compiled", **settings("compiled", alone))
    assert agree(difference(run, alone("compiled")))


def assert_equal(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    one, two = weights(run), weights(other)
    assert all(bool((one[name] == two[name]).all()) for name in one)


@pytest.mark.proof
def test_deliberate_errors_are_detected(alone, workshop):
    """The tests above can fail: by a wrong factor, wrong means, or a part exported as the whole."""
    names = ["forgotten_factor", "mean_of_means", "one_shard"]
    files = []
    for name in names:
        config = workshop.config(name, **settings("untied", alone))
        files += ["topology:fsdp2"] if name == "one_shard" else []
        files += [f"break:{name}", workshop.write(config)]
    launch = several(workshop.folder, "ddp", 2, *files)
    for name in names[:2]:
        assert not agree(difference(workshop.run_dir(name), alone("untied"))), name
    assert launch.codes() != [0, 0]
    assert re.search(r".*: logits of 100% of the tokens differ, by up to", launch.output())
    assert not (workshop.run_dir("one_shard") / "model").exists()


def test_every_topology_file_is_launched_by_a_test():
    launched = {
        f"{topology}.yaml" for _, topologies in LAUNCHES.values() for topology in topologies
    }
    launched |= {f"{topology}.yaml" for topology in ON_NODES}
    files = {path.name: path.read_text() for path in (ROOT / "accelerate_configs").iterdir()}
    assert launched == set(files)
    named = {
        name for text in files.values() for name in re.findall(r"ds_configs/(\w+\.json)", text)
    }
    assert named == {path.name for path in (ROOT / "ds_configs").iterdir()}
