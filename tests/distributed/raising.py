"""Raise errors on one of two processes; print what each gets, one line of JSON per case."""

import json
import os
import traceback
from datetime import timedelta

import torch

from finetune.engine.topology.processes import Processes
from finetune.errors import DirectoryInUse, OutOfMemory, TopologyError, TrainingDiverged, UserError

OURS = (DirectoryInUse, OutOfMemory, TrainingDiverged, TopologyError, UserError)


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=20))
    processes = Processes(rank, 2, torch.device("cpu"))
    for kind in (*OURS, KeyError, torch.OutOfMemoryError, SystemExit, KeyboardInterrupt):

        def where_it_happened(kind=kind, always=True):
            if always or rank == 1:
                try:
                    raise ValueError("the cause")
                except ValueError as exc:
                    raise kind("why") from exc

        log("on_main", kind, lambda: processes.on_main(where_it_happened))
        log("on_every", kind, lambda: processes.on_every(lambda: where_it_happened(always=False)))
    log(
        "both",
        UserError,
        lambda: processes.on_every(lambda: fail(TopologyError if rank == 0 else UserError)),
    )
    assert processes.on_main(lambda: rank) == 0
    assert processes.on_every(lambda: rank) == rank
    torch.distributed.destroy_process_group()


def fail(kind):
    raise kind("why")


def log(verb, kind, act):
    try:
        act()
    except BaseException as exc:
        frames = [frame.name for frame in traceback.extract_tb(exc.__traceback__)]
        result = {
            "verb": verb, "kind": kind.__name__, "rank": int(os.environ["RANK"]),
            "type": type(exc).__name__, "message": str(exc),
            "code": getattr(exc, "exit_code", None),
            "cause": repr(exc.__cause__), "shown": "where_it_happened" in frames,
        }  # fmt: skip
        print("TOLD " + json.dumps(result), flush=True)
