"""Checkpoints: written atomically, found only if whole, resumed exactly.

Protocol: a fresh directory `.writing-...` beside the others; every process writes its part, and
every file is flushed to the disk; the main process hashes them all into manifest.json, last;
then one rename makes it `step-00000300`, and the parent directory is flushed too. What a crash
leaves is a `.writing-` directory, which is never read and is swept away at the next save.
"""

import hashlib
import json
import os
import random
import re
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from finetune.config import Config, differences
from finetune.engine import optim
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.errors import CheckpointError, RunDirectoryError
from finetune.progress import Progress

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Found:
    """A checkpoint whose manifest and files agree."""

    path: Path
    manifest: dict[str, Any]


def save(
    root: Path, topology: Topology, state: TrainState, about: dict[str, Any], keep_last: int, best: int | None = None
) -> None:
    """Write checkpoint `step-<progress.step>` under `root` and prune older ones, but not that of step `best`. Collective.

    `about` goes into the manifest: what a resumption must agree with. Raises CheckpointError on
    every process if any failed; what was there before stays as it was.
    """
    progress = state.progress
    final, writing = root / step_name(progress.step), root / f".writing-{step_name(progress.step)}"
    manifest = {
        "format": FORMAT, "progress": progress.to_dict(), "num_processes": topology.num_processes,
        "topology": topology.name, **about,
    }  # fmt: skip
    try:
        topology.on_main(lambda: _begin(root, writing))
        topology.on_every(lambda: _write_own(writing, topology))
        _write_shards(writing, topology, state)
        topology.on_main(lambda: _commit(writing, final, manifest, keep_last, best))
    except Exception as exc:  # a full disk can surface as OSError, RuntimeError or dcp's CheckpointException
        if topology.is_main:
            shutil.rmtree(writing, ignore_errors=True)  # its space may be what is missing
        raise CheckpointError(f"checkpoint {final} could not be written: {exc}") from exc


def _begin(root: Path, writing: Path) -> None:
    """A fresh directory; what crashes left goes."""
    for torn in root.glob(".writing-*"):
        shutil.rmtree(torn)
    writing.mkdir(parents=True)


def _write_own(writing: Path, topology: Topology) -> None:
    """What only this process knows."""
    own = {"random": _random_state(topology), "scaler": topology.scaler_state()}
    _write(writing / f"process-{topology.rank:04d}.json", own)


def _write_shards(writing: Path, topology: Topology, state: TrainState) -> None:
    """This process's part of the tensors. dcp flushes its files, and raises on every process if one fails."""
    if topology.wish.is_zero:
        topology.on_every(lambda: topology.save_engine(writing / "shards"))
        return
    tensors = _tensors(topology, state)
    with _alone(topology) as alone:
        dcp.save(tensors, checkpoint_id=writing / "shards", no_dist=alone)


