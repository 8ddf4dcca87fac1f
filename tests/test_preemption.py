"""Whatever asks the run to stop is heard, wherever it comes."""

import gc
import os
import signal
import time

import pytest

from finetune.engine.preemption import StopFlag
from finetune.errors import CheckpointError, Preempted


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def test_before_the_loop_a_signal_ends_the_run_where_it_is():
    StopFlag()
    with pytest.raises(Preempted, match="SIGTERM; run the same command again"):
        send(signal.SIGTERM)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_comes_inside_a_destructor_is_not_lost():
    """What is raised there goes nowhere."""

    class Dying:
        def __del__(self) -> None:
            send(signal.SIGTERM)

    stop, dying = StopFlag(), Dying()
    del dying
    gc.collect()
    stop.only_note()
    assert stop.is_set
    assert stop.reason == "SIGTERM"


def test_the_first_reason_and_its_deadline_stay():
    stop = StopFlag()
    stop.configure(grace_seconds=20, max_minutes=None, cloud=None, say=print)
    assert stop.seconds_left() == 20
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert stop.reason == "SIGTERM"
    assert 15 < stop.seconds_left() < 20


def test_a_first_interrupt_after_another_signal_is_not_the_second():
    stop = StopFlag()
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert stop.is_set


def test_a_deadline_before_the_first_step_is_an_error_and_one_after_the_last_is_none():
    """Trying again would end in the same way; what is saved is another matter."""
    stop = StopFlag()
    stop.configure(grace_seconds=30, max_minutes=0.2 / 60, cloud=None, say=print)
    with pytest.raises(CheckpointError, match="checkpoint.max_minutes are over before the first step"):
        time.sleep(5)
    stop = StopFlag()
    stop.configure(grace_seconds=30, max_minutes=1 / 60, cloud=None, say=print)
    stop.only_note()
    stop.at_once()
    with pytest.raises(Preempted, match="checkpoint.max_minutes are over"):
        time.sleep(5)


def test_a_run_that_has_ended_cannot_be_stopped_any_more():
    stop = StopFlag()
    stop.close()
    send(signal.SIGTERM)
    assert not stop.is_set
