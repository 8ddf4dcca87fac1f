"""Run configs one after another in one process, as most of a small run is its start.

    python benchmarks/on_gpu/many_runs.py PLAN.json RESULTS.jsonl
    python -m finetune launch --config_file accelerate_configs/fsdp2.yaml --num_processes 1 \\
        benchmarks/on_gpu/many_runs.py PLAN.json RESULTS.jsonl

PLAN is a list of {name, config, stop}. `stop`: what interrupts the first of two attempts: `step` 2,
or `group` 6 of those that are scored; null: one attempt. RESULTS gets a line {name, codes, message,
seconds} for each run as it ends, and {begun} before it; what has a line there is not run again. The
process ends with 3 after an error that a GPU does not recover from: start it again for the rest.
"""

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch

import train
from finetune import config as configs
from finetune import loop
from finetune.engine.topology import Topology
from finetune.errors import Preempted
from finetune.rollouts.shard_file import ShardFile
from finetune.survival.preemption import StopFlag

BROKEN = 3
OF_A_TOPOLOGY = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def main() -> int:
    plan, results = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    done = {line.get("name") or line["begun"] for line in lines(results)}
    asked = dict(os.environ)
    # The process group stays for the next run.
    Topology.close = lambda self: self.accelerator.free_memory()  # type: ignore[method-assign]
    with results.open("a") as file:

        def note(**values: Any) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        for each in plan:
            if each["name"] not in done:
                note(begun=each["name"])
                found = run(each, asked)
                note(name=each["name"], **found)
                if is_broken():
                    return BROKEN
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(each: Mapping[str, Any], asked: Mapping[str, str]) -> dict[str, Any]:
    """Make the attempts of a run; return their exit codes, and what the last one said."""
    began, codes, message = time.monotonic(), [], ""
    for stop in (each["stop"], None) if each["stop"] else (None,):
        for name in [name for name in os.environ if name.startswith(OF_A_TOPOLOGY)]:
            del os.environ[name]
        os.environ.update(asked)
        code, message = attempt(each["config"], stop)
        codes.append(code)
        gc.collect()
        if torch.cuda.is_available() and not is_broken():
            torch.cuda.empty_cache()
    return {"codes": codes, "message": message, "seconds": round(time.monotonic() - began, 2)}


def attempt(config: str, stop: Mapping[str, int] | None) -> tuple[int, str]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    flag = StopFlag()
    try:
        with stopped(flag, stop):
            loop.run(*configs.parse(["--config", config]), flag)
    except (Exception, Preempted) as exc:
        return train.report(exc), f"{type(exc).__name__}: {exc}"[:400]
    finally:
        flag.close()
    return 0, ""


@contextlib.contextmanager
def stopped(flag: StopFlag, when: Mapping[str, int] | None) -> Iterator[None]:
    """Set the flag, as SIGTERM does, at a call of this number."""
    if not when:
        yield
        return
    [(what, number)] = when.items()
    owner, name = {"step": (loop, "train_step"), "group": (ShardFile, "scored")}[what]
    inner: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def counted(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            flag.reason = "SIGTERM"
        return inner(*arguments, **keywords)

    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, inner)


def is_broken() -> bool:
    """Return whether the GPU refuses work from now on, as after an illegal access."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries may wait for each other
