"""Compare the loss and the cost of all tuning methods: the table of docs/methods.md.

    python benchmarks/methods.py learn      # loss of each method after the same steps
    python benchmarks/methods.py cost       # memory and speed of each, one at a time, alternating
    python benchmarks/methods.py table      # write the table from what has been measured

`learn` and `cost` start train.py as a user does and skip completed runs, so both can be interrupted
and started again. `learn`: a byte-level Llama of 1.8M parameters, pre-trained on the sentences of
the quickstart, learns to translate them. `cost`: a Llama of random weights; 47M parameters on a
CPU, the shape of Llama-2-7B on a GPU (--shape).
"""

import argparse
import itertools
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "runs" / "methods"
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- methods: begin -->", "<!-- methods: end -->"
PRETRAIN_STEPS, LEARN_STEPS = 150, 150
COST_STEPS, ROUNDS, WARM_STEPS = 6, 2, 2
SHAPES: dict[str, dict[str, Any]] = {
    "47M": {
        "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 9,
        "num_attention_heads": 10, "num_key_value_heads": 10,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    name: str
    settings: dict[str, Any]
    lrs: tuple[float, ...]
    when: str
    costs: bool = field(default=True)  # False: costs as much as another row of the table


def full(kind: str, lrs: tuple[float, ...], when: str) -> Method:
    return Method(f"all weights, {kind}", {"optimizer.kind": kind}, lrs, when)


def adapter(
    name: str, settings: dict[str, Any], when: str, kind: str = "lora", costs: bool = True
) -> Method:
    shape = {"adapter.kind": kind, "adapter.r": 16, "adapter.alpha": 32}
    return Method(name, shape | settings, (3e-3, 1e-2), when, costs)


ADAM, LION = (1e-3, 2e-3, 4e-3), (1e-4, 2e-4, 4e-4)
METHODS = [
    full("adamw", ADAM, "the reference, where memory allows"),
    full("adamw_8bit", ADAM, "its state at a quarter"),
    full("paged_adamw_32bit", ADAM, "GPU: the state in host memory when it does not fit"),
    full("paged_adamw_8bit", ADAM, "GPU: both"),
    full("lion", LION, "half of the state; a rate of a third to a tenth of Adam's"),
    full("lion_8bit", LION, "an eighth of the state"),
    full("adafactor", (3e-3, 1e-2, 3e-2), "next to no state"),
    full("muon", ADAM, "fewest steps to a loss, where all weights train"),
    Method("all weights, lower half frozen", {"adapter.freeze": "LOWER_HALF"}, ADAM,
           "keep what lower layers know, save gradients"),
    Method("all weights, gradient checkpointing", {"train.gradient_checkpointing": True}, ADAM[:1],
           "activations do not fit"),
    Method("all weights, ema 0.98", {"train.ema_decay": 0.98}, ADAM, "smooth the end of a run"),
    Method("all weights, neftune 5", {"train.neftune_alpha": 5}, ADAM,
           "few instructions; noise against overfitting", False),
    adapter("lora r 16", {}, "the first thing to try"),
    adapter("lora r 16, rslora", {"adapter.rslora": True}, "high ranks: alpha / sqrt(r)",
            costs=False),
    adapter("lora r 16, lora+ 8", {"optimizer.lora_plus_ratio": 8}, "B eight times faster",
            costs=False),
    adapter("lora r 16, dora", {"adapter.dora": True}, "nearer to full at low ranks; slower"),
    adapter("lora r 16, pissa", {"adapter.init": "pissa"},
            "starts from the largest singular values", costs=False),
    adapter("lora r 16, eva", {"adapter.init": "eva"}, "starts from the data's directions",
            costs=False),
    adapter("qlora nf4", {}, "a base that does not fit unquantised", "qlora"),
    adapter("qlora nf4, loftq", {"adapter.init": "loftq"},
            "adapters begin by repairing the quantisation", "qlora", False),
    adapter("qlora fp4", {"adapter.quantization": "fp4"}, "prefer nf4", "qlora"),
    adapter("qlora int8", {"adapter.quantization": "int8"},
            "closer to the base than 4 bits, twice the memory", "qlora"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["learn", "cost", "table"])
    parser.add_argument("--shape", choices=SHAPES, default="47M", help="cost: the model")
    parser.add_argument("--jobs", type=int, default=2, help="learn: runs at a time")
    parser.add_argument("--only", default="", help="regular expression: these methods")
    arguments = parser.parse_args()
    chosen = [method for method in METHODS if re.search(arguments.only, method.name)]
    if arguments.what == "learn":
        learn(chosen, arguments.jobs)
    elif arguments.what == "cost":
        cost(chosen, arguments.shape)
    else:
        write_table()


def learn(methods: list[Method], jobs: int) -> None:
    """Pre-train once, then run each method at each of its learning rates for the same steps."""
    if not (ROOT / "data/pig_latin/train.jsonl").exists():
        subprocess.run(
            [sys.executable, "data_scripts/pig_latin.py", "--output", "data/pig_latin"],
            cwd=ROOT,
            check=True,
        )
    train("configs/quickstart_pretrain.yaml", "base", {"train.max_steps": PRETRAIN_STEPS})
    runs = [(method, lr) for method in methods for lr in method.lrs]

    def one(run: tuple[Method, float]) -> None:
        method, lr = run
        settings = {
            "model.path": str(WORK / "base/model"), "optimizer.lr": lr,
            "train.max_steps": LEARN_STEPS, "train.global_batch_size": 16,
            "train.micro_batch_size": 16, "checkpoint.every_steps": None,
            "evaluation.every_steps": None, **resolved(method, num_layers=4),
        }  # fmt: skip
        train("configs/quickstart.yaml", f"{slug(method)}_{lr:g}", settings)
        print(f"{method.name}, lr {lr:g}: {eval_loss(method, lr):.3f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def cost(methods: list[Method], shape: str) -> None:
    """Run a few steps of each, in ROUNDS rounds, so that a slow minute affects all methods."""
    base = {
        "model.init": "random", "model.path": None, "model.tokenizer": "bytes",
        "model.config": {"model_type": "llama", "max_position_embeddings": 4096, **SHAPES[shape]},
        "data.train": "data/pig_latin/sentences.txt", "data.max_length": 512, "train.max_steps": 1,
        "train.global_batch_size": 1, "train.micro_batch_size": 1, "schedule.warmup_steps": 0,
    }  # fmt: skip
    train("configs/quickstart_pretrain.yaml", f"shape_{shape}", base)
    for round_, method in itertools.product(range(ROUNDS), [m for m in methods if m.costs]):
        settings = {
            "model.path": str(WORK / f"shape_{shape}/model"), "data.packing": True,
            "data.max_length": 512, "train.max_steps": COST_STEPS, "train.global_batch_size": 2,
            "train.micro_batch_size": 2, "schedule.warmup_steps": 1, "data.eval": None,
            "evaluation.every_steps": None, "checkpoint.every_steps": None, "optimizer.lr": 1e-5,
            **resolved(method, num_layers=SHAPES[shape]["num_hidden_layers"]),
        }  # fmt: skip
        name = f"cost_{shape}_{round_}_{slug(method)}"
        train("configs/quickstart.yaml", name, settings)
        speed, memory = measured(name)
        print(
            f"{method.name}: {statistics.median(speed):,.0f} tokens/s, {memory:.2f} GB", flush=True
        )


def write_table() -> None:
    """Write the table into docs/methods.md, from the runs done so far."""
    shapes = [shape for shape in SHAPES if any(WORK.glob(f"cost_{shape}_*/outcome.json"))]
    head = ["method", "when", "trains", f"loss after {LEARN_STEPS} steps (its lr)"]
    head += [title for shape in shapes for title in (f"memory, {shape}", f"speed, {shape}")]
    rows = [head, ["---"] * len(head)]
    reference = {shape: speeds(METHODS[0], shape) for shape in shapes}
    for method in METHODS:
        losses = [
            (eval_loss(method, lr), lr)
            for lr in method.lrs
            if (WORK / f"{slug(method)}_{lr:g}/model").exists()
        ]
        best = "{:.3f} ({:g})".format(*min(losses)) if losses else "not measured"
        row = [method.name, method.when, trainable(method), best]
        for shape in shapes:
            names = sorted(path.name for path in WORK.glob(f"cost_{shape}_*_{slug(method)}"))
            if not method.costs or not names:
                row += ["as above" if not method.costs else "not measured"] * 2
                continue
            memory = statistics.median(measured(name)[1] for name in names)
            speed = statistics.median(speeds(method, shape)) / statistics.median(reference[shape])
            row += [f"{memory:.2f} GB", f"{speed:.2f}x"]
        rows.append(row)
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


def train(config: str, name: str, settings: dict[str, Any]) -> None:
    """Run train.py with settings on top of a config, unless it is complete. Exits if it fails."""

    def text(value: Any) -> str:
        line = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        return line.removesuffix("...").strip()

    command = [sys.executable, "train.py", "--config", config]
    command += ["--run.dir", str(WORK), "--run.name", name]
    command += [f"--{key}={text(value)}" for key, value in settings.items()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")


def resolved(method: Method, num_layers: int) -> dict[str, Any]:
    lower = ["embed_tokens", *(rf"layers\.{layer}\." for layer in range(num_layers // 2))]
    return {
        key: lower if value == "LOWER_HALF" else value for key, value in method.settings.items()
    }


def slug(method: Method) -> str:
    return re.sub(r"[^a-z0-9]+", "_", method.name.lower())


def lines(name: str, file: str) -> Iterator[dict[str, Any]]:
    return map(json.loads, (WORK / name / file).read_text().splitlines())


def eval_loss(method: Method, lr: float) -> float:
    return float(list(lines(f"{slug(method)}_{lr:g}", "eval.jsonl"))[-1]["eval_loss"])


def measured(name: str) -> tuple[list[float], float]:
    """Return (tokens/s of each step after the first ones, peak memory in GB)."""
    found = list(lines(name, "metrics.jsonl"))
    return [line["tokens_per_second"] for line in found[WARM_STEPS:]], found[-1]["memory_gb"]


def speeds(method: Method, shape: str) -> list[float]:
    names = [path.name for path in WORK.glob(f"cost_{shape}_*_{slug(method)}")]
    return [speed for name in names for speed in measured(name)[0]]


def trainable(method: Method) -> str:
    """Return the share of the 1.8M parameters that trains, from the receipt of a run."""
    for lr in method.lrs:
        path = WORK / f"{slug(method)}_{lr:g}" / "receipt.json"
        if path.exists():
            counts = json.loads(path.read_text())["parameters"]
            return f"{counts['trainable'] / counts['total']:.1%}"
    return "not measured"


if __name__ == "__main__":
    main()
