"""Real runs of train.py that start in a fraction of a second and can be killed anywhere.

Importing torch takes seconds, and hundreds of processes are to die here. So one server imports
everything and is forked for each: Python's own forkserver. What runs is train.main, to the end of
the process; what kills it is SIGKILL.
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Workshop, read_jsonl
from safetensors.torch import load_file

from finetune.survival import launcher

PROTOCOL = {
    str(ROOT / "finetune/engine/checkpoint" / name)
    for name in ("contents.py", "folder.py", "resume.py", "saver.py")
} | {
    str(ROOT / "finetune/rollouts" / name)
    for name in ("phases.py", "phase_sampler.py", "rollouts.py", "shard_file.py")
}


@dataclass(frozen=True)
class Death:
    """SIGKILL before the n-th execution of a line of the protocol, such as "folder.py:77"."""

    line: str
    time: int


def child(
    rank: int,
    script: str,
    arguments: list[str],
    environment: dict[str, str],
    log: str,
    death: Death | None,
) -> None:
    """Run a script in the forked process as its own command line would."""
    assert "faults.preloaded" in sys.modules, (
        "python -c 'import faults.preloaded' says which import has failed"
    )
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    main = importlib.import_module(script).main
    counts = os.environ.get("COUNTS_LINES")
    counted = trace(death) if death or counts else {}
    if stands := os.environ.get("STANDS_STILL"):
        stand_still(*map(int, stands.split(":")))
    sys.argv = [script, *arguments]
    code = main()
    if counts:
        Path(f"{counts}.{rank}").write_text(json.dumps(counted))
    sys.stderr.flush()
    os._exit(code or 0)


def stand_still(rank: int, step: int) -> None:
    """Block the main thread of one process from a step on, as a dead disk would."""
    from finetune.data.batches import Batches

    at = Batches.at

    def slow(self: Any, number: int) -> Any:
        if number == step and int(os.environ.get("RANK", "0")) == rank:
            time.sleep(1000)
        return at(self, number)

    Batches.at = slow  # type: ignore[method-assign]


def trace(death: Death | None) -> dict[str, int]:
    """Count how often each protocol line executes, in any thread; die before the chosen one."""
    counted: dict[str, int] = {}

    def line(frame: Any, event: str, argument: Any) -> Any:
        if event == "line":
            where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            counted[where] = counted.get(where, 0) + 1
            if death == Death(where, counted[where]):
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: Any, event: str, argument: Any) -> Any:
        code = frame.f_code
        is_asked_often = code.co_name in ("is_time", "has_ended")
        return line if code.co_filename in PROTOCOL and not is_asked_often else None

    sys.settrace(call)
    threading.settrace(call)
    return counted


KILLS = int(os.environ.get("FINETUNE_KILLS", "3"))  # make faults: 201
long_form = pytest.mark.fault
# The server finds what it is to import by this alone.
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["faults.preloaded"])


@dataclass
class Launch:
    """All processes of one start of a run."""

    processes: list[Any]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def kill(self, ranks: list[int], number: int = signal.SIGKILL) -> None:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def codes(self, within: float = 120.0) -> list[int]:
        """Return all exit codes (-9: killed); fail if a process outlives `within` seconds."""
        end = time.monotonic() + within
        for process in self.processes:
            process.join(max(0.01, end - time.monotonic()))
        alive = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        self.kill(alive)
        assert not alive, (
            f"processes {alive} were still there after {within:.0f} s:\n{self.output()}"
        )
        return [process.exitcode for process in self.processes]

    def output(self) -> str:
        return "\n".join(path.read_text()[-20_000:] for path in self.logs if path.exists())


def start(
    config: Path, topology: str = "single", processes: int = 1, *arguments: str,
    script: str = "train", death: Death | None = None,
    dies: int = 0, **environment: str,
) -> Launch:  # fmt: skip
    """Start train.py, or a script that runs it; `death` is for the process of rank `dies`."""
    settings = {"FINETUNE_JOIN_MINUTES": "0.3", **environment}
    logs = [config.with_suffix(f".{rank}.log") for rank in range(processes)]
    words = ["--config", str(config), *arguments]
    return fork(script, words, topology, logs, settings, death=death, dies=dies)


def fork(
    script: str, arguments: list[str], topology: str, logs: list[Path], environment: dict[str, str],
    extra: Sequence[str] = (), nodes: int = 1, death: Death | None = None, dies: int = 0,
    each: Sequence[list[str]] = (),
) -> Launch:  # fmt: skip
    """Fork every process of a script under a topology file, each with a log of its own.

    `each`: further arguments of each process.
    """
    file = ["--config_file", f"accelerate_configs/{topology}.yaml"]
    options = [[*file, "--num_processes", str(len(logs)), *extra]]
    if topology == "single" and len(logs) == 1:
        options = [[]]
    if nodes > 1:
        several = ["--num_machines", str(nodes), "--machine_rank"]
        options = [[*options[0], *several, str(node)] for node in range(nodes)]
    with contextlib.chdir(ROOT):
        planned = [one for own in options for one in launcher.read([*own, "train.py"])[0]]
    started = []
    for rank, given in enumerate(planned):
        logs[rank].unlink(missing_ok=True)
        settings = (given | environment).items()
        own = {name: value for name, value in settings if os.environ.get(name) != value}
        words = [*arguments, *(each[rank] if each else [])]
        mine = death if rank == dies else None
        process = _forks.Process(
            target=child, args=(rank, script, words, own, str(logs[rank]), mine)
        )
        process.start()
        started.append(process)
    LAUNCHED.append(Launch(started, logs))
    return LAUNCHED[-1]


LAUNCHED: list[Launch] = []


def end_all() -> None:
    while LAUNCHED:
        launch = LAUNCHED.pop()
        launch.kill(list(range(len(launch.processes))))


def wait_for(condition: Callable[[], Any], seconds: float = 60.0, every: float = 0.002) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(every)
    raise AssertionError(f"waited {seconds:.0f} s in vain")


def run_to_completion(
    config: Path, topology: str = "single", processes: int = 1, attempts: int = 3
) -> None:
    """Restart, as a cluster would, until the run is complete."""
    for _ in range(attempts):
        launch = start(config, topology, processes)
        if launch.codes() == [0] * processes:
            return
    raise AssertionError(f"not complete after {attempts} attempts:\n{launch.output()}")


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Check that a run has the steps, losses and weights of an undisturbed one."""
    lines, wanted = (read_jsonl(each / "metrics.jsonl") for each in (run, undisturbed))
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for name in ("loss", "grad_norm", "lr", "tokens", "supervised_tokens"):
        assert [line[name] for line in lines] == [line[name] for line in wanted], name
    own, other = (weights(each) for each in (run, undisturbed))
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    torn = list((run / "checkpoints").glob(".*"))
    assert not torn, "torn writes are swept away"


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported weights of a run, or those of its adapter."""
    return load_file(next((run / "model").glob("*.safetensors")))


@dataclass
class Scene:
    """A topology, a run of it that nothing disturbs, and how long that takes."""

    workshop: Workshop
    topology: str
    processes: int
    settings: dict[str, Any]
    seconds: float = 0.0
    lines: list[dict[str, int]] = field(default_factory=list)
    """Of the protocol: how often each process executes each in the whole run."""
    lines_of_a_resumption: list[dict[str, int]] = field(default_factory=list)

    def config(self, name: str) -> Path:
        return self.workshop.write(self.workshop.config(name, **self.settings))

    def undisturbed(self) -> "Scene":
        config = self.config("undisturbed")
        began = time.monotonic()
        self.lines = self._counted(config)
        self.seconds = time.monotonic() - began
        shutil.copytree(self.workshop.run_dir("undisturbed"), self.workshop.folder / "kept")
        forget(self.workshop.run_dir("undisturbed"), 6)
        self.lines_of_a_resumption = self._counted(config)
        assert_same_end(self.workshop.run_dir("undisturbed"), self.workshop.folder / "kept")
        return self

    def _counted(self, config: Path) -> list[dict[str, int]]:
        counts = self.workshop.folder / "lines.json"
        launch = start(config, self.topology, self.processes, COUNTS_LINES=str(counts))
        assert launch.codes() == [0] * self.processes, launch.output()
        return [json.loads(Path(f"{counts}.{rank}").read_text()) for rank in range(self.processes)]

    def survives(self, name: str, kills: Sequence[Callable[[Path], Launch]]) -> list[list[int]]:
        """Start and kill once per entry, finish, compare; return the exit codes of the killed."""
        config = self.config(name)
        codes = [kill(config).codes() for kill in kills]
        run_to_completion(config, self.topology, self.processes)
        assert_same_end(self.workshop.run_dir(name), self.workshop.run_dir("undisturbed"))
        return codes

    def at_a_line(
        self,
        config: Path,
        dice: random.Random,
        lines: list[dict[str, int]],
        line: str | None = None,
    ) -> Launch:
        """SIGKILL before a line of the protocol; of one process, whose loss ends the others."""
        rank = dice.randrange(self.processes) if line is None else 0
        line = line or dice.choice(sorted(lines[rank]))
        death = Death(line, dice.randint(1, lines[rank][line]))
        return start(config, self.topology, self.processes, death=death, dies=rank)

    def at_a_moment(self, config: Path, dice: random.Random) -> Launch:
        """SIGKILL at any moment, of one process or of all."""
        launch = start(config, self.topology, self.processes)
        time.sleep(dice.uniform(0.0, self.seconds))
        launch.kill(
            list(range(self.processes)) if dice.random() < 0.5 else [dice.randrange(self.processes)]
        )
        return launch


def forget(run: Path, step: int) -> None:
    """Delete the outcome and later checkpoints, as if the machine had gone after a step."""
    for later in (run / "checkpoints").glob("step-*"):
        if int(later.name.removeprefix("step-")) > step:
            shutil.rmtree(later)
    (run / "outcome.json").unlink()
