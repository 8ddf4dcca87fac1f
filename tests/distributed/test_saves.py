"""The saver thread dies on one of two processes: the save fails on both in time."""

import signal
import time

import pytest
from conftest import read_jsonl
from faults.forked import start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SETTINGS = {
    "train__max_steps": 6, "train__epochs": 9, "checkpoint__every_steps": 2,
    "checkpoint__every_minutes": None, "train__hang_minutes": 1.0,
}  # fmt: skip


def started(workshop, changes, **environment):
    config = workshop.write(workshop.config(**SETTINGS | changes))
    return start(config, "ddp", 2, script="distributed.dying", **environment)


@pytest.mark.parametrize(
    ("dies", "on", "says"),
    [
        ("exits", 1, "process 1: SystemExit: 3"),
        pytest.param("exits", 0, "process 0: SystemExit: 3", marks=pytest.mark.fault),
        pytest.param(
            "returns",
            1,
            "process 1: the thread that saves ended without a result",
            marks=pytest.mark.fault,
        ),
        pytest.param("is interrupted", 1, "process 1: KeyboardInterrupt", marks=pytest.mark.fault),
        pytest.param("does not start", 1, "can't start new thread", marks=pytest.mark.fault),
    ],
)
def test_a_saver_that_dies_on_one_process_is_a_failed_save_on_both(workshop, dies, on, says):
    launch = started(workshop, {}, DIES=dies, ON=str(on))
    assert launch.codes(within=30) == [0, 0], launch.output()
    assert f"checkpoint of step 2 could not be saved: {says}" in launch.output()
    assert "(1 of 3 failures in a row)" in launch.output()
    assert [line["step"] for line in read_jsonl(workshop.run_dir() / "saves.jsonl")] == [4, 6]


@pytest.mark.fault
def test_a_silent_death_ends_the_run(workshop):
    launch = started(workshop, {"train__hang_minutes": 0.05}, DIES="exits", MUTE="1")
    assert launch.codes(within=30) == [1, 1], launch.output()
    assert "has made no progress for 3 s at the" in launch.output()
    outcome = workshop.outcome()
    assert (outcome["state"], "the save of step 2" in outcome["reason"]) == ("failed", True), (
        outcome
    )


@pytest.mark.fault
def test_a_signal_ends_a_run_whose_save_waits_for_a_dead_process(workshop):
    launch = started(
        workshop,
        {"train__hang_minutes": None, "checkpoint__grace_seconds": 6.0},
        DIES="exits",
        MUTE="1",
    )
    wait_for(lambda: workshop.num_lines() > 1)
    time.sleep(1)
    launch.kill([0, 1], signal.SIGTERM)
    began = time.monotonic()
    assert launch.codes(within=30) == [1, 1], launch.output()
    assert time.monotonic() - began < 10
    assert workshop.outcome()["state"] == "failed"
