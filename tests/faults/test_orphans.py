"""When `accelerate launch` of one process is killed, its script always saves and ends."""

import os
import random
import signal
import subprocess
import time

import pytest
from conftest import ROOT, launcher, session
from faults.forked import KILLS, long_form, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120), long_form]


@pytest.mark.parametrize("trial", range(KILLS // 8))
def test_death_of_accelerate_launch_leaves_no_script(workshop, trial):
    dice = random.Random(trial)
    settings = {
        "train__epochs": 99_999,
        "train__max_steps": 99_999,
        "checkpoint__every_minutes": None,
    }
    config = workshop.write(workshop.config(**settings))
    process = subprocess.Popen(
        [*launcher("single", 1), "train.py", "--config", str(config)], cwd=ROOT,
        env=dict(os.environ), start_new_session=True
    )  # fmt: skip
    try:
        wait_for(lambda: len(session(process.pid)) > 1)
        time.sleep(dice.choice([0.0, 0.05, 1.0, 12.0]) * dice.random())
        process.send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM]))
        process.wait()
        wait_for(lambda: not session(process.pid))
        run = workshop.run_dir()
        if (run / "metrics.jsonl").exists():  # it was in the loop
            outcome = workshop.outcome()
            assert outcome["state"] == "preempted"
            said = f"the launcher has died at step {outcome['step']}; saved"
            assert outcome["reason"].startswith(said)
            assert (run / f"checkpoints/step-{outcome['step']:08d}/manifest.json").exists()
        else:
            assert not (run / "model").exists()
    finally:
        for pid in session(process.pid):
            os.kill(pid, signal.SIGKILL)
