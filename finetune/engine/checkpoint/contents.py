"""What is in a checkpoint: a TrainState, copied to host memory, written, and put back.

Every process writes its own part: through `torch.distributed.checkpoint` (dcp), or as DeepSpeed's
own files under ZeRO. Only what trains is in it; the rest is where the run got it from.
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

from finetune import failures
from finetune.engine import optim
from finetune.engine.checkpoint import folder, unpickling
from finetune.engine.checkpoint.folder import Found
from finetune.engine.state import TrainState
from finetune.engine.topology import Processes, Topology
from finetune.errors import CheckpointError, DamagedCheckpoint, LostCheckpoints
from finetune.failures import MOST_LETTERS

SHARDS = "shards"
# It saves in one process, as intended.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


@dataclass(frozen=True)
class Staged:
    """This process's part of a state at one step, in host memory, where training does not reach it."""

    tensors: dict[str, Any]
    """For dcp; empty under ZeRO. What several processes hold alike is staged by one of them."""
    files: dict[str, Any]
    """ZeRO: path -> what DeepSpeed would write there; empty elsewhere."""
    own: dict[str, Any]
    """What only this process knows: random numbers, fp16's scale."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors that this process writes."""
        leaves = pytree.tree_leaves((self.tensors, self.files))
        return sum(_local(leaf).nbytes for leaf in leaves if isinstance(leaf, torch.Tensor))


def stage(topology: Topology, state: TrainState, copied: Callable[[Any], Any]) -> Staged:
    """Take this process's part of a state, which is all that training has to wait for. Collective.

    `copied` copies a tree of tensors into host memory, or returns it as it is where training waits
    for the whole save.
    """
    own = {"random": _random_state(topology), "scaler": topology.scaler_state()}
    if topology.parallel.is_zero:
        return Staged({}, topology.engine_files(copied), own)
    tensors = share(_tensors(topology, state), topology.rank, topology.num_processes)
    return Staged(copied(tensors), {}, own)


def share(tensors: dict[str, Any], rank: int, number: int) -> dict[str, Any]:
    """Of tensors that several processes hold alike, those that this one stages: about as many bytes
    each.

    Otherwise each of 8 processes under DDP would copy the 96 GB of an 8B model with AdamW, of which
    dcp writes one. Every process decides alike, as all see the same names and sizes in the same
    order.
    """
    loads: dict[int, list[int]] = {}

    def owned(value: Any) -> bool:
        if not isinstance(value, torch.Tensor):
            return True  # numbers and names: dcp drops the copies
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
    """(which of the equal copies of a tensor this process holds, how many copies there are)"""
    if not hasattr(tensor, "placements"):
        return rank, number
    own, copies = 0, 1
    for dimension, placement in enumerate(
        tensor.placements
    ):  # a DTensor: replicated over some dimensions of its mesh
        if placement.is_replicate():
            size = tensor.device_mesh.size(dimension)
            own, copies = own * size + tensor.device_mesh.get_local_rank(dimension), copies * size
    return own, copies


def _local(tensor: Any) -> torch.Tensor:
    part: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def write(writing: Path, staged: Staged, processes: Processes) -> None:
    """Write every process's part into a directory that is there. Collective; raises on every
    process if one fails.
    """

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
    if not staged.files:  # no ZeRO; dcp flushes its files itself
        with _translated():
            dcp.save(
                staged.tensors,
                checkpoint_id=writing / SHARDS,
                process_group=processes.group,
                no_dist=processes.number == 1,
            )


def written(writing: Path, staged: Staged, rank: int) -> set[str]:
    """Names of the files that this process has written."""
    return {
        _own_name(rank),
        *staged.files,
        *(name for name in folder.files(writing) if name.startswith(f"{SHARDS}/__{rank}_")),
    }


def read(found: Found, topology: Topology, state: TrainState) -> None:
    """Put weights, optimizer, random numbers and progress back as they were. Collective. Raises
    LostCheckpoints.
    """
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
    """Why a checkpoint cannot be loaded, without the paragraphs that torch writes."""
    text = " ".join(str(exc).split())
    if isinstance(exc, DamagedCheckpoint):
        return text
    if isinstance(exc, pickle.UnpicklingError) or "weights_only" in text or "Weights only" in text:
        return f"a file in {SHARDS} holds more than tensors; nothing was executed"
    return f"{SHARDS} is damaged, or does not fit the model ({type(exc).__name__}: {text[:MOST_LETTERS]})"


def _instead(found: Found) -> str:
    """What a user can do about a checkpoint that cannot be loaded."""
    root = found.path.parent
    older = next(
        (p for p in folder.steps(root) if p.name < found.path.name and folder.looks_whole(p)), None
    )
    if older is None:
        return f"put back a copy of it, or move {root} away (and checkpoint.storage, where that is set) to start at step 1"
    return f"move it away (from checkpoint.storage too, where that is set) to go on from {older}"


def _read_own(found: Found, topology: Topology) -> None:
    """Put back random numbers and fp16's scale."""
    path = found.path / _own_name(topology.rank)
    try:
        if path.exists():
            _restore_random_state(json.loads(path.read_text())["random"], topology)
        else:  # a process that was not there before draws new random numbers
            torch.manual_seed(hash((torch.initial_seed(), found.step)) % 2**63)
        # One scaler for all: processes that are new have none saved, and must scale as the others
        # do.
        path = found.path / _own_name(0)
        topology.restore_scaler(json.loads(path.read_text())["scaler"])
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as exc:
        raise DamagedCheckpoint(f"{path} is damaged ({type(exc).__name__}: {exc})") from exc


def read_weights(found: Found, topology: Topology, state: TrainState) -> None:
    """Put back the weights (and their averages), and nothing else. Collective."""
    if topology.parallel.is_zero:
        _read_engine(found, topology)
        return
    weights = _weights(topology, state)
    _load(found, weights, topology)


def _read_engine(found: Found, topology: Topology) -> None:
    """DeepSpeed's files fit the topology that wrote them; for another they are converted first, and
    that is thrown away again.
    """
    if (found.manifest["topology"], found.manifest["num_processes"]) == (
        topology.name,
        topology.num_processes,
    ):
        topology.load_engine(found.path / SHARDS)
        return
    converted = found.path.with_name(f".converting-{found.path.name}")

    def convert() -> None:
        shutil.rmtree(converted, ignore_errors=True)
        topology.universal(found.path / SHARDS, converted)

    topology.on_main(convert)
    topology.load_engine(converted)
    topology.on_every(lambda: None)  # all have read it
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

    topology.on_main(check)  # first, as dcp would tell of it in words of its own
    with _translated(), unpickling.weights_only():
        dcp.load(tensors, storage_reader=reader, no_dist=topology.num_processes == 1)


def _tensors(topology: Topology, state: TrainState) -> dict[str, Any]:
    """Weights that train, their averages and the optimizer's state, under the names of the bare
    model.
    """
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
    """dcp's own exception is none that `except Exception` catches, and carries every process's
    traceback in its text.
    """
    try:
        yield
    except CheckpointException as exc:
        for (
            one,
            _,
        ) in (
            exc.failures.values()
        ):  # a disk that fails may be well again: the checkpoint is not lost
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
    """The optimizer inside Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _own_name(rank: int) -> str:
    return f"process-{rank:04d}.json"


def _random_state(topology: Topology) -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    cuda = (
        torch.cuda.get_rng_state(topology.device).tolist()
        if topology.device.type == "cuda"
        else None
    )
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
