"""The same run under every topology: the same losses, gradients and weights as one process alone.

A tiny model, answers of very different lengths, an epoch whose last step is too small for all
processes. Every file of accelerate_configs/ and ds_configs/ is launched here, or in
tests/distributed/test_nodes.py.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY_LLAMA, Workshop, forget_process_state, losses, read_jsonl
from distributed.test_nodes import FILES as ON_NODES
from faults.nursery import Launch, fork, in_the_long_form
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# float32: sums in another order; over 20 steps they grew to 1.4e-6 of the loss and 1.5e-5 of the gradient norm.
# Gradient norms are compared as well, since Adam divides a wrong factor out again.
LOSS, NORM, WEIGHT = 1e-5, 1e-4, 1e-4
# bf16 keeps 8 bits, in which DeepSpeed computes norms and residuals, too, where autocast leaves float32: 2.6e-3 of the
# gradient norm over four seeds. At ten times the learning rate roundings grow into other runs, by up to a quarter.
HALF, SLOWLY = 6e-3, {"optimizer__lr": 1e-3}
TWELVE = {"train__max_steps": 12, "train__epochs": 9, "train__micro_batch_size": 2, "data__eval_fraction": 0.2}
TIED = {**TINY_LLAMA, "tie_word_embeddings": True}
EIGHT = {"train__max_steps": 8}
CASES = {
    "untied": {"train__micro_batch_size": 1},
    "tied": {"model__config": TIED},
    "clipped": {"train__max_grad_norm": 0.1, **EIGHT},
    "packed_recomputed": {
        "data__packing": True,
        "train__gradient_checkpointing": True,
        "train__micro_batch_size": 1,
        **EIGHT,
    },
    "padded": {"model__attention": "sdpa", "data__group_by_length": True, **EIGHT},
    "lora": {
        "adapter__kind": "lora",
        "adapter__modules_to_save": ["input_layernorm", "norm", "post_attention_layernorm"],
        "model__new_tokens": ["<|a|>"],
        **EIGHT,
        "evaluation__sample_prompts": ["what is 3 times three"],
        "evaluation__sample_max_new_tokens": 4,
    },
    "qlora": {"adapter__kind": "qlora", **EIGHT},
    "bf16": {"train__precision": "bf16", **SLOWLY, **EIGHT},
    "weights_in_bf16": {"model__dtype": "bfloat16", "train__precision": "bf16", **SLOWLY, **EIGHT},
    "as_many_as_fit": {"train__micro_batch_size": "auto", **EIGHT},
    "compiled": {"train__compile": True, **EIGHT},
}
NOT_ZERO = ["weights_in_bf16", "as_many_as_fit"]
ALL, PLAIN = [case for case in CASES if case not in NOT_ZERO], ["untied", "tied"]
LAUNCHES = [
    ("single", 1, PLAIN), ("cpu_debug", 2, PLAIN), ("ddp", 2, list(CASES)),
    ("fsdp2", 2, list(CASES)), ("fsdp2", 1, PLAIN), ("fsdp2_offload", 2, [*PLAIN, "lora"]),
    ("fsdp2_hybrid", 4, PLAIN), ("fsdp2_context", 4, ["untied", "packed_recomputed"]),
    ("zero1", 2, [*PLAIN, "lora"]), ("zero1", 1, PLAIN), ("zero2", 2, ALL), ("zero2", 1, PLAIN),
    ("zero3", 2, [case for case in ALL if case != "compiled"]), ("zero3", 1, PLAIN), ("zero3_offload", 2, [*PLAIN, "lora"]),
]  # fmt: skip
LONG = [("zero1", 1), ("zero2", 1)]
RESUMED = [("ddp", 2), ("fsdp2", 2), ("zero2", 2), ("zero3", 2)]
FOUR = {
    "fsdp2_hybrid": ["--parallelism_config_dp_replicate_size", "2", "--parallelism_config_dp_shard_size", "2"],
    "fsdp2_context": ["--parallelism_config_cp_size", "2", "--parallelism_config_dp_shard_size", "2"],
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Workshop:
    """Every case by one process, in this one; nothing compiled."""
    workshop = Workshop(tmp_path_factory.mktemp("alone"))
    for name in CASES:
        forget_process_state()
        workshop.train(name, **settings(workshop, name) | {"train__compile": False})
    return workshop


def settings(workshop: Workshop, case: str) -> dict:
    changes = {**TWELVE, **CASES[case]}
    if "adapter__kind" in changes:  # on the tied model, trained before
        path = str(workshop.run_dir("tied") / "model")
        changes |= {"model__init": "pretrained", "model__path": path, "model__config": None, "model__tokenizer": None}
    return changes


def several(folder: Path, topology: str, processes: int, *arguments: object) -> Launch:
    """tests/distributed/several.py, once it has ended, in processes with the environment that the launcher gives them."""
    said = [folder / f"{rank}.log" for rank in range(processes)]
    launch = fork("distributed.several", [*map(str, arguments)], topology, said, {}, FOUR.get(topology, []))
    launch.codes(500)
    return launch


def difference(run, reference) -> dict[str, float]:
    """Largest difference of losses and gradient norms (as parts of them), of weights, and of the last evaluation."""
    found = {}
    for name in ("loss", "grad_norm"):
        pairs = [
            (one[name], other[name])
            for one, other in zip(*(read_jsonl(r / "metrics.jsonl") for r in (reference, run)), strict=True)
        ]
        found[name] = max(abs(one - other) / one for one, other in pairs)
    one, other = (load_file(next((r / "model").glob("*.safetensors"))) for r in (reference, run))
    assert {n: (w.shape, w.dtype) for n, w in one.items()} == {n: (w.shape, w.dtype) for n, w in other.items()}
    found["weight"] = max(float((one[name] - other[name]).abs().max()) for name in one)
    one, other = (read_jsonl(r / "eval.jsonl")[-1]["eval_loss"] for r in (reference, run))
    found["eval"] = abs(one - other) / one
    return found


def agree(found: dict[str, float], half: bool = False) -> bool:
    if half:
        return max(found["loss"], found["eval"], found["grad_norm"]) <= HALF
    return max(found["loss"], found["eval"]) <= LOSS and found["grad_norm"] <= NORM and found["weight"] <= WEIGHT


@pytest.mark.parametrize(("topology", "processes", "cases"), [pytest.param(*each, marks=in_the_long_form if each[:2] in LONG else ()) for each in LAUNCHES], ids=lambda v: "" if isinstance(v, list) else str(v))  # fmt: skip
def test_every_topology_is_one_process(alone, workshop, topology, processes, cases):
    files = []
    for case in cases:
        config = workshop.config(case, **settings(alone, case))
        config["data"]["train"] = str(alone.rows)
        files.append(workshop.write(config))
    if (topology, processes) in RESUMED:
        ten = {
            "train__micro_batch_size": 2,
            "train__max_steps": 10,
            "train__epochs": 9,
            "checkpoint__every_steps": 4,
            "checkpoint__keep_last": 9,
        }
        if topology in ("fsdp2", "zero3"):
            ten = settings(alone, "lora") | ten
        whole, parts = (workshop.write(workshop.config(name, **ten)) for name in ("whole", "parts"))
        files += [whole, parts, f"forget:{workshop.run_dir('parts')}:4", parts]
    launch = several(workshop.folder, topology, processes, *files)
    assert launch.codes() == [0] * processes, launch.said()
    found = {case: difference(workshop.run_dir(case), alone.run_dir(case)) for case in cases}
    assert not {case: value for case, value in found.items() if not agree(value, "bf16" in case)}
    if (topology, processes) in RESUMED:
        assert "parts/checkpoints/step-00000004 at step 4" in launch.said()
        assert losses(workshop.run_dir("parts")) == losses(workshop.run_dir("whole"))
        one, other = (
            load_file(next((workshop.run_dir(n) / "model").glob("*.safetensors"))) for n in ("whole", "parts")
        )
        assert all(bool((one[name] == other[name]).all()) for name in one)
    receipt = json.loads((workshop.run_dir(cases[0]) / "receipt.json").read_text())
    assert (receipt["num_processes"], receipt["topology"]) == (processes, {"cpu_debug": "ddp"}.get(topology, topology))


def test_what_is_broken_on_purpose_is_seen(alone, workshop):
    """The tests above can fail: by a wrong factor, by wrong means; and one process's part is never exported as the whole."""
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
    assert re.search(r".*: logits of 100% of the tokens differ, by up to", launch.said())
    assert not (workshop.run_dir("one_shard") / "model").exists()


def test_every_topology_file_is_launched_by_a_test():
    launched = {f"{topology}.yaml" for topology, _, _ in LAUNCHES} | {f"{topology}.yaml" for topology in ON_NODES}
    files = {path.name: path.read_text() for path in (ROOT / "accelerate_configs").iterdir()}
    assert launched == set(files)
    named = {name for text in files.values() for name in re.findall(r"ds_configs/(\w+\.json)", text)}
    assert named == {path.name for path in (ROOT / "ds_configs").iterdir()}
