"""Find where a run resumes: its newest complete checkpoint, on this disk or in the object store."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import failures
from finetune.config import Config, differences
from finetune.engine.checkpoint import contents, folder
from finetune.engine.checkpoint.folder import Found
from finetune.engine.receipt import identity_differences, refusal
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.errors import CheckpointError, DamagedCheckpoint, LostCheckpoints, RunDirectoryError

if TYPE_CHECKING:
    from finetune.engine.checkpoint.storage import Storage


def find(
    root: Path, storage: "Storage | None", num_steps: int | None = None
) -> tuple[Found | None, dict[Path, str]]:
    """Return the newest valid checkpoint, fetched if need be, and the problem of each newer one.

    Raises LostCheckpoints if there are checkpoints but none is valid: starting afresh would hide
    that work was lost. Raises CheckpointError if the store does not answer: resuming from an older
    one would hide it, too. `num_steps`: of the run.
    """
    found, damaged = folder.find_newest(root, num_steps)
    for step in storage.steps() if storage else []:
        if found and step <= found.step:
            break
        try:
            folder.require_step(root / folder.step_name(step), num_steps)
            path = storage.fetch(step, root)  # type: ignore[union-attr]
            found = Found(path, folder.read_manifest(path))  # `fetch` has verified the files
            damaged.pop(found.path, None)  # the fetched one has replaced it
            break
        except folder.OtherFormat:
            raise
        except (DamagedCheckpoint, ValueError) as exc:
            damaged[root / folder.step_name(step)] = f"in the store: {exc}"
    aside = dict.fromkeys(root.glob("damaged-step-*"), "was found damaged before")
    if found is None and (damaged or aside):
        may_heal = any(_is_of_disk(problem) for problem in damaged.values())
        raise (CheckpointError if may_heal else LostCheckpoints)(
            "no checkpoint is valid, and nothing was deleted:\n  "
            + "\n  ".join(f"{path}: {problem}" for path, problem in {**damaged, **aside}.items())
            + f"\nmove {root} away to start from the beginning"
        )
    return found, damaged


def _is_of_disk(problem: str) -> bool:
    """Return whether a disk's failure prevented reading; the next attempt may succeed."""
    number = re.match(r"\[Errno (\d+)\]", problem)
    return number is not None and int(number[1]) in failures.DISK


def newest(root: Path) -> Found | None:
    """Return the newest checkpoint with a readable manifest, unverified: to refuse early."""
    for path in folder.steps(root):
        with contextlib.suppress(OSError, ValueError):
            return Found(path, folder.read_manifest(path))
    return None


def require_same_run(
    found: Found, config: Config, identity: dict[str, Any], usual: dict[str, Any]
) -> None:
    """Raise RunDirectoryError if a checkpoint has another config, data or weights; list them.

    `identity`, `usual`: as in `receipt.identity_differences`.
    """
    different = differences(found.manifest["config"], config)
    different += identity_differences(found.manifest["identity"], identity, usual)
    if different:
        instead = "give this run another run.name, or go back to those values"
        raise refusal(f"{found.path} is a checkpoint of another run", different, instead)


def require_readable(found: Found, topology: Topology) -> None:
    """Raise RunDirectoryError if this topology cannot read what the saving one wrote."""
    saved, number = found.manifest["topology"], found.manifest["num_processes"]
    optimizer = found.manifest["config"]["optimizer"]["kind"]
    instead = "launch it so, or give this run another run.name"
    if _family(saved) != _family(topology.name):
        raise RunDirectoryError(
            f"{found.path} was saved by {saved}, and this is {topology.name}; "
            "ZeRO-1 and ZeRO-2 read each other's checkpoints, ZeRO-3 only its own, "
            f"the other topologies each other's, on any number of processes; {instead}"
        )
    is_other = (saved, number) != (topology.name, topology.num_processes)
    if topology.parallel.is_zero and is_other and optimizer != "adamw":
        raise RunDirectoryError(
            f"{found.path} was saved by {saved} on {number} processes, "
            f"and this is {topology.name} on {topology.num_processes}; "
            f"DeepSpeed converts the state of adamw only, not of {optimizer}; {instead}"
        )


def _family(topology: str) -> str:
    """Return the group of topologies that can read each other's checkpoints."""
    return {"zero1": "zero1 or zero2", "zero2": "zero1 or zero2", "zero3": "zero3"}.get(
        topology[:5], "the others"
    )


def bring(root: Path, step: int | None, storage: "Storage | None") -> None:
    """Fetch the checkpoint of a step if only the store has it. Raises CheckpointError."""
    if not storage or step is None or (root / folder.step_name(step)).exists():
        return
    if step in storage.steps():
        storage.fetch(step, root)


def kept(root: Path) -> set[int]:
    """Return the steps whose checkpoints are on this disk."""
    return {int(path.name.removeprefix("step-")) for path in folder.steps(root) if path.is_dir()}


def put_back_best(root: Path, step: int, topology: Topology, state: TrainState) -> None:
    """Restore only a checkpoint's weights and averages. Collective. Raises LostCheckpoints."""
    path = root / folder.step_name(step)
    try:
        manifest: dict[str, Any] = topology.on_main(lambda: folder.verified(path))
        contents.read_weights(Found(path, manifest), topology, state)
    except Exception as exc:
        if not isinstance(exc, CheckpointError):
            failures.reraise(exc)
        raise LostCheckpoints(
            f"checkpoint {path}, the best evaluation, cannot be loaded: {contents.why(exc)}; "
            "to export the last weights, give --evaluation.export_best false"
        ) from exc
