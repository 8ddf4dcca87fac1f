"""Reference trajectories: what small runs compute, step by step, as committed in trajectories.json.

    python tests/invariants/trajectories.py            compare every case with its reference
    python tests/invariants/trajectories.py --record   replace the references; say why in the commit

Each case trains a two-layer model for 12 steps. On the kind of CPU and the library versions of the
record, losses, gradient norms and exported weights are equal to the bit. Elsewhere sums run in
another order, so values agree within `NEAR`, and their differences have no common sign: an error
that is small but always on one side is a change of the computation, not of its rounding.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import TINY_LLAMA, Workshop, read_jsonl

FILE = Path(__file__).with_suffix(".json")
# Float32 sums in another order, as parts of the value. AVX2 instead of AVX-512: losses moved by up
# to 6.5e-8, norms by 2.2e-7, the mean of the signed differences of losses by 1.1e-8. Muon's
# Newton-Schulz is in bfloat16: 5.1e-7, 4.5e-6, 1.8e-7.
NEAR, ONE_SIDED = 1e-6, 5e-8
WIDER = {
    "muon": 10,
    "bf16": 6000,
}  # how many times; bf16: as tests/invariants/test_topologies.py has it

SMALL = {
    "optimizer__lr": 1e-3,
    "train__max_steps": 12,
    "train__epochs": 9,
    "train__micro_batch_size": 2,
    "data__eval_fraction": 0.2,
}
TIED = {"model__config": {**TINY_LLAMA, "tie_word_embeddings": True}}
LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__r": 4}
OPTIMIZERS = [
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "adafactor",
    "muon",
]
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": TIED,
    "clm": {"objective__kind": "clm", "data__format": "question_answer"},
    "packed": {"data__packing": True},
    "padded": {"model__attention": "sdpa"},
    "grouped_by_length": {"data__group_by_length": True},
    "accumulated": {"train__micro_batch_size": 1},
    "smoothed": {"objective__label_smoothing": 0.1},
    "neftune": {"train__neftune_alpha": 5.0},
    "ema": {"train__ema_decay": 0.9},
    "recomputed": {"train__gradient_checkpointing": True},
    "bf16": {"train__precision": "bf16"},
    "clipped": {
        "train__max_grad_norm": 0.1, "schedule__kind": "cosine", "schedule__warmup_steps": 3,
    },
    "lora": LORA,
    "lora_norms_and_tokens": {
        **LORA, "adapter__modules_to_save": ["input_layernorm", "norm", "post_attention_layernorm"],
        "model__new_tokens": ["<|a|>"],
    },
    "qlora": {"adapter__kind": "qlora", "adapter__r": 4},
    **{name: {"optimizer__kind": name} for name in OPTIMIZERS},
}  # fmt: skip
SHARED = ["tied", "packed", "lora", "qlora"]  # under every kind of sharing
TOPOLOGIES = ["ddp", "fsdp2", "zero2", "zero3"]


def settings(case: str, base: Path) -> dict[str, Any]:
    """Changes to a workshop's run config; adapters train on an exported model."""
    changes = {**SMALL, **CASES[case]}
    if "adapter__kind" in changes:
        changes |= {
            "model__init": "pretrained",
            "model__path": str(base),
            "model__config": None,
            "model__tokenizer": None,
        }
    return changes


