"""tests/test_gpu.py, and the matrix: real runs, compared with each other."""

import contextlib
import importlib.util
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from on_gpu import matrix
from on_gpu.matrix import Case, Tolerance
from on_gpu.report import KNOWN, LEFT_OUT, NO_TURN, RIGHT, WRONG
from on_gpu.runner import (
    ROOT,
    Clock,
    Ended,
    Helper,
    Row,
    cores,
    last_words,
    run,
    side_by_side,
    threads,
)

PART = "correctness"
SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CASE_SECONDS, COMPILED_SECONDS, PYTEST_SECONDS = 100.0, 170.0, 240.0
USUAL_SECONDS, USUAL_COMPILED_SECONDS = 25.0, 90.0  # of a case on few cores, until one has ended
# Times the longest so far: a case that does not start is left out, one that is killed proves
# nothing.
ENDS_WELL_WITHIN = 1.5
REHEARSED = 5  # times as long: a laptop has other things to do
SIGNAL_AT = 3
PYTEST_AT_ONCE = 4


@dataclass
class Curves:
    """What a run has left behind."""

    code: int | None
    output: str
    was_out_of_turn: bool
    seconds: float
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    evals: list[float] = field(default_factory=list)
    num_saves: int = 0
    skipped: list[int] = field(default_factory=list)
    """Steps that fp16 left out; the first is 1."""
    opened: float | None = None
    """Loss of one text by the export, opened with plain transformers or peft."""
    problem: str = ""


@dataclass
class Lab:
    """Where cases run."""

    work: Path
    logs: Path
    env: dict[str, str]
    env_on_cpu: dict[str, str]
    facts: Mapping[str, Any]
    helper: Helper
    clock: Clock
    is_tiny: bool
    log: Callable[[str], None]
    asking: threading.Lock = field(default_factory=threading.Lock)

    def missing(self, case: Case) -> str:
        """Return why a case cannot run here; empty if it can."""
        for need in sorted(case.needs):
            if need == "gpu" and not self.facts.get("gpu"):
                return "needs a GPU"
            if need == "hopper" and not str(self.facts.get("capability")).startswith("9."):
                return "needs compute capability 9 (Hopper)"
            if need == "ada" and not has_float8(self.facts):
                return "needs compute capability 8.9 (Ada) or newer"
            if need == "compiler" and not self.facts["compiler"]:
                return "torch.compile needs a C++ compiler (CXX, or g++)"
            if need in self.facts["left_out"]:
                return f"needs {need}"
        return ""


def has_float8(facts: Mapping[str, Any]) -> bool:
    return tuple(map(int, facts.get("capability", "0.0").split("."))) >= (8, 9)


def rows(lab: Lab, jobs: int, only: str) -> Iterator[Row]:
    """Run pytest and the matrix side by side, and give a row for each test and case."""
    found = matrix.chosen(matrix.cases(), only)
    with threads(1, lab.clock) as beside:
        tests = beside.submit(run_pytest, lab) if not only or only == "pytest" else None
        make(lab)
        can = [case for case in found if not lab.missing(case)]
        turns = Turns(lab, jobs, can, is_asked_for=bool(only))
        timed = {
            row.name: row for row in side_by_side(jobs, can, turns.take, lab.clock, turns.none)
        }
        without = {case.name: LEFT_OUT for case in found if lab.missing(case)}
        without |= {row.name: row.status for row in timed.values() if row.status}
        for case in found:
            if case.name in without:
                why = lab.missing(case) or timed[case.name].reason or turns.why_left_out()
                yield Row(PART, case.name, without[case.name], why)
                continue
            own = turns.curves[case.name]
            row = row_of(case, own, turns.curves.get(reference(case, own)))
            if row.status == NO_TURN and case.beside in without:
                row.status = without[case.beside]
                row.reason = f"{case.beside}, which it is compared with, has not run"
            yield row
        if not only:
            for topology, why in matrix.LEFT_OUT.items():
                yield Row(PART, f"{topology}.yaml", LEFT_OUT, why)
        if tests is not None:
            yield from tests.result()


