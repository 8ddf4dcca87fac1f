"""python -m finetune launch returns the exit codes and output of the real train.py."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from faults.forked import long_form

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def long_run(workshop, *topology):
    """A run that has made some of very many steps."""
    config = workshop.write(
        workshop.config(train__epochs=600, train__max_steps=3000, checkpoint__every_minutes=None)
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "finetune", "launch", *topology, "train.py", "--config", config],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 180
    while workshop.num_lines() <= 5:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "it never got to training"
        time.sleep(0.05)
    return process


def ended(process, within):
    """Return the exit code and the output."""
    try:
        error = process.communicate(timeout=within)[1]
    finally:
        process.kill()
    return process.returncode, error


TWO = ["--config_file", "accelerate_configs/ddp.yaml", "--num_processes", "2"]


@pytest.mark.parametrize(
    "topology", [[], pytest.param(TWO, marks=long_form)], ids=["one process", "two"]
)
def test_sigterm_in_mid_training_is_exit_code_75(workshop, topology):
    """test_signals.py stops two forked processes; test_launcher.py passes signals on to several."""
    process = long_run(workshop, *topology)
    process.send_signal(signal.SIGTERM)
    code, error = ended(process, within=240)
    assert code == 75, error
    outcome = workshop.outcome()
    assert outcome["state"] == "preempted"
    assert 5 < outcome["step"] < 3000


@long_form
def test_process_that_aborts_leaves_an_outcome(workshop):
    """As NCCL's own thread does, when another process has gone or a collective times out."""
    process = long_run(workshop)
    [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGABRT)
    code, error = ended(process, within=60)
    assert code == 1, error
    outcome = workshop.outcome()
    assert outcome["state"] == "failed"
    # What it was at is noted once a second.
    assert re.fullmatch(
        r"process 0 was killed by SIGABRT (in step \d+|at the start)", outcome["reason"]
    )
    assert outcome["step"] > 5