def _commit(writing: Path, final: Path, manifest: dict[str, Any], keep_last: int, best: int | None) -> None:
    """Hashes last, then one rename; only then may older ones go."""
    _write(writing / MANIFEST, {**manifest, "files": _hashes(writing)})
    _flush_directory(writing / "shards")
    _flush_directory(writing)
    os.rename(writing, final)
    _flush_directory(final.parent)
    for old in steps(final.parent)[keep_last:]:
        if best is None or old.name != step_name(best):
            shutil.rmtree(old)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(root: Path) -> list[Path]:
    """Checkpoints under `root`, whole or not, the newest first; what a user keeps beside them is not ours."""
    return sorted((p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8}", p.name) and p.is_dir()), reverse=True)


def set_aside(damaged: list[Path]) -> None:
    """Rename checkpoints that are not whole to `damaged-step-...`: kept, but neither read, counted nor in the way."""
    for path in damaged:
        free = next(n for n in range(1000) if not path.with_name(f"damaged-{path.name}.{n}").exists())
        os.rename(path, path.with_name(f"damaged-{path.name}.{free}"))


class Saver:
    """When and what to save, for one run."""

    def __init__(
        self, root: Path, topology: Topology, *, about: dict[str, Any], every_minutes: float | None, keep_last: int
    ) -> None:
        self.root, self.topology, self.about = root, topology, about
        self.every_minutes, self.keep_last = every_minutes, keep_last
        self.saved_at = time.monotonic()

    def is_time(self) -> bool:
        """Whether checkpoint.every_minutes have passed on this process's clock."""
        return self.every_minutes is not None and time.monotonic() - self.saved_at > 60 * self.every_minutes

    def save(self, state: TrainState, best: int | None = None) -> None:
        save(self.root, self.topology, state, self.about, self.keep_last, best)
        self.saved_at = time.monotonic()


def require_same_run(found: Found, config: Config, identity: dict[str, str]) -> None:
    """Raise RunDirectoryError with what differs if a checkpoint belongs to another config, or to other data or weights.

    `identity` holds what a config only points at: name -> fingerprint, such as that of the training data.
    """
    different = differences(found.manifest["config"], config)
    saved = found.manifest["identity"]
    different += [
        f"{name}: was {saved.get(name)}, now {now}" for name, now in identity.items() if saved.get(name) != now
    ]
    if different:
        raise RunDirectoryError(
            f"{found.path} is a checkpoint of another run; what differs:\n  " + "\n  ".join(different)
            + "\ngive this run another run.name, or go back to those values"
        )  # fmt: skip


def find_newest(root: Path) -> tuple[Found | None, dict[Path, str]]:
    """The newest valid checkpoint under `root`, and what is wrong with each newer one.

    Raises CheckpointError if there are checkpoints but none is valid: starting afresh would hide
    that work was lost.
    """
    rejected: dict[Path, str] = {}
    for path in steps(root):
        try:
            return Found(path, _verified_manifest(path)), rejected
        except (OSError, ValueError) as exc:
            rejected[path] = str(exc)
    if rejected:
        raise CheckpointError(
            "no checkpoint is valid, and nothing was deleted:\n  " + "\n  ".join(f"{path}: {problem}" for path, problem in rejected.items())
            + f"\nmove {root} away to start afresh"
        )  # fmt: skip
    return None, {}


def require(root: Path, best: int | None) -> None:
    """Raise RunDirectoryError if the best evaluation so far has no checkpoint, as when nobody asked to keep it."""
    if best is not None and not (root / step_name(best)).exists():
        raise RunDirectoryError(
            f"evaluation.export_best: the best evaluation so far, of step {best}, has no checkpoint in {root}; set it to false"
        )


def load_weights(root: Path, step: int, topology: Topology, state: TrainState) -> None:
    """Put back the weights (and their averages), and nothing else, of one checkpoint. Collective. Raises CheckpointError."""
    path = root / step_name(step)
    try:
        topology.on_main(lambda: _verified_manifest(path))
        if topology.wish.is_zero:
            topology.load_engine(path / "shards")
            return
        weights = _weights(topology, state)
        with _alone(topology) as alone:
            dcp.load(weights, checkpoint_id=path / "shards", no_dist=alone)
    except Exception as exc:
        raise CheckpointError(
            f"checkpoint {path}, the best evaluation, cannot be loaded: {type(exc).__name__}: {exc}; "
            "to export the last weights, give --evaluation.export_best false"
        ) from exc


def load(found: Found, topology: Topology, state: TrainState) -> None:
    """Put weights, optimizer, random numbers and progress back as they were. Collective. Raises CheckpointError."""
    _require_readable(found, topology)
    try:
        if topology.wish.is_zero:
            topology.load_engine(found.path / "shards")
        else:
            _load_shards(found, topology, state)
        own = found.path / f"process-{topology.rank:04d}.json"
        if own.exists():
            _restore_random_state(json.loads(own.read_text())["random"], topology)
        # One scaler for all: processes that are new have none saved, and must scale as the others do.
        topology.restore_scaler(json.loads((found.path / "process-0000.json").read_text())["scaler"])
    except Exception as exc:  # dcp raises many kinds for a checkpoint that does not fit the model
        raise CheckpointError(f"checkpoint {found.path} cannot be loaded: {type(exc).__name__}: {exc}") from exc
    state.progress.restore(found.manifest["progress"])


def _require_readable(found: Found, topology: Topology) -> None:
    """Raise RunDirectoryError for what only the same topology can read: DeepSpeed's own files."""
    saved, number = found.manifest["topology"], found.manifest["num_processes"]
    was_zero = saved.startswith("zero")
    if (was_zero or topology.wish.is_zero) and (saved, number) != (topology.name, topology.num_processes):
        raise RunDirectoryError(
            f"{found.path} was saved by {saved} on {number} processes, and this is {topology.name} on {topology.num_processes}; "
            "what ZeRO saves can only be read by the same, so launch it so, or give this run another run.name"
        )


def _load_shards(found: Found, topology: Topology, state: TrainState) -> None:
    tensors = _tensors(topology, state)
    with _alone(topology) as alone:
        dcp.load(tensors, checkpoint_id=found.path / "shards", no_dist=alone)  # weights are read in place
    set_optimizer_state_dict(state.model, _bare(state.optimizer), tensors["optimizer"], options=_options())
    optim.page_again(_bare(state.optimizer))


def _tensors(topology: Topology, state: TrainState) -> dict[str, Any]:
    """Weights that train, their averages and the optimizer's state, under the names of the bare model."""
    moments = get_optimizer_state_dict(state.model, _bare(state.optimizer), options=_options())
    return {**_weights(topology, state), "optimizer": moments}


def _weights(topology: Topology, state: TrainState) -> dict[str, Any]:
    trained = {name: p.detach() for name, p in topology.unwrap(state.model).named_parameters() if p.requires_grad}
    return {"model": trained, "ema": state.ema.weights} if state.ema else {"model": trained}


@contextmanager
def _alone(topology: Topology) -> Iterator[bool]:
    """Whether there is one process only; then dcp warns that it saves in one process, which is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield topology.num_processes == 1


def _options() -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=False)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _random_state(topology: Topology) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state(topology.device).tolist() if topology.device.type == "cuda" else None
    return {
        "python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(), "cuda": cuda,
    }  # fmt: skip


def _restore_random_state(state: dict[str, Any], topology: Topology) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and topology.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), topology.device)


def _verified_manifest(path: Path) -> dict[str, Any]:
    """The manifest, if every file is there with its size and hash. Raises OSError or ValueError."""
    try:
        manifest: dict[str, Any] = json.loads((path / MANIFEST).read_text())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    try:
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, this version reads {FORMAT}")
        Progress().restore(manifest["progress"])
        files = dict(manifest["files"])
        if manifest["progress"]["step"] != int(path.name.removeprefix("step-")) or not (
            manifest["config"] and manifest["identity"] and files
        ):
            raise ValueError(f"{MANIFEST} is not that of {path.name}")
        for name, wanted in files.items():
            size = (path / name).stat().st_size
            if size != wanted["bytes"]:
                raise ValueError(f"{name} has {size} bytes instead of {wanted['bytes']}")
            if _sha256(path / name) != wanted["sha256"]:
                raise ValueError(f"{name} is corrupt: its sha256 differs from the manifest's")
    except (KeyError, TypeError, AttributeError) as exc:
        raise ValueError(f"{MANIFEST} is damaged: {type(exc).__name__}: {exc}") from exc
    return manifest


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
