"""Measure what checkpoints and resuming cost: the figures of docs/spot.md.

    python benchmarks/spot.py         # a Llama of 25M, full weights: checkpoints of 0.3 GB
    python benchmarks/spot.py --width 1024 --layers 24 --rounds 1

Alternates runs that write checkpoints in the background with runs that wait for them. The launcher
starts each; it saves every two steps, gets SIGTERM during training, and starts again.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SAVED = 4  # checkpoints before the signal
TWO = ["--num_processes", "2", "--config_file"]
PLACES = {
    "one process": [],
    "fsdp2, 2 processes": [*TWO, "accelerate_configs/fsdp2.yaml"],
    "zero2, 2 processes": [*TWO, "accelerate_configs/zero2.yaml"],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    found: dict[tuple[str, bool], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        for number in range(arguments.rounds):
            for place, launcher in PLACES.items():
                for asynchronous in (True, False) if number % 2 else (False, True):
                    config = write_config(
                        Path(name), arguments.width, arguments.layers, asynchronous
                    )
                    found.setdefault((place, asynchronous), []).append(measure(config, launcher))
    first = next(iter(found.values()))[0]
    print(f"checkpoints of {first['gb']:.2f} GB; medians of {arguments.rounds} rounds\n")
    columns = ("stall", "safe", "exit", "resumed")
    print(
        "| | saved | training waits | safe after | SIGTERM to exit | start to first step |\n| --- "
        "| --- | --- | --- | --- | --- |"
    )
    for (place, asynchronous), rounds in found.items():
        middle = [
            f"{statistics.median(each[column] for each in rounds):.2f} s" for column in columns
        ]
        print(
            f"| {place} | {'in the background' if asynchronous else 'waiting'} | "
            + " | ".join(middle)
            + " |"
        )


def write_config(folder: Path, width: int, layers: int, asynchronous: bool) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in range(400)))
    name = f"run{len(list(folder.glob('*.yaml')))}"
    shape = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 4 * width,
        "num_hidden_layers": layers, "num_attention_heads": 8, "vocab_size": 32000,
        "tie_word_embeddings": True,
    }  # fmt: skip
    config: dict[str, Any] = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "model": {"init": "random", "tokenizer": "bytes", "config": shape},
        "data": {"train": str(rows), "max_length": 128, "cache_dir": str(folder / "cache")},
        "objective": {"kind": "clm"},
        "train": {
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "epochs": 1000,
            "max_steps": 10_000,
        },
        "checkpoint": {"every_steps": 2, "every_minutes": None, "asynchronous": asynchronous},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measure(config: Path, launcher: list[str]) -> dict[str, float]:
    """Return the size of a save in GB, and seconds.

    stall and safe: median wait for a save, and until it is safe; exit: from SIGTERM to exit 75;
    resumed: from the second start to its first step.
    """
    run = config.parent / "runs" / config.stem
    process = start(config, launcher)
    wait(lambda: lines(run / "saves.jsonl") >= SAVED, process)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    ended = time.monotonic() - began
    saves = [json.loads(line) for line in (run / "saves.jsonl").read_text().splitlines()]
    before = lines(run / "metrics.jsonl")
    began = time.monotonic()
    process = start(config, launcher)
    wait(lambda: lines(run / "metrics.jsonl") > before, process)
    resumed = time.monotonic() - began
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) == 75
    middle = {
        name: statistics.median(save[name] for save in saves[1:SAVED])
        for name in ("stall_seconds", "seconds", "bytes")
    }
    return {
        "stall": middle["stall_seconds"],
        "safe": middle["seconds"],
        "gb": middle["bytes"] / 1e9,
        "exit": ended,
        "resumed": resumed,
    }


def start(config: Path, launcher: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "finetune", "launch", *launcher]
    command += ["train.py", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def wait(condition: Any, process: subprocess.Popen[bytes]) -> None:
    while not condition():
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode}")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
