"""Whatever asks the run to stop is heard, wherever it comes."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from finetune.engine.preemption import StopFlag
from finetune.errors import CheckpointError, Preempted


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_while_torch_is_imported_a_signal_ends_the_process_whatever_swallows_exceptions(name):
    code = f"""
import os, signal
from finetune.engine.preemption import StopFlag
StopFlag()
try:
    os.kill(os.getpid(), signal.{name})
except BaseException:
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith(f"preempted: {name} before anything was begun")) == (75, True)


def flag() -> StopFlag:
    """One of a run that has imported what it needs."""
    stop = StopFlag()
    stop.raises()
    return stop


def test_before_the_loop_a_signal_ends_the_run_where_it_is():
    flag()
    with pytest.raises(Preempted, match="SIGTERM; run the same command again"):
        send(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_inside_a_destructor_is_not_lost():
    """What is raised there goes nowhere."""

    class Dying:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    stop, dying = flag(), Dying()
    del dying
    gc.collect()
    stop.only_note()
    assert stop.is_set
    assert stop.reason == "SIGTERM"


def test_the_first_reason_and_its_deadline_stay():
    stop = flag()
    stop.configure(grace_seconds=20, max_minutes=None, cloud=None, say=print)
    assert stop.seconds_left() == 20
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert stop.reason == "SIGTERM"
    assert 15 < stop.seconds_left() < 20


def test_a_first_interrupt_after_another_signal_is_not_the_second():
    stop = flag()
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert stop.is_set


def test_a_deadline_before_the_first_step_is_an_error_and_one_after_the_last_is_none():
    """Trying again would end in the same way; what is saved is another matter."""
    stop = flag()
    stop.configure(grace_seconds=30, max_minutes=0.2 / 60, cloud=None, say=print)
    with pytest.raises(CheckpointError, match="checkpoint.max_minutes are over before the first step"):
        time.sleep(5)
    stop = flag()
    stop.configure(grace_seconds=30, max_minutes=1 / 60, cloud=None, say=print)
    stop.only_note()
    stop.at_once()
    with pytest.raises(Preempted, match="checkpoint.max_minutes are over"):
        time.sleep(5)


def test_a_run_that_has_ended_cannot_be_stopped_any_more():
    stop = flag()
    stop.close()
    send(signal.SIGTERM)
    assert not stop.is_set
