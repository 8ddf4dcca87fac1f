"""Copy a TrainState to host memory, write it into a checkpoint, and restore it.

Every process writes its own part: through `torch.distributed.checkpoint` (dcp), or as DeepSpeed's
own files under ZeRO. Frozen weights are left out: the base model has them.
"""

import json
import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.utils import _pytree as pytree

from finetune import failures, unpickling
from finetune.engine import optim, rounded_adamw
from finetune.engine.checkpoint import folder
from finetune.engine.checkpoint.folder import Found
from finetune.engine.state import TrainState
from finetune.engine.topology import Processes, Topology
from finetune.errors import CheckpointError, DamagedCheckpoint, LostCheckpoints
from finetune.failures import MOST_LETTERS

SHARDS = "shards"
# What reading a process's damaged JSON can raise.
MALFORMED = (
    ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError,
)  # fmt: skip
# dcp warns when it saves in a single process, which is what we want.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Staged:
    """This process's part of a state at one step, copied to host memory."""

    tensors: dict[str, Any]
    """For dcp; empty under ZeRO. Of replicated tensors, one process stages each."""
    files: dict[str, Any]
    """ZeRO: path -> what DeepSpeed would write there; empty otherwise."""
    own: dict[str, Any]
    """State of this process alone: random number generators, fp16's scale."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this process writes."""
        leaves = pytree.tree_leaves((self.tensors, self.files))
        return sum(
            rounded_adamw.own_part(leaf).nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)
        )


def stage(topology: Topology, state: TrainState, copied: Callable[[Any], Any]) -> Staged:
    """Copy this process's part of a state; training waits only for this. Collective.

    `copied` copies a tree of tensors to host memory, or returns it unchanged if training waits for
    the whole save.
    """
    own = {"random": _random_state(topology), "scaler": topology.scaler_state()}
    if topology.parallel.is_zero:
        return Staged({}, topology.sharing.files(copied), own)
    tensors = share(_tensors(topology, state), topology.rank, topology.num_processes)
    return Staged(copied(tensors), {}, own)


