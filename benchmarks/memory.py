"""Compare forecasts of memory with real runs: one and two processes, each topology, on a CPU.

    python benchmarks/memory.py                    the table of docs/performance.md, ten minutes
    python benchmarks/memory.py --allocator libtcmalloc.so.4    also with another allocator

The forecast counts live blocks, but glibc also keeps freed ones. So each run is done twice: with
glibc returning all blocks of 1 MB and more, and with glibc's defaults.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHAPE = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
STEPS = 3
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("single", 1, {"micro_batch_size": 4}),
    ("single", 1, {"micro_batch_size": 4, "gradient_checkpointing": True}),
    ("single", 1, {"micro_batch_size": 2, "precision": "fp32"}),
    *((topology, 2, {"micro_batch_size": 2}) for topology in ("ddp", "fsdp2", "zero2")),
    *((topology, 2, {"micro_batch_size": 1, "gradient_checkpointing": True})
      for topology in ("fsdp2", "zero1", "zero2", "zero3")),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--allocator", help="a library to preload, for a third column")
    arguments = parser.parse_args()
    ways = {"given back": {"MALLOC_MMAP_THRESHOLD_": "1000000"}, "glibc as it is": {}}
    if arguments.allocator:
        ways[Path(arguments.allocator).name] = {"LD_PRELOAD": arguments.allocator}
    head = ["", "forecast, GB"]
    for way in ways:
        head += [f"{way}, GB", "tokens/s"]
    print(
        "| " + " | ".join([*head, "forecast is off by"]) + " |\n|" + " --- |" * (len(head) + 1),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.txt").write_text(
            "".join(f"{i:04} " + "abcdefghi " * 99 + "\n" for i in range(40))
        )
        for topology, processes, train in CASES:
            path = write(Path(folder), train)
            expected = forecast(path, topology, processes)
            measured = [
                run(path, topology, processes, environment) for environment in ways.values()
            ]
            cells = [f"{value:.2f} | {speed:,.0f}" for value, speed in measured]
            name = ", ".join([topology, *(f"{key} {value}" for key, value in train.items())])
            print(
                f"| {name} | {expected:.2f} | {' | '.join(cells)} | "
                f"{expected / measured[0][0] - 1:+.1%} |",
                flush=True,
            )


def write(folder: Path, train: dict[str, Any]) -> Path:
    config = {
        "run": {"name": "memory", "dir": str(folder / "runs")},
        "model": {"init": "random", "tokenizer": "bytes", "config": SHAPE},
        "objective": {"kind": "clm"}, "optimizer": {"lr": 1e-4},
        "checkpoint": {"asynchronous": False},  # a step makes no copy
        "data": {"train": str(folder / "rows.txt"), "packing": True, "max_length": 1003,
                 "cache_dir": str(folder / "cache")},
        "train": {"global_batch_size": 4, "max_steps": STEPS, "precision": "bf16", **train},
    }  # fmt: skip
    path = folder / "memory.yaml"
    path.write_text(json.dumps(config))
    return path


def forecast(path: Path, topology: str, processes: int) -> float:
    """Return GB, from a new process, as models and libraries stay in memory."""
    code = (
        "import json, sys; from finetune import config as configs; from "
        "finetune.engine.topology.launch import ParallelConfig\n"
        "from finetune.forecast.choice import Chooser\n"
        "config, _ = configs.parse(['--config', sys.argv[1]])\n"
        "settings = json.load(open(f'ds_configs/{sys.argv[2]}.json')) if 'zero' in sys.argv[2] "
        "else {}\n"
        "parallel = ParallelConfig(sys.argv[2], int(sys.argv[3]), deepspeed=settings)\n"
        "print(Chooser(config, precision=config.train.precision, "
        "on_gpu=False).forecast(parallel).peak / 1e9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(path), topology, str(processes)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def run(
    path: Path, topology: str, processes: int, environment: dict[str, str]
) -> tuple[float, float]:
    """Return (peak of the first process in GB, tokens a second)."""
    folder = path.parent / "runs/memory"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    command = [
        sys.executable, "-m", "finetune", "launch",
        "--config_file", f"accelerate_configs/{topology}.yaml",
        "--num_processes", str(processes), "train.py", "--config", str(path),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **threads, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{topology} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines[-1]["memory_gb"], statistics.median(
        line["tokens_per_second"] for line in lines[1:]
    )


if __name__ == "__main__":
    main()
