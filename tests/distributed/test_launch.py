"""python -m finetune launch returns the exit codes and output of the real train.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, launcher, session
from faults.forked import long_form

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LAUNCH = [sys.executable, "-m", "finetune", "launch"]
TWO = ["--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2"]


def start(launcher, *arguments):
    return subprocess.Popen(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process, within=240):
    """Return the exit code and the output."""
    try:
        error = process.communicate(timeout=within)[1]
    finally:
        process.kill()
    return process.returncode, error


def long_run(workshop, launcher, *topology):
    """A run that has made some of very many steps."""
    config = workshop.write(
        workshop.config(train__epochs=600, train__max_steps=3000, checkpoint__every_minutes=None)
    )
    process = start(launcher, *topology, "train.py", "--config", config)
    deadline = time.monotonic() + 180
    while workshop.num_lines() <= 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never got to training"
        time.sleep(0.05)
    return process


def children(process):
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def test_sigterm_in_mid_training_is_exit_code_75(workshop):
    process = long_run(workshop, LAUNCH, *TWO)
    process.send_signal(signal.SIGTERM)
    code, error = ended(process)
    assert code == 75, error
    outcome = workshop.outcome()
    assert outcome["state"] == "preempted"
    assert 5 < outcome["step"] < 3000


def test_sigkill_of_one_process_ends_the_other(workshop):
    process = long_run(workshop, LAUNCH, *TWO)
    workers = children(process)
    second = next(
        pid for pid in workers if "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    )
    os.kill(second, signal.SIGKILL)
    code, error = ended(process, within=60)
    assert code == 1
    assert "process 1 was killed by SIGKILL" in error
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@long_form
def test_process_that_aborts_leaves_an_outcome(workshop):
    """As NCCL's own thread does, when another process has gone or a collective times out."""
    process = long_run(workshop, LAUNCH)
    [worker] = children(process)
    os.kill(worker, signal.SIGABRT)
    code, error = ended(process, within=60)
    assert code == 1, error
    outcome = workshop.outcome()
    assert outcome["state"] == "failed"
    # What it was at is noted once a second.
    assert re.fullmatch(
        r"process 0 was killed by SIGABRT (in step \d+|at the start)", outcome["reason"]
    )
    assert outcome["step"] > 5


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
@long_form
def test_death_of_accelerate_launch_saves_and_leaves_nothing_running(workshop, number):
    """That of `accelerate launch` itself, which starts one process and passes nothing on."""
    process = long_run(workshop, launcher("single", 1))
    process.send_signal(number)
    process.communicate()  # until the script closes it, too
    end = time.monotonic() + 60
    while session(process.pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not session(process.pid)
    outcome = workshop.outcome()
    assert outcome["state"] == "preempted"
    assert outcome["reason"].startswith(f"the launcher has died at step {outcome['step']}; saved")
    assert (workshop.run_dir() / f"checkpoints/step-{outcome['step']:08d}/manifest.json").exists()
