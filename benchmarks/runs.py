"""Run train.py briefly for a benchmark, and return its metrics."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measured:
    """Medians of all processes over the steps after the first ones; peak memory of the first."""

    tokens_per_second: float
    memory_gb: float
    mfu: float | None
    last_loss: float


def measure(
    folder: Path,
    settings: dict[str, Any],
    *,
    warm: int,
    topology: str = "single",
    processes: int = 1,
) -> Measured:
    """Run with `settings`, section.field -> value. Raises RuntimeError with the run's error."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        section, field = key.split(".")
        sections.setdefault(section, {})[field] = value
    run = folder / "runs" / "run"
    sections["run"] = {"name": run.name, "dir": str(run.parent)}
    sections.setdefault("data", {}).setdefault("cache_dir", str(folder / "cache"))
    shutil.rmtree(run, ignore_errors=True)
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(sections))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    many = [] if topology == "single" else ["--num_processes", str(processes)]
    command = [
        sys.executable, "-m", "finetune", "launch",
        "--config_file", f"accelerate_configs/{topology}.yaml", *many,
        "train.py", "--config", str(config),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        wrong = [
            line
            for line in done.stderr.splitlines()
            if re.search(r"[Ee]rror\b.*:|out of memory", line)
        ]
        raise RuntimeError((wrong or done.stderr.splitlines()[-1:] or ["no output"])[0][:200])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    return Measured(
        statistics.median(line["tokens_per_second"] for line in lines[warm:]),
        last["memory_gb"],
        statistics.median(line["mfu"] for line in lines[warm:]) if "mfu" in last else None,
        last["loss"],
    )