class Turns:
    """Run the cases that fit the time of a part; those of matrix.FIRST, or asked for, always."""

    def __init__(self, lab: Lab, jobs: int, cases: Sequence[Case], is_asked_for: bool) -> None:
        self._lab, self._jobs, self._is_asked_for = lab, jobs, is_asked_for
        self._cases = {case.name: case for case in cases}
        self._again = threading.Lock()
        self.curves: dict[str, Curves] = {}

    def take(self, case: Case) -> Row:
        if not self._must(case) and self._lab.clock.left() < ENDS_WELL_WITHIN * self._longest(case):
            return self.none(case)
        own = self._run(case, case.name)
        name = reference(case, own)
        if (
            own.code == 0
            and case.beside in self._cases
            and 0 < len(own.skipped) <= _steps(case) // 2
        ):
            with self._again:
                if name not in self.curves:
                    self._run(self._cases[case.beside], name, own.skipped)
        return Row(PART, case.name, "", seconds=own.seconds)

    def none(self, case: Case) -> Row:
        """Give the row of a case that has not started."""
        if self._must(case):
            return Row(
                PART, case.name, NO_TURN, "the time of this part was up; MINUTES=9 gives more"
            )
        return Row(PART, case.name, LEFT_OUT)

    def why_left_out(self) -> str:
        """Return the reason, with the minutes that should be enough for all."""
        ran = [own.seconds for own in self.curves.values()]
        usual = sum(ran) / len(ran) if ran else USUAL_SECONDS
        late = [case for name, case in self._cases.items() if name not in self.curves]
        more = sum(
            max(usual, USUAL_COMPILED_SECONDS) if "compiler" in case.needs else usual
            for case in late
        )
        minutes = (
            math.ceil((self._lab.clock.used() + ENDS_WELL_WITHIN * more / self._jobs) / 60) + 1
        )
        return f"no time for it, {self._jobs} at once; MINUTES={minutes} should be enough for all"

    def _run(self, case: Case, name: str, without: Sequence[int] = ()) -> Curves:
        own = self.curves[name] = run_case(case, self._lab, without, name)
        self._lab.log(f"{name}: ended with {own.code} at {self._lab.clock.used():.0f} s")
        return own

    def _must(self, case: Case) -> bool:
        return self._is_asked_for or case.name in matrix.FIRST

    def _longest(self, case: Case) -> float:
        """Return the seconds of the longest case of this kind so far.

        Twice that for fp16, whose reference may have to run again.
        """
        is_compiled = "compiler" in case.needs
        alike = [
            own.seconds
            for name, own in list(self.curves.items())
            if name.startswith("compiled") == is_compiled
        ]
        usual = max(alike, default=USUAL_COMPILED_SECONDS if is_compiled else USUAL_SECONDS)
        return 2 * usual if case.settings.get("train.precision") == "fp16" else usual


def reference(case: Case, own: Curves) -> str:
    """Name the run to compare with: that of `beside`, without the steps that fp16 skipped.

    After a skip every loss is of weights that moved once less, by other examples than the reference
    had seen by then: neither step by step nor shifted can the two runs agree. With the same steps
    left out they must.
    """
    without = own.skipped if not case.only_first else []
    return "-".join([case.beside or "", *(["without", *map(str, without)] if without else [])])


def make(lab: Lab) -> None:
    """Make the base model and the rows that all cases share."""
    shape = TINY if lab.is_tiny else SHAPE
    lab.helper.ask(
        "make_base", lab.clock.left(), folder=str(lab.work / "base"), shape=shape, dtype="float32"
    )
    lab.helper.ask(
        "make_rows", 60, path=str(lab.work / "rows.jsonl"), number=200, kind="questions", length=0
    )


def config(case: Case, name: str, lab: Lab) -> Path:
    """Write the run config of a case, and return its path."""
    values = {
        "run.name": name, "run.dir": str(lab.work / "runs"), "model.path": str(lab.work / "base"),
        "data.train": str(lab.work / "rows.jsonl"), "data.cache_dir": str(lab.work / "cache"),
        "data.max_length": 256 if lab.is_tiny else 512, **matrix.BASE, **case.settings,
    }  # fmt: skip
    path = lab.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections(values)))
    return path