def of(run: Path) -> dict[str, Any]:
    """Return losses and gradient norms by step, and hash and norm of the exported weights."""
    import torch
    from safetensors.torch import load_file

    lines = read_jsonl(run / "metrics.jsonl")
    [file] = (run / "model").glob("*.safetensors")
    digest, squares = hashlib.sha256(), 0.0
    for name, tensor in sorted(load_file(file).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        squares += float(tensor.double().square().sum())
    return {
        "loss": [line["loss"] for line in lines],
        "grad_norm": [line["grad_norm"] for line in lines],
        "weights": [squares**0.5],
        "sha256": digest.hexdigest(),
    }


def differences(
    run: dict[str, Any], reference: dict[str, Any], exact: bool, wider: int = 1
) -> list[str]:
    """Return how a trajectory differs from its reference beyond rounding."""
    if exact:
        return [name for name in reference if run[name] != reference[name]]
    found = []
    for name in ("loss", "grad_norm", "weights"):
        if len(run[name]) != len(reference[name]):
            return [f"{name}: {len(run[name])} steps instead of {len(reference[name])}"]
        relative = [
            (one - other) / abs(other)
            for one, other in zip(run[name], reference[name], strict=True)
        ]
        worst = max(range(len(relative)), key=lambda step: abs(relative[step]))
        if not abs(relative[worst]) <= NEAR * wider:
            found.append(
                f"{name} of step {worst + 1}: {relative[worst]:+.1e} of it, more than "
                f"{NEAR * wider:.0e}"
            )
        mean = sum(relative) / len(relative)
        if name == "loss" and not abs(mean) <= ONE_SIDED * wider:
            found.append(
                f"loss drifts to one side: {mean:+.1e} of it on average, more than "
                f"{ONE_SIDED * wider:.0e}"
            )
    return found


def machine() -> dict[str, str]:
    """What equality to the bit depends on."""
    import bitsandbytes
    import torch
    import transformers

    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": model[1] if model else "unknown",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__,
        "bitsandbytes": bitsandbytes.__version__,
    }  # fmt: skip


def references() -> tuple[dict[str, str], dict[str, Any]]:
    """The machine of the record, and the trajectory of each case."""
    recorded = json.loads(FILE.read_text())
    return recorded["machine"], recorded["trajectories"]


def train(folder: Path, alone: list[str], shared: dict[str, list[str]]) -> dict[str, Any]:
    """Cases by one process, in this one, then by two under one topology after the other.

    `alone` has "tied", on which adapters train.
    """
    workshop = Workshop(folder)
    base = workshop.run_dir("tied") / "model"
    for name in sorted(alone, key=lambda name: name != "tied"):
        workshop.train(name, **settings(name, base))
    found = {name: of(workshop.run_dir(name)) for name in alone}
    return found | _by_two(workshop, base, shared) if shared else found


def _by_two(workshop: Workshop, base: Path, shared: dict[str, list[str]]) -> dict[str, Any]:
    from faults.forked import fork

    arguments, runs = [], {}
    for topology, names in shared.items():
        arguments.append(f"topology:{topology}")
        for name in names:
            config = workshop.config(f"{topology}-{name}", **settings(name, base))
            arguments.append(str(workshop.write(config)))
            runs[f"{topology}/{name}"] = workshop.run_dir(f"{topology}-{name}")
    logs = [workshop.folder / f"{rank}.log" for rank in range(2)]
    launch = fork("distributed.many_runs", arguments, "ddp", logs, {}, [])
    assert launch.codes(300) == [0, 0], launch.output()
    return {name: of(run) for name, run in runs.items()}


def record(trajectories: dict[str, Any]) -> None:
    """One line for each case, so that a diff shows which have changed."""
    lines = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in trajectories.items()
    )
    FILE.write_text(
        f'{{\n  "machine": {json.dumps(machine())},\n  "trajectories": {{\n{lines}\n  }}\n}}\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="replace the references")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = train(Path(folder), [*CASES], dict.fromkeys(TOPOLOGIES, SHARED))
    if arguments.record:
        record(runs)
        return 0
    recorded_on, expected = references()
    exact, wrong = machine() == recorded_on, 0
    print(
        "equal to the bit is asked"
        if exact
        else f"recorded on {recorded_on}, this is {machine()}: nearness is asked"
    )
    for name, trajectory in runs.items():
        differs = differences(trajectory, expected[name], exact, WIDER.get(name, 1))
        wrong += bool(differs)
        print(f"{name:24} {'; '.join(differs) or 'as recorded'}")
    return int(wrong > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
