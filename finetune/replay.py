"""Repeat a run from its receipt, and compare its losses: python -m finetune replay."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from finetune import config as configs
from finetune import files, own_code
from finetune.config import paths
from finetune.engine import logs
from finetune.errors import EXIT_COMPLETE, EXIT_FAILED, ConfigError, RunDirectoryError
from finetune.places import REPLAY_OF, TRAIN
from finetune.survival import launcher

# How far two losses may differ and still be "the same". On a CPU, not at all: the same operations
# run in the same order. On a GPU, atomic additions (backward passes of flash attention, embeddings)
# come in another order each time, and each step carries the rounding of the last into all later
# ones. How far two runs on one GPU differ was not measured. Measured on an H200 over 8 steps
# (docs/topologies.md): topologies, which also change the order of additions, differ by 1.5e-7 of a
# loss in float32, 8e-5 with LoRA and 4e-3 with all weights in bf16. The tolerance is five times
# that in 16 bits, and far more in float32, as runs are longer; another seed, row or rate differs by
# more.
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
NORM = 5  # gradient norms vary more than losses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "run directory with receipt.json and config.yaml"
    parser.add_argument("run", type=lambda text: Path(paths.argument(text)), help=what)
    what = "run.name of the repetition; default: the run's name with -replay"
    parser.add_argument("--name", help=what)


def main(arguments: argparse.Namespace) -> int:
    """Train again and compare; exit code 1 if the runs differ by more than `tolerance`.

    Raises RunDirectoryError.
    """
    run: Path = arguments.run.resolve()
    values, receipt = configs.read_resolved(run / "config.yaml"), _receipt(run)
    require_own_code(run, configs.flatten(values), receipt)
    config = configs.from_dict(values, where=str(run / "config.yaml"))
    _require_metrics(run, config.tracking.log_every_steps)
    name = arguments.name or f"{config.run.name}-replay"
    if name == config.run.name:
        raise RunDirectoryError(
            f"--name: {name} is the run itself; give the repetition another name"
        )
    command = [
        sys.executable, str(TRAIN), "--config", str(run / "config.yaml"), "--run.name", name,
        "--run.dir", str(run.parent), "--checkpoint.storage", "null", "--tracking.trackers", "[]",
        "--tracking.project", "finetune", "--tracking.wandb_mode", "null",
    ]  # fmt: skip
    environments = [{**each, REPLAY_OF: str(run)} for each in _environments(receipt)]
    code = launcher.run(environments, command)
    return code or _compare(run, run.parent / name, tolerance(receipt))


def require_own_code(run: Path, settings: dict[str, Any], receipt: dict[str, Any]) -> None:
    """Raise RunDirectoryError if code of the user's own differs from the receipt's."""
    for key, name in configs.own_names(settings).items():
        try:
            now = own_code.sha256(own_code.find(name))
        except ConfigError as exc:
            raise RunDirectoryError(
                f"{run / 'config.yaml'}: {key}: {exc}; put the file back"
            ) from exc
        before = (receipt.get("identity") or {}).get(own_code.label(key, name))
        if now != before:
            raise RunDirectoryError(
                f"{name} is not the file that {run} ran with: its sha256 was {before}, now {now}; "
                "put the file back"
            )
        print(f"note: this executes {name}, which has the content that {run / 'receipt.json'} says")


def _receipt(run: Path) -> dict[str, Any]:
    """Read the receipt of a complete run. Raise RunDirectoryError."""
    from finetune.engine.topology import launch as launching  # brings torch

    receipt, state = _read(run / "receipt.json"), _read(run / "outcome.json").get("state")
    try:
        launch, number = receipt["launch"], int(receipt["num_processes"])
        on_this_node = int(launch.get("LOCAL_WORLD_SIZE", 1))
        words = [str(receipt["topology"]), *launch, *launch.values()]
        # The system takes 128 KiB of a variable; a launcher sets a few words.
        if not all(isinstance(w, str) and w.isprintable() and len(w) < 10_000 for w in words):
            raise ValueError("launch holds an entry that is not an environment variable")
        for name in launch:
            if not launching.is_recorded(name) or not name.replace("_", "").isalnum():
                raise ValueError(f"launch sets {name}, which this program never records")
        if number < 1:
            raise ValueError("num_processes is less than 1")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as exc:
        what = f"{exc} is missing" if isinstance(exc, KeyError) else exc
        raise RunDirectoryError(
            f"{run / 'receipt.json'} is damaged: {what}; put back a copy of it"
        ) from exc
    if not isinstance(state, str):
        raise RunDirectoryError(
            f"{run / 'outcome.json'} is damaged: it names no state; put back a copy of it"
        )
    if state != "complete" or not (run / "metrics.jsonl").is_file():
        raise RunDirectoryError(
            f"{run} is {state}, or has no metrics.jsonl to compare with; run it to its end first"
        )
    if number > on_this_node:
        raise RunDirectoryError(
            f"{run} ran on {number} processes of several nodes; give each node its launcher line "
            f"again, with another --run.name and {REPLAY_OF}={run} in its environment"
        )
    return receipt


def _read(path: Path) -> dict[str, Any]:
    values, problem = files.read_note(path)
    if problem:
        raise RunDirectoryError(
            f"{path} {problem}; put back a copy of it, or give the directory of another run"
        )
    return values


def _require_metrics(run: Path, every: int) -> None:
    """Raise RunDirectoryError if metrics.jsonl lacks a line that the repetition will have.

    This saves a training that could not be compared. `every`: tracking.log_every_steps of the run.
    """
    last = _read(run / "outcome.json").get("step")
    if type(last) is not int or last < 1:
        raise RunDirectoryError(
            f"{run / 'outcome.json'} is damaged: it lacks the last step; put back a copy of it"
        )
    known = _steps(run / "metrics.jsonl")
    logged = (step for step in range(1, last + 1) if step % every == 0 or step == last)
    if missing := [step for step in logged if step not in known]:
        raise RunDirectoryError(
            f"{run / 'metrics.jsonl'} has no line for {len(missing)} of the {last} steps, the "
            f"first is step {missing[0]}, so there is nothing to compare with; put back a copy of "
            "it"
        )


def _environments(receipt: dict[str, Any]) -> list[dict[str, str]]:
    """Return the environment of each process as its launcher made it."""
    number = int(receipt["num_processes"])
    shared = {**os.environ, **receipt["launch"]}
    if receipt["topology"] == "single":
        return [shared]
    shared |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launcher.free_port()),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "GROUP_RANK": "0",
    }
    return launcher.ranked(shared, number)


def _compare(run: Path, again: Path, part: float) -> int:
    """Print whether every step of two runs has the same loss and gradient norm.

    `part`: see `tolerance`.
    """
    one, other = (_steps(each / "metrics.jsonl") for each in (run, again))
    steps = sorted(one.keys() | other.keys())
    different = [step for step in steps if not agree(one.get(step), other.get(step), part)]
    how = f"within {part:g} of each" if part else "to the bit"
    if different:
        step = different[0]
        print(
            f"not the same {how}: {len(different)} of {len(one)} steps differ, the first is step "
            f"{step}: (loss, gradient norm) was {one.get(step)}, now {other.get(step)}"
        )
        return EXIT_FAILED
    print(
        f"the same: losses and gradient norms of all {len(one)} steps on record are those of {run} "
        f"{how}"
    )
    return EXIT_COMPLETE


def tolerance(receipt: dict[str, Any]) -> float:
    """Return the share by which losses of two runs may differ; 0.0 requires the same bits."""
    has_gpus = (receipt.get("machine") or {}).get("gpus")
    if (receipt.get("device") or ("cuda" if has_gpus else "cpu")) == "cpu":
        return 0.0
    return TOLERANCE.get(str(receipt.get("precision")), TOLERANCE["bf16"])


def agree(one: tuple[Any, Any] | None, other: tuple[Any, Any] | None, part: float) -> bool:
    """Return whether (loss, gradient norm) of a step are the same, or within `part` of the larger.

    Norms may differ by NORM times as much.
    """
    if one == other or one is None or other is None:
        return one == other

    def is_close(a: Any, b: Any, share: float) -> bool:
        both = isinstance(a, float) and isinstance(b, float)
        return a == b or (both and math.isclose(a, b, rel_tol=share))

    return is_close(one[0], other[0], part) and is_close(one[1], other[1], NORM * part)


def _steps(metrics: Path) -> dict[int, tuple[Any, Any]]:
    """Return step -> (loss, gradient norm)."""
    whole = [line for line in logs.records(metrics) if {"loss", "grad_norm"} <= line.keys()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in whole}
