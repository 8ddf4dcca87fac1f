"""Objectives beyond sft, beside the same on the CPU: runs of one topology share a process."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from on_gpu import correctness, objective_cases
from on_gpu.correctness import Lab
from on_gpu.objective_cases import BASE, FIRST_KL, GAPS, STEPS, ObjectiveCase
from on_gpu.report import LEFT_OUT, NO_TURN, RIGHT, WRONG
from on_gpu.runner import Ended, Row, run, threads

PART = "objectives"
SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
LARGER = {**SHAPE, "hidden_size": 192, "tie_word_embeddings": True}
NUM_ROWS, FACTOR = 60, 4.0
# Losses near 0, as a policy gradient's at first, are compared with this instead of with themselves.
LEAST = 0.1
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}  # as train.py sets it
AGAIN = 3  # starts of a process that a broken GPU ends
FOLDERS = {"teacher": LARGER, "base": SHAPE}


@dataclass
class Result:
    """What a run has left behind."""

    codes: list[int]
    message: str = ""
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    saves: int = 0
    phases: list[list[dict[str, Any]]] = field(default_factory=list)
    """The completions of each phase, in their order."""


def chosen(only: str) -> list[ObjectiveCase]:
    """Return the cases whose names match, and what they are compared with or need."""
    found = objective_cases.cases()
    by_name = {case.name: case for case in found}
    wanted = {name for name in by_name if re.search(only, name)}
    while (
        more := {
            each
            for name in wanted
            for each in (by_name[name].beside, reward_run(by_name[name]))
            if each
        }
        - wanted
    ):
        wanted |= more
    return [case for case in found if case.name in wanted]


def reward_run(case: ObjectiveCase) -> str | None:
    """Return the run whose model rewards the completions of a case."""
    if objective_cases.REWARD_MODEL not in json.dumps(case.settings):
        return None
    return "cpu-reward-full" if case.on_cpu else "reward-full"


def rows(lab: Lab, jobs: int, only: str) -> Iterator[Row]:
    """Run all processes side by side, and give a row for each case."""
    found = chosen(only)
    if not found:
        return
    make(lab)
    can = [case for case in found if not lab.missing(case)]
    names = list(dict.fromkeys(case.process for case in can))
    groups = [[case for case in can if case.process == name] for name in names]
    results: dict[str, Result] = {}
    with threads(max(jobs, len(groups)), lab.clock) as pool:
        for part in pool.map(lambda group: run_group(group, lab), groups):
            results |= part
    for case in found:
        if why := lab.missing(case):
            yield Row(PART, case.name, LEFT_OUT, why)
        elif case.beside and lab.missing(next(c for c in found if c.name == case.beside)):
            yield Row(
                PART, case.name, LEFT_OUT, f"{case.beside}, beside which it stands, has not run"
            )
        else:
            own, beside = results.get(case.name), case.beside
            yield row_of(case, own, results.get(beside) if beside else None)


# ------------------------------------------------------------------------------------ running


def make(lab: Lab) -> None:
    """Make the models and the rows that cases share."""
    for name, shape in FOLDERS.items():
        lab.helper.ask(
            "make_base", lab.clock.left(), folder=str(lab.work / name), shape=shape,
            dtype="float32", factor=FACTOR,
        )  # fmt: skip
    for kind in ("questions", "pairs", "judged", "steps", "prompts"):
        path = str(lab.work / f"{kind}.jsonl")
        lab.helper.ask("make_rows", 60, path=path, number=NUM_ROWS, kind=kind, length=0)
    config = write(lab, "teaches", {"model.path": str(lab.work / "base"), **BASE}, "questions")
    lab.helper.ask(
        "teach", lab.clock.left(), rows=str(lab.work / "questions.jsonl"), config=str(config),
        teacher=str(lab.work / "teacher"), output=str(lab.work / "taught.jsonl"),
    )  # fmt: skip


def write(lab: Lab, name: str, settings: Mapping[str, Any], rows: str) -> Path:
    """Write a run config, with the paths for which words stand."""
    values = {
        "run.name": name, "run.dir": str(lab.work / "runs"), "model.path": str(lab.work / "base"),
        "data.train": str(lab.work / f"{rows}.jsonl"), "data.cache_dir": str(lab.work / "cache"),
        **BASE, **settings,
    }  # fmt: skip
    path = lab.work / f"{name}.yaml"
    path.write_text(yaml.safe_dump(correctness.sections(values)))
    return path


def config(case: ObjectiveCase, lab: Lab) -> Path:
    text = json.dumps(case.settings)
    for word, path in {
        objective_cases.TEACHER: lab.work / "teacher",
        objective_cases.TAUGHT: lab.work / "taught.jsonl",
        objective_cases.REWARD_MODEL: lab.work / "runs" / (reward_run(case) or "") / "model",
    }.items():
        text = text.replace(f'"{word}"', json.dumps(str(path)))
    return write(lab, case.name, json.loads(text), case.rows)


def run_group(group: Sequence[ObjectiveCase], lab: Lab) -> dict[str, Result]:
    """Run cases in one process, and again those after one that broke it."""
    first = group[0]
    plan, results = (lab.work / f"{first.process}.{end}" for end in ("json", "jsonl"))
    stops = [stop_of(case) if case.is_interrupted else None for case in group]
    plan.write_text(json.dumps([
        {"name": case.name, "config": str(config(case, lab)), "stop": stop}
        for case, stop in zip(group, stops)
    ]))  # fmt: skip
    script = ["benchmarks/on_gpu/many_runs.py", str(plan), str(results)]
    env = lab.env_on_cpu if first.on_cpu else lab.env | ALLOCATOR
    log = lab.logs / f"{first.process}.log"
    ended = Ended(None, 0.0, "")
    for _ in range(AGAIN):
        asked = [*correctness.command(first.topology, Path("x"))[:-3], *script]
        ended = run(asked, env=env, log=log, limit=lab.clock.left(), clock=lab.clock)
        lab.log(f"{first.process}: ended with {ended.code} at {lab.clock.used():.0f} s")
        if ended.code == 0 or ended.code is None or lab.clock.left() <= 0:
            break
    return read(group, results, ended, lab)


def stop_of(case: ObjectiveCase) -> dict[str, int]:
    """Say when to interrupt: while the second phase is sampled, or between steps."""
    prompts = int(BASE["train.global_batch_size"])  # a group of one: as many as completions
    rollouts = case.settings.get("objective.rollouts")
    if not rollouts:
        return {"step": 2}
    per_phase = prompts // rollouts["group_size"] * rollouts["steps_per_phase"]
    return {"group": per_phase + per_phase // 2}


def read(
    group: Sequence[ObjectiveCase], results: Path, ended: Ended, lab: Lab
) -> dict[str, Result]:
    """Return what the runs of a process have left; a run that broke it has no line."""
    known = correctness.lines(results)
    made: dict[str, Result] = {}
    for line in known:
        if "name" in line:
            made[line["name"]] = Result(line["codes"], line["message"], line["seconds"])
    for begun in (line["begun"] for line in known if "begun" in line):
        if begun not in made and not ended.was_out_of_turn:
            made[begun] = Result([ended.code or 1], f"its process ended: {last(ended)}")
    for case in group:
        if case.name not in made:
            if not ended.was_out_of_turn and lab.clock.left() > 0:
                made[case.name] = Result([1], f"its process ended before: {last(ended)}")
            continue
        own, folder = made[case.name], lab.work / "runs" / case.name
        own.metrics, own.evals, saves = (
            correctness.lines(folder / f"{name}.jsonl") for name in ("metrics", "eval", "saves")
        )
        own.saves = len(saves)
        own.phases = [
            [each for line in correctness.lines(path) for each in line.get("rollouts", ())]
            for path in sorted(folder.glob("rollouts/phase-*.jsonl"))
        ]
    return made


def last(ended: Ended) -> str:
    return correctness.last_words(ended.output)


# ------------------------------------------------------------------------------ right or wrong


def row_of(case: ObjectiveCase, own: Result | None, other: Result | None) -> Row:
    """Return whether a run did what it must, by itself and beside its reference."""
    if own is None:
        return Row(PART, case.name, NO_TURN, "the time of this part was up; MINUTES=9 gives more")
    row = Row(PART, case.name, WRONG, seconds=own.seconds)
    row.reason = wrong_by_itself(case, own)
    if own.metrics:
        row.values = {"last loss": own.metrics[-1]["loss"]}
    if case.samples and own.phases:
        row.values |= {"mean gap": gaps(own)[0], "largest gap": gaps(own)[1]}
    if row.reason or case.beside is None or case.within is None:
        row.status = WRONG if row.reason else RIGHT
        return row
    row.values["beside"] = case.beside
    if other is None or other.codes[-1] != 0:
        row.status = NO_TURN if other is None else WRONG
        row.reason = f"{case.beside}, which it is compared with, has not ended well"
        return row
    same = same_phases(own, other) if case.samples else None
    steps = STEPS if same is None else 2 * same
    found = differences(own, other, steps)
    row.values |= {**found, "steps compared": steps}
    if steps == 0:
        row.reason = f"its first completions are not those of {case.beside}"
    elif not found["loss"] <= case.within.loss:
        row.reason = (
            f"losses differ by {found['loss']:.1e} from {case.beside}, more than "
            f"{case.within.loss:.1e} ({case.within.why})"
        )
    elif not found["norm"] <= case.within.norm:
        row.reason = (
            f"gradient norms differ by {found['norm']:.1e} from {case.beside}, more than "
            f"{case.within.norm:.1e}"
        )
    else:
        row.status = RIGHT
    return row


def wrong_by_itself(case: ObjectiveCase, own: Result) -> str:
    """Return what a run has not done that each must; empty if nothing."""
    wanted = [75, 0] if case.is_interrupted else [0]
    if own.codes != wanted:
        return f"ended with {own.codes}, not {wanted}: {own.message}"
    if len(own.metrics) != STEPS:
        return f"{len(own.metrics)} steps of {STEPS} are on record"
    if own.saves < 2 or not own.evals:
        return f"{own.saves} saves and {len(own.evals)} evaluations are on record"
    numbers = [line[name] for line in own.metrics for name in ("loss", "grad_norm")]
    skips = case.precision == "fp16" and any(line.get("skipped") for line in own.metrics)
    if not skips and not all(each is not None and math.isfinite(each) for each in numbers):
        return "a loss or a gradient norm is not finite"
    return wrong_samples(case, own) if case.samples else ""


def wrong_samples(case: ObjectiveCase, own: Result) -> str:
    """Return what is wrong with what a run sampled, and learned from; empty if nothing."""
    if len(own.phases) != 2:
        return f"{len(own.phases)} phases of 2 are on record"
    if case.settings["objective.kind"] != "distill":  # which asks for no log-probabilities
        mean, largest = gaps(own)
        most = GAPS[case.precision]
        if not (mean <= most[0] and largest <= most[1]):
            return (
                f"the sampler's log-probabilities are {mean:.2g} nats from the update's on average "
                f"and {largest:.2g} at most; {most[0]:g} and {most[1]:g} may be"
            )
    for number, line in enumerate(own.metrics):
        is_first = number % 2 == 0  # of its phase
        if is_first and "ratio" in line and line["ratio"] != 1.0 and not is_compiled(case):
            return f"the ratio of step {number + 1}, the first of its phase, is {line['ratio']!r}"
    first = own.metrics[0].get("kl", 0.0)
    if not abs(first) <= FIRST_KL[case.precision]:
        return f"the divergence of the first step from the start is {first:.2g}, and should be 0"
    return ""


def is_compiled(case: ObjectiveCase) -> bool:
    """Whether learning runs other kernels than the pass before it."""
    return bool(case.settings.get("train.compile"))


def gaps(own: Result) -> tuple[float, float]:
    """Return (mean, largest) distance of the sampler's log-probabilities from the update's."""
    found = [
        abs(a - b)
        for phase in own.phases
        for each in phase
        for a, b in zip(each["sampler_logprobs"], each.get("old_logprobs") or ())
    ]
    return (sum(found) / len(found), max(found)) if found else (0.0, 0.0)


def same_phases(own: Result, other: Result) -> int:
    """Count the phases, from the first, whose completions are the same tokens."""
    count = 0
    for mine, theirs in zip(own.phases, other.phases):
        if [each["ids"] for each in mine] != [each["ids"] for each in theirs]:
            break
        count += 1
    return count


def differences(own: Result, other: Result, steps: int) -> dict[str, float]:
    """Return the largest differences of losses and norms of the first steps, as parts of them."""
    pairs = list(zip(own.metrics[:steps], other.metrics[:steps]))
    kept = [(a, b) for a, b in pairs if not (a.get("skipped") or b.get("skipped"))]
    return {
        name: max((_apart(a[key], b[key]) for a, b in kept), default=0.0)
        for name, key in (("loss", "loss"), ("norm", "grad_norm"))
    }


def _apart(a: float | None, b: float | None) -> float:
    if a is None or b is None:
        return math.inf
    return abs(a - b) / max(abs(b), LEAST)
