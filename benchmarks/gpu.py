"""Check on a GPU what only a GPU can show: `make gpu PART=correctness`, `objectives`, `memory` or
`speed`.

    python benchmarks/gpu.py correctness     tests/test_gpu.py; topologies, methods, optimizers, ...
    python benchmarks/gpu.py objectives      preference, reward, distillation, reinforcement
    python benchmarks/gpu.py memory          forecasts of `plan` and the allocator's peaks
    python benchmarks/gpu.py speed           tokens a second; also of TRL and LitGPT, if installed
    python benchmarks/gpu.py speed --only "8B|qlora"        cases by regular expression
    python benchmarks/gpu.py speed --only tokens --minutes 30      lengths until memory ends
    python benchmarks/gpu.py correctness --cpu --only lora  a rehearsal on tiny models, anywhere

Each part takes under five minutes on one GPU, all together under 15, without a network, with the
packages of this Python; it names missing packages and leaves out the cases that need them. It runs
the most important cases first until its time is up, so few cores run fewer cases, and the table
lists those left out. The folder --out receives the table, all rows as JSON, the log and the logs of
all runs. What a GPU has measured goes into benchmarks/measured.json, which `finetune plan` reads.
Exits with 0 if everything is right, 1 if anything is wrong, 2 if it cannot start.
"""

import argparse
import math
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from on_gpu import correctness, memory, objectives, picture, recording, report, speed
from on_gpu.runner import ROOT, Clock, Helper, Row, cores, environment

PARTS = ("objectives", "correctness", "memory", "speed")  # what has been seen least comes first
ORDER = {
    "correctness": "the most important cases first, until the time is up (MINUTES= gives more)",
    "objectives": "one process for each topology, the most telling cases first (ONLY= picks some)",
    "memory": "the most important cases first (MINUTES= gives more, ONLY= picks some)",
    "speed": "the most important cases first (MINUTES= gives more, ONLY= picks some)",
}
MINUTES = 4.75  # of five: killing what runs at the deadline and the table take the rest
OF_ALL = {"objectives": 3.75, "correctness": 4.0, "memory": 2.75, "speed": 3.75}  # of 15 minutes


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=(*PARTS, "all"),
        default="all",
        help="default: all, one after the other",
    )
    parser.add_argument(
        "--only",
        default="",
        help="run cases whose names match this regular expression, and their references",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder for tables, JSON and logs"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"time of each part; default: {MINUTES}, of all together under 15, without limit "
        "with --cpu",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        help="runs at once; default: as many as cores and GPU memory allow, at most 8",
    )
    parser.add_argument("--cpu", action="store_true", help="rehearse on tiny models without a GPU")
    arguments = parser.parse_args()
    try:
        re.compile(arguments.only)
    except re.error as exc:
        parser.error(f"--only {arguments.only!r} is not a regular expression: {exc}")
    if arguments.minutes is not None and not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes {arguments.minutes:g}: must be a number above 0")
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what runs is killed
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, lambda *_: sys.exit(1))
    sys.path.append(str(ROOT))  # for the project's tolerances
    parts = PARTS if arguments.part == "all" else (arguments.part,)
    return max(
        [run_part(part, arguments, Clock(60 * minutes_of(part, arguments))) for part in parts]
    )


def minutes_of(part: str, arguments: argparse.Namespace) -> float:
    """Return the time of a part: what was asked for, or what a slot of 15 minutes leaves it."""
    if arguments.minutes or arguments.cpu:
        return arguments.minutes or 600.0
    return OF_ALL[part] if arguments.part == "all" else MINUTES


def run_part(part: str, arguments: argparse.Namespace, clock: Clock) -> int:
    out: Path = arguments.out.resolve()
    logs = out / part
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    log = report.Log(out / f"{part}.log")
    work = Path(tempfile.mkdtemp(prefix="finetune-gpu-"))
    env = environment(work, threads=max(1, cores() // 8), on_cpu=arguments.cpu)
    helper = Helper(env, logs / "helper.log", clock)
    try:
        facts = helper.ask("facts", min(120.0, clock.left()))
        log(report.about(facts) if not facts["missing"] else "")
        if facts["missing"]:
            for name, why in facts["missing"].items():
                log(f"missing: {name}: {why}")
            log("nothing is run: train.py needs these; see requirements.txt")
            return 2
        for why in facts["left_out"].values():
            log(f"left out: {why}")
        if not facts["gpu"] and not arguments.cpu:
            log(
                "no GPU: PyTorch sees no CUDA device here; --cpu (make gpu CPU=1) rehearses on "
                "tiny models"
            )
            return 2
        facts["cpus"] = cores()
        jobs = arguments.jobs or parallel(facts)
        at_once = f", {jobs} at once on {facts['cpus']} cores" if part == "correctness" else ""
        log(f"{part}: {clock.seconds / 60:.3g} minutes{at_once}, {ORDER[part]}; results in {out}")
        rows: list[Row] = []
        for row in start(part, work, logs, env, facts, helper, clock, jobs, arguments, log):
            rows.append(row)
        if not rows:  # the results of the run before stay
            log(f"no case of {part} has a name that matches --only {arguments.only!r}")
            return 2
        log("\n" + report.write(out, part, rows, facts, clock.used()))
        if part == "speed":
            picture.write(out / "speed.svg", rows, report.about(facts))
        if facts["gpu"]:
            only = f" ONLY='{arguments.only}'" if arguments.only else ""
            recording.record(rows, facts, f"make gpu PART={part}{only}", out, log)
        return report.exit_code(rows)
    except RuntimeError as exc:
        log(f"failed: {exc}")
        return 1
    except BaseException:  # a signal: end the runs in threads too
        clock.stop()
        raise
    finally:
        helper.close()
        shutil.rmtree(work, ignore_errors=True)


def start(
    part: str, work: Path, logs: Path, env: dict[str, str], facts: dict[str, Any], helper: Helper,
    clock: Clock, jobs: int, arguments: argparse.Namespace, log: report.Log,
) -> Any:  # fmt: skip
    only, is_tiny = arguments.only, arguments.cpu
    if part in ("correctness", "objectives"):
        on_cpu = {**env, "CUDA_VISIBLE_DEVICES": "-1"}
        lab = correctness.Lab(work, logs, env, on_cpu, facts, helper, clock, is_tiny, log)
        of_part = correctness if part == "correctness" else objectives
        return of_part.rows(lab, jobs, only)
    lab = memory.Lab(work, logs, env, facts, helper, clock, is_tiny, log)
    return memory.rows(lab, only) if part == "memory" else speed.rows(lab, only)


def parallel(facts: dict[str, Any]) -> int:
    """Return how many runs to do at once: one per core but one, each with 2 GB of the GPU."""
    by_memory = int(facts["free_gb"] // 2) if facts.get("gpu") else 2
    return max(1, min(8, max(2, facts["cpus"] - 1), by_memory))


if __name__ == "__main__":
    sys.exit(main())