def share(tensors: dict[str, Any], rank: int, number: int) -> dict[str, Any]:
    """Return the replicated tensors that process `rank` stages: about as many bytes each.

    Otherwise each of 8 processes under DDP would copy the 96 GB of an 8B model with AdamW, of which
    dcp writes one copy. All processes see the same names and sizes in the same order, so they agree
    without communicating.
    """
    loads: dict[int, list[int]] = {}

    def owned(value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return True  # numbers and strings: dcp drops the copies
        own, copies = _replica(value, rank, number)
        load = loads.setdefault(copies, [0] * copies)
        owner = load.index(min(load))
        load[owner] += value.nbytes
        return owner == own

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        chosen = {}
        for key, value in values.items():
            if isinstance(value, dict) and value:
                if inner := kept(value):
                    chosen[key] = inner
            elif owned(value):
                chosen[key] = value
        return chosen

    return kept(tensors)


def _replica(tensor: Any, rank: int, number: int) -> tuple[int, int]:
    """Return (index of this process's copy of a tensor, number of copies)."""
    if not hasattr(tensor, "placements"):
        return rank, number
    own, copies = 0, 1  # a DTensor may be replicated over some dimensions of its mesh
    for dimension, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            own, copies = own * size + tensor.device_mesh.get_local_rank(dimension), copies * size
    return own, copies


def write(writing: Path, staged: Staged, processes: Processes) -> None:
    """Write every process's part into an existing directory. Collective; if one fails, all do."""

    def write_own() -> None:
        folder.write_json(writing / _own_name(processes.rank), staged.own)
        for name, content in staged.files.items():
            path = writing / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                torch.save(content, file)
                file.flush()
                os.fsync(file.fileno())

    processes.on_every(write_own)
    if not staged.files:  # not ZeRO; dcp flushes its files itself
        with _translated():
            dcp.save(
                staged.tensors,
                checkpoint_id=writing / SHARDS,
                process_group=processes.group,
                no_dist=processes.number == 1,
            )


def written(writing: Path, staged: Staged, rank: int) -> set[str]:
    """Return the names of the files that this process has written."""
    return {
        _own_name(rank),
        *staged.files,
        *(name for name in folder.files(writing) if name.startswith(f"{SHARDS}/__{rank}_")),
    }


def read(found: Found, topology: Topology, state: TrainState) -> None:
    """Restore weights, optimizer, random state and progress. Collective. Raises LostCheckpoints."""
    try:
        if topology.parallel.is_zero:
            _read_engine(found, topology)
        else:
            _read_shards(found, topology, state)
        _read_own(found, topology)
    except Exception as exc:  # dcp raises many kinds for a checkpoint that does not fit the model
        if not isinstance(exc, CheckpointError):
            failures.reraise(exc)
        raise LostCheckpoints(
            f"checkpoint {found.path} cannot be loaded: {why(exc)}; {_instead(found)}"
        ) from exc
    state.progress.restore(found.manifest["progress"])


def why(exc: Exception) -> str:
    """Return in one sentence why a checkpoint cannot be loaded; torch writes paragraphs."""
    text = " ".join(str(exc).split())
    if isinstance(exc, DamagedCheckpoint):
        return text
    if isinstance(exc, pickle.UnpicklingError) or "weights_only" in text or "Weights only" in text:
        return f"a file in {SHARDS} holds more than tensors; nothing was executed"
    cause = f"{type(exc).__name__}: {text[:MOST_LETTERS]}"
    return f"{SHARDS} is damaged, or does not fit the model ({cause})"


def _instead(found: Found) -> str:
    """Return what a user can do about a checkpoint that cannot be loaded."""
    root = found.path.parent
    older = next(
        (p for p in folder.steps(root) if p.name < found.path.name and folder.looks_whole(p)), None
    )
    if older is None:
        return (
            f"restore a copy of it, or move {root} away (and checkpoint.storage, "
            "where that is set) to start at step 1"
        )
    return f"move it away (from checkpoint.storage too, where that is set) to resume from {older}"


def _read_own(found: Found, topology: Topology) -> None:
    """Restore the random number generators and fp16's scale."""
    path = found.path / _own_name(topology.rank)
    try:
        if path.exists():
            _restore_random_state(json.loads(path.read_text())["random"], topology)
        else:  # the run has more processes now: this one draws new random numbers
            torch.manual_seed(hash((torch.initial_seed(), found.step)) % 2**63)
        # New processes have saved no scale, and all must use the same: that of process 0.
        path = found.path / _own_name(0)
        topology.restore_scaler(json.loads(path.read_text())["scaler"])
    except MALFORMED as exc:
        raise DamagedCheckpoint(f"{path} is damaged ({type(exc).__name__}: {exc})") from exc


def read_weights(found: Found, topology: Topology, state: TrainState) -> None:
    """Restore only the weights (and their averages). Collective."""
    if topology.parallel.is_zero:
        _read_engine(found, topology)
        return
    weights = _weights(topology, state)
    _load(found, weights, topology)


def _read_engine(found: Found, topology: Topology) -> None:
    """Load DeepSpeed's files; for another topology than wrote them, convert them temporarily."""
    if (found.manifest["topology"], found.manifest["num_processes"]) == (
        topology.name,
        topology.num_processes,
    ):
        topology.sharing.load(found.path / SHARDS)
        return
    converted = found.path.with_name(f".converting-{found.path.name}")

    def convert() -> None:
        shutil.rmtree(converted, ignore_errors=True)
        topology.sharing.universal(found.path / SHARDS, converted)

    topology.on_main(convert)
    topology.sharing.load(converted)
    topology.on_every(lambda: None)  # wait until all have read it
    topology.on_main(lambda: shutil.rmtree(converted))


def _read_shards(found: Found, topology: Topology, state: TrainState) -> None:
    tensors = _tensors(topology, state)
    _load(found, tensors, topology)
    set_optimizer_state_dict(
        state.model, _bare(state.optimizer), tensors["optimizer"], options=_options()
    )
    optim.page_again(_bare(state.optimizer))


def _load(found: Found, tensors: dict[str, Any], topology: Topology) -> None:
    """Read what is saved under these names, weights in place."""
    reader = unpickling.Reader(found.path / SHARDS)

    def check() -> None:
        reader.read_metadata()

    topology.on_main(check)  # first: dcp's own message would not name the file
    with _translated(), unpickling.weights_only():
        dcp.load(tensors, storage_reader=reader, no_dist=topology.num_processes == 1)


def _tensors(topology: Topology, state: TrainState) -> dict[str, Any]:
    """Return trained weights, their averages and optimizer state, named as in the bare model."""
    moments = get_optimizer_state_dict(state.model, _bare(state.optimizer), options=_options())
    return {**_weights(topology, state), "optimizer": moments}


def _weights(topology: Topology, state: TrainState) -> dict[str, Any]:
    trained = {
        name: p.detach()
        for name, p in topology.unwrap(state.model).named_parameters()
        if p.requires_grad
    }
    return {"model": trained, "ema": state.ema.weights} if state.ema else {"model": trained}


@contextmanager
def _translated() -> Iterator[None]:
    """Turn dcp's exception into ours.

    `except Exception` does not catch dcp's, and its text holds every process's traceback.
    """
    try:
        yield
    except CheckpointException as exc:
        # A disk that fails may recover, so the checkpoint is not lost.
        for one, _ in exc.failures.values():
            if error := failures.translate(one):
                raise error from exc
        reasons = "; ".join(
            f"process {rank}: {type(one).__name__}: {one}"
            for rank, (one, _) in exc.failures.items()
        )
        raise CheckpointError(reasons) from exc


def _options() -> StateDictOptions:
    return StateDictOptions(ignore_frozen_params=True, strict=False)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _own_name(rank: int) -> str:
    return f"process-{rank:04d}.json"


def _random_state(topology: Topology) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    is_cuda = topology.device.type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state(topology.device).tolist() if is_cuda else None,
    }


def _restore_random_state(state: dict[str, Any], topology: Topology) -> None:
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    if state["cuda"] is not None and topology.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8), topology.device)