def sections(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{"train.precision": "bf16"} -> {"train": {"precision": "bf16"}}"""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, name = key.split(".")
        nested.setdefault(section, {})[name] = value
    return nested


def command(topology: str | None, path: Path) -> list[str]:
    """Return the command of a user; through the launcher if there is a topology file."""
    script = ["train.py", "--config", str(path)]
    if topology is None:
        return [sys.executable, *script]
    several = (
        [] if topology == "single" else ["--num_processes", "1", *matrix.SIZES.get(topology, ())]
    )
    file = f"accelerate_configs/{topology}.yaml"
    return [sys.executable, "-m", "finetune", "launch", "--config_file", file, *several, *script]


def run_case(case: Case, lab: Lab, without: Sequence[int], name: str) -> Curves:
    """Run a case, interrupt it if it says so, and open what it exported.

    `without`: steps to leave out; `name`: of the run.
    """
    path, folder, log = config(case, name, lab), lab.work / "runs" / name, lab.logs / f"{name}.log"
    limit = COMPILED_SECONDS if "compiler" in case.needs else CASE_SECONDS
    limit *= REHEARSED if lab.is_tiny else 1
    env = lab.env_on_cpu if case.on_cpu else lab.env
    seconds, problem = 0.0, ""
    if case.is_interrupted:
        first = run(
            command(case.topology, path), env=env, log=log, limit=limit, clock=lab.clock,
            meanwhile=lambda process: interrupt(process, folder),
        )  # fmt: skip
        seconds = first.seconds
        if first.code == 0:
            problem = "it ended before the signal came"
        elif first.code != 75:
            return read(folder, first, first.seconds)
        elif not (step := len(lines(folder / "metrics.jsonl"))) < matrix.LONG:
            problem = f"interrupted at step {step}, which is the end"
    asked = command(case.then or case.topology, path)
    if without:
        asked[1:2] = [str(ROOT / "benchmarks/on_gpu/skipping.py"), ",".join(map(str, without))]
    ended = run(asked, env=env, log=log, limit=limit, clock=lab.clock)
    found = read(folder, ended, seconds + ended.seconds)
    found.problem = found.problem or problem
    if case.is_interrupted and not problem and "resumed from" not in ended.output:
        found.problem = "the second attempt did not resume"
    if found.code == 0 and not found.problem:
        try:
            with lab.asking:
                found.opened = lab.helper.ask(
                    "open_export", lab.clock.left(), folder=str(folder / "model")
                )
        except RuntimeError as exc:
            found.problem, found.was_out_of_turn = f"the export: {exc}", lab.clock.left() <= 0
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def interrupt(process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Send SIGTERM as soon as a few steps are done."""
    if len(lines(folder / "metrics.jsonl")) < SIGNAL_AT:
        return False
    process.send_signal(signal.SIGTERM)
    return True


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file that may be growing."""
    with contextlib.suppress(OSError):
        return [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
    return []


def read(folder: Path, ended: Ended, seconds: float) -> Curves:
    metrics, evals, saves = (
        lines(folder / f"{name}.jsonl") for name in ("metrics", "eval", "saves")
    )
    return Curves(
        ended.code, ended.output, ended.was_out_of_turn, seconds,
        losses=[_number(line["loss"]) for line in metrics],
        norms=[_number(line["grad_norm"]) for line in metrics if not line.get("skipped")],
        evals=[_number(line["eval_loss"]) for line in evals], num_saves=len(saves),
        skipped=[number for number, line in enumerate(metrics, 1) if line.get("skipped")],
    )  # fmt: skip


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def row_of(case: Case, own: Curves, other: Curves | None) -> Row:
    """Return whether a run did what it must, by itself and compared with its reference."""
    row = Row(PART, case.name, WRONG, seconds=own.seconds)
    if own.was_out_of_turn:
        row.status, row.reason = NO_TURN, "the time of this part was up while it ran"
        return row
    if own.losses and own.evals:
        row.values = {"first loss": own.losses[0], "last loss": own.losses[-1]}
    row.reason = own.problem or wrong_by_itself(own, _steps(case))
    if row.reason or case.beside is None or case.within is None:
        row.status = WRONG if row.reason else RIGHT
        row.values["compared"] = "nothing"
        return row
    row.values["beside"] = case.beside
    if own.skipped:
        row.values["skipped"] = len(own.skipped)
        if len(own.skipped) > _steps(case) // 2:
            row.reason = f"{len(own.skipped)} of {_steps(case)} steps overflowed"
            return row
    name = reference(case, own)
    if other is None or other.was_out_of_turn:
        row.status = NO_TURN
        row.reason = (
            f"the time of this part was up before {name}, which it is compared with, had ended"
        )
        return row
    if why := other.problem or wrong_by_itself(other, _steps(case)):
        row.reason = f"{name}, which it is compared with, did not end well: {why}"
        return row
    compare(row, case, case.within, own, other)
    return row


def compare(row: Row, case: Case, within: Tolerance, own: Curves, other: Curves) -> None:
    """Write into `row` how far two runs differ, and whether that is within the tolerance."""
    found = differences(own, other, case.only_first)
    row.values |= (
        {"loss": found["loss"], "compared": "the first loss"}
        if case.only_first
        else {**found, "compared": "all"}
    )
    if not found["loss"] <= within.loss:
        row.reason = (
            f"losses differ by {found['loss']:.1e} from {case.beside}, more than "
            f"{within.loss:.1e} ({within.why})"
        )
    elif not found["norm"] <= within.norm:
        row.reason = (
            f"gradient norms differ by {found['norm']:.1e} from {case.beside}, more than "
            f"{within.norm:.1e}"
        )
    else:
        row.status = RIGHT


def _steps(case: Case) -> int:
    return int(case.settings.get("train.max_steps", matrix.STEPS))


def wrong_by_itself(own: Curves, steps: int) -> str:
    """Return what a run has not done that each must; empty if nothing."""
    if own.code is None:
        return f"killed, as it had not ended after {own.seconds:.0f} s"
    if own.code != 0:
        return f"ended with {own.code}: {last_words(own.output)}"
    if len(own.losses) != steps:
        return f"{len(own.losses)} steps of {steps} are on record"
    if not all(map(math.isfinite, [*own.losses, *own.norms, *own.evals])):
        return "a loss or a gradient norm is not finite"
    if own.num_saves < 2:
        return f"{own.num_saves} saves are on record, and at least 2 were due"
    if len(own.evals) < 2:
        return f"{len(own.evals)} evaluations are on record, and at least 2 were due"
    if own.evals[-1] >= own.evals[0]:
        return (
            f"the loss of held-out rows did not fall: {own.evals[0]:.5f} became {own.evals[-1]:.5f}"
        )
    if own.opened is None or not math.isfinite(own.opened):
        return "the opened export gives no finite loss"
    return ""


def differences(own: Curves, other: Curves, only_first: bool = False) -> dict[str, float]:
    """Return the largest relative differences; inf if there are not as many values.

    Losses are those of steps, evaluations and the export.
    """
    if only_first:
        return {"loss": _relative(own.losses[:1], other.losses[:1]), "norm": 0.0}
    parts = [
        _relative(own.losses, other.losses),
        _relative(own.evals, other.evals),
        _relative([own.opened], [other.opened]),
    ]
    left_out = {number - 1 for number in own.skipped}  # their norm is infinite
    there = [norm for number, norm in enumerate(other.norms) if number not in left_out]
    return {"loss": max(parts), "norm": _relative(own.norms, there)}


def _relative(own: Sequence[float | None], other: Sequence[float | None]) -> float:
    if len(own) != len(other) or None in (*own, *other):
        return math.inf
    return max(
        (
            abs(a - b) / max(abs(b), 1e-12)
            for a, b in zip(own, other)
            if a is not None and b is not None
        ),
        default=0.0,
    )


def run_pytest(lab: Lab) -> list[Row]:
    """Run tests/test_gpu.py, without plugins that other projects have installed."""
    if "pytest" in lab.facts["left_out"]:
        return [Row(PART, "tests/test_gpu.py", LEFT_OUT, "needs pytest")]
    results = lab.work / "pytest.xml"
    options = f"-q -p no:cacheprovider --junitxml={results}".split()
    if importlib.util.find_spec("xdist"):  # one after the other they take longer than the part
        options += ["-n", str(max(1, min(PYTEST_AT_ONCE, cores() // 4)))]
    asked = [sys.executable, "-m", "pytest", "tests/test_gpu.py", *options]
    ended = run(
        asked, env=lab.env, log=lab.logs / "pytest.log", limit=PYTEST_SECONDS, clock=lab.clock
    )
    if not results.exists():
        status, why = WRONG, f"ended with {ended.code}: {last_words(ended.output)}"
        if ended.was_out_of_turn:
            status, why = NO_TURN, "the time of this part was up"
        return [Row(PART, "tests/test_gpu.py", status, why, ended.seconds)]
    return list(tests_in(results.read_text()))


def tests_in(junit: str) -> Iterator[Row]:
    """Give a row for each test of a report in JUnit's format."""
    for case in ElementTree.fromstring(junit).iter("testcase"):
        row = Row(
            PART, f"test_gpu.py::{case.get('name')}", RIGHT, seconds=float(case.get("time", 0))
        )
        row.values = {each.get("name", ""): each.get("value") for each in case.iter("property")}
        for kind, status in (("failure", WRONG), ("error", WRONG), ("skipped", LEFT_OUT)):
            if (found := case.find(kind)) is not None:
                row.status = status
                row.reason = (found.get("message") or kind).splitlines()[0][:300]
                if found.get("type") == "pytest.xfail":
                    row.status = KNOWN
        yield row
