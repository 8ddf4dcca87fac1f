"""A process that dies or no longer answers ends all others, in time, and is named with the step."""

import re
import signal
import time

import pytest
from faults.forked import long_form, start, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BOUND = 3.0
LONG = {
    "train__max_steps": 100_000, "train__epochs": 99_999, "train__micro_batch_size": 2,
    "checkpoint__every_minutes": None,
    "train__hang_minutes": BOUND / 60,
}  # fmt: skip


def begun(workshop, *arguments, **environment):
    launch = start(workshop.write(workshop.config(**LONG)), *arguments, **environment)
    wait_for(lambda: workshop.num_lines() > 3)
    return launch


@pytest.mark.parametrize(
    ("topology", "rank"),
    [("ddp", 1)] + [pytest.param(*each, marks=long_form) for each in (
        ("ddp", 0), ("fsdp2", 0), ("fsdp2", 1), ("zero2", 0), ("zero2", 1),
    )],
)  # fmt: skip
def test_a_dead_process_ends_the_other_and_is_reported(workshop, topology, rank):
    launch = begun(workshop, topology, 2)
    launch.kill([rank])
    began = time.monotonic()
    codes = launch.codes(within=30)
    assert codes[rank] == -9
    assert codes[1 - rank] == 1, launch.output()
    assert time.monotonic() - began < BOUND + 10
    assert re.search(
        rf"process {rank} has (gone|not answered for 3 s, last) at step \d+", launch.output()
    ), launch.output()
    assert workshop.outcome()["state"] == ("failed" if rank else "running"), (
        "only the main process writes it"
    )


@long_form
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_process_ends_the_other_and_is_reported(workshop, rank):
    launch = begun(workshop, "ddp", 2)
    launch.kill([rank], signal.SIGSTOP)
    began = time.monotonic()
    launch.processes[1 - rank].join(30)
    assert launch.processes[1 - rank].exitcode == 1, launch.output()
    assert time.monotonic() - began < BOUND + 10
    assert re.search(
        rf"failed: process {rank} has not answered for 3 s, last at step \d+", launch.output()
    ), launch.output()
    launch.kill([rank], signal.SIGCONT)
    assert launch.codes(within=30)[rank] == 1, "it ends, too, once it can again"


@pytest.mark.parametrize(
    ("topology", "processes", "rank"),
    [pytest.param("single", 1, 0, marks=long_form), ("ddp", 2, 1)],
)
def test_a_hung_process_ends_all_and_is_reported(workshop, topology, processes, rank):
    launch = begun(workshop, topology, processes, STANDS_STILL=f"{rank}:7")
    assert launch.codes(within=40) == [1] * processes, launch.output()
    who = "process 1" if processes == 2 else "every process"
    assert f"{who} has made no progress for 3 s at step 8" in launch.output()
    assert workshop.outcome()["state"] == "failed"
    assert "step 8" in workshop.outcome()["reason"]
