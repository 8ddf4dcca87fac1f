"""The same run under every topology: the same losses, gradients and weights as one process alone.

A tiny model, answers of very different lengths, an epoch whose last step is too small for all
processes. Every file of accelerate_configs/ and ds_configs/ is launched here, or in
tests/distributed/test_nodes.py.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY_LLAMA, Workshop, losses, made_once, read_jsonl
from distributed.test_nodes import FILES as ON_NODES
from faults.forked import Launch, fork
from safetensors.torch import load_file

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
    "clipped": {"train__max_grad_norm": 0.1},
    "packed_recomputed": {
        "data__packing": True,
        "train__gradient_checkpointing": True,
        "train__micro_batch_size": 1,
    },
    "padded": {"model__attention": "sdpa", "data__group_by_length": True},
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
# Of each launch: processes, and topologies one after the other, with their cases. Each case runs
# under one of each kind of sharing; tests/invariants/test_trajectories.py has tied, packed,
# adapters and quantised bases under each.
SHORT = {
    "two": (2, {
        "ddp": ["untied", "compiled"],
        "fsdp2": [case for case in CASES if case not in ("tied", "qlora", "compiled", "bf16")],
        "fsdp2_offload": ["tied"],
        "zero1": ["untied"], "zero2": ["bf16"], "zero3": ["clipped", "padded", "packed_recomputed"],
    }),
    "hybrid": (4, {"fsdp2_hybrid": ["untied"]}),
}  # fmt: skip
LONG = {
    "single": (1, {"single": PLAIN}), "cpu_debug": (2, {"cpu_debug": PLAIN}),
    "ddp": (2, {"ddp": list(CASES)}),
    "fsdp2": (2, {"fsdp2": list(CASES)}), "fsdp2 of one": (1, {"fsdp2": PLAIN}),
    "fsdp2_offload": (2, {"fsdp2_offload": [*PLAIN, "lora"]}),
    "hybrid in full": (4, {"fsdp2_hybrid": PLAIN}),
    "context in full": (4, {"fsdp2_context": ["untied", "packed_recomputed"]}),
    "zero1": (2, {"zero1": [*PLAIN, "lora"]}), "zero1 of one": (1, {"zero1": PLAIN}),
    "zero2": (2, {"zero2": ALL}),
    "zero2 of one": (1, {"zero2": PLAIN}),
    "zero3": (2, {"zero3": [case for case in ALL if case != "compiled"]}),
    "zero3 of one": (1, {"zero3": PLAIN}),
    "zero3_offload": (2, {"zero3_offload": [*PLAIN, "lora"]}),
}  # fmt: skip
LAUNCHES = SHORT | LONG
RESUMED = {"ddp", "fsdp2", "zero2", "zero3"}
FOUR = {
    "fsdp2_hybrid": [
        "--parallelism_config_dp_replicate_size",
        "2",
        "--parallelism_config_dp_shard_size",
        "2",
    ],
    "fsdp2_context": [
        "--parallelism_config_cp_size",
        "2",
        "--parallelism_config_dp_shard_size",
        "2",
    ],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Workshop:
    """Every case by one process, in this one; nothing compiled."""

    def train(folder: Path) -> None:
        workshop = Workshop(folder)
        for name in CASES:
            workshop.train(name, **settings(workshop, name) | {"train__compile": False})

    return Workshop(made_once(tmp_path_factory, "alone", train))


def settings(workshop: Workshop, case: str) -> dict:
    changes = {**SIX, **CASES[case]}
    if "adapter__kind" in changes:  # on the tied model, trained before
        path = str(workshop.run_dir("tied") / "model")
        changes |= {
            "model__init": "pretrained",
            "model__path": path,
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
    one, other = (load_file(next((r / "model").glob("*.safetensors"))) for r in (reference, run))
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
    workshop: Workshop, alone: Workshop, topology: str, cases: list[str], is_resumed: bool
) -> list[object]:
    """List many_runs.py's arguments for one topology: each case, then its resumption at step 4."""
    files: list[object] = [f"topology:{topology}"]
    for case in cases:
        config = workshop.config(case, **settings(alone, case))
        config["run"]["dir"] = str(workshop.folder / topology)
        config["data"]["train"] = str(alone.rows)
        files.append(workshop.write(config).rename(workshop.folder / f"{topology}-{case}.yaml"))
    if is_resumed:
        method = settings(alone, "lora") if topology == "fsdp2" else SIX
        resumed = {
            "train__micro_batch_size": 2,
            "checkpoint__every_steps": 4,
            "checkpoint__keep_last": 9,
            "run__dir": str(workshop.folder / topology),
        }
        whole, parts = (
            workshop.write(workshop.config(name, **method | resumed)).rename(
                workshop.folder / f"{topology}-{name}.yaml"
            )
            for name in ("whole", "parts")
        )
        files += [whole, parts, f"forget:{workshop.folder / topology / 'parts'}:4", parts]
    return files


@pytest.mark.parametrize(
    "launched",
    [pytest.param(name, marks=pytest.mark.proof if name in LONG else ()) for name in LAUNCHES],
)
def test_every_topology_trains_like_one_process(alone, workshop, launched):
    processes, topologies = LAUNCHES[launched]
    resumed = {"zero2", "zero3"} if launched == "two" else {launched} & RESUMED
    files = [] if launched in LONG else ["compiler:aot_eager"]
    for topology, cases in topologies.items():
        own = files_of(workshop, alone, topology, cases, topology in resumed)
        files += own if processes == 2 else own[1:]
    launch = several(workshop.folder, next(iter(topologies)), processes, *files)
    assert launch.codes() == [0] * processes, launch.output()
    found = {
        (topology, case): difference(workshop.folder / topology / case, alone.run_dir(case))
        for topology, cases in topologies.items()
        for case in cases
    }
    assert not {case: value for case, value in found.items() if not agree(value, "bf16" in case[1])}
    output = launch.logs[0].read_text()
    for topology in resumed:
        whole, parts = (workshop.folder / topology / name for name in ("whole", "parts"))
        assert f"{parts}/checkpoints/step-00000004 at step 4" in output
        assert losses(parts) == losses(whole)
        one, other = (
            load_file(next((run / "model").glob("*.safetensors"))) for run in (whole, parts)
        )
        assert all(bool((one[name] == other[name]).all()) for name in one)
    for topology, cases in topologies.items():
        receipt = json.loads((workshop.folder / topology / cases[0] / "receipt.json").read_text())
        kind = {"cpu_debug": "ddp"}.get(topology, topology)
        assert (receipt["num_processes"], receipt["topology"]) == (processes, kind)


def test_deliberate_errors_are_detected(alone, workshop):
    """The tests above can fail: by a wrong factor, wrong means, or a part exported as the whole."""
    names = ["forgotten_factor", "mean_of_means", "one_shard"]
    files = []
    for name in names:
        config = workshop.config(name, **settings(alone, "untied"))
        config["data"]["train"] = str(alone.rows)
        files += [f"break:{name}", workshop.write(config)]
    launch = several(workshop.folder, "fsdp2", 2, *files)
    for name in names[:2]:
        assert not agree(difference(workshop.run_dir(name), alone.run_dir("untied"))), name
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
