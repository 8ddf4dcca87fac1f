"""python -m finetune replay: the same run again, from its receipt, and whether it came out the same."""

import argparse
import contextlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from finetune import config as configs
from finetune import launcher
from finetune.errors import EXIT_COMPLETE, EXIT_FAILED, RunDirectoryError

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="run directory, with the receipt.json and config.yaml of a run")
    parser.add_argument("--name", help="run.name of the repetition; by default that of the run and -replay")


def main(arguments: argparse.Namespace) -> int:
    """Train again and compare. Raises RunDirectoryError; exit code 1 if the two runs are not the same to the bit."""
    run: Path = arguments.run.resolve()
    config = configs.from_dict(configs.read_yaml(run / "config.yaml"), where=str(run / "config.yaml"))
    receipt = _receipt(run)
    name = arguments.name or f"{config.run.name}-replay"
    if name == config.run.name:
        raise RunDirectoryError(f"--name: {name} is the run itself; give the repetition another name")
    command = [
        sys.executable, str(TRAIN), "--config", str(run / "config.yaml"), "--run.name", name, "--run.replay_of", str(run),
        "--run.dir", str(run.parent), "--checkpoint.storage", "null", "--tracking.trackers", "[]",
    ]  # fmt: skip
    code = launcher.run(_environments(receipt), command)
    return code or _compare(run, run.parent / name)


def _receipt(run: Path) -> dict[str, Any]:
    """That of a run that is complete. Raises RunDirectoryError."""
    try:
        receipt: dict[str, Any] = json.loads((run / "receipt.json").read_text())
        launch, number = receipt["launch"], int(receipt["num_processes"])
        on_this_node, state = (
            int(launch.get("LOCAL_WORLD_SIZE", 1)),
            json.loads((run / "outcome.json").read_text())["state"],
        )
        told = [str(receipt["topology"]), *launch, *launch.values()]
        if not all(isinstance(word, str) and "\0" not in word for word in told) or any("=" in name for name in launch):
            raise ValueError("launch is no environment")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise RunDirectoryError(
            f"{run} has no receipt and outcome that can be read: {type(exc).__name__}: {exc}"
        ) from exc
    if state != "complete" or not (run / "metrics.jsonl").is_file():
        raise RunDirectoryError(f"{run} is {state}, or has no metrics.jsonl to compare with; run it to its end first")
    if number > on_this_node:
        raise RunDirectoryError(
            f"{run} ran on {number} processes of several nodes; give each node its launcher line again, with another --run.name "
            f"and --run.replay_of {run}"
        )
    return receipt


def _environments(receipt: dict[str, Any]) -> list[dict[str, str]]:
    """Of each process, as its launcher had made it."""
    number = int(receipt["num_processes"])
    shared = {**os.environ, **receipt["launch"]}
    if receipt["topology"] == "single":
        return [shared]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number), "GROUP_RANK": "0"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def _compare(run: Path, again: Path) -> int:
    """Say whether every step of two runs has the same loss and gradient norm."""
    one, other = (_steps(each / "metrics.jsonl") for each in (run, again))
    different = [step for step in sorted(one.keys() | other.keys()) if one.get(step) != other.get(step)]
    if different:
        step = different[0]
        print(
            f"not the same: {len(different)} of {len(one)} steps differ, the first is step {step}: "
            f"(loss, gradient norm) was {one.get(step)}, now {other.get(step)}"
        )
        return EXIT_FAILED
    print(f"the same: losses and gradient norms of all {len(one)} steps on record are those of {run} to the bit")
    return EXIT_COMPLETE


def _steps(metrics: Path) -> dict[int, tuple[float, float]]:
    """Step -> (loss, gradient norm); lines that are torn are left out."""
    found = {}
    for line in metrics.read_text(errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            values = json.loads(line)
            found[int(values["step"])] = (values["loss"], values["grad_norm"])
    return found
