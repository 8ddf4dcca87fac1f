"""Whatever asks the run to stop is heard, wherever it comes."""

import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, session

from finetune.errors import CheckpointError, Preempted
from finetune.survival.preemption import StopFlag


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.fixture(autouse=True)
def in_a_terminal():
    """The tests themselves may run under nohup."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_while_torch_is_imported_a_signal_ends_the_process_even_if_exceptions_are_swallowed(name):
    code = f"""
import os, signal
from finetune.survival.preemption import StopFlag
StopFlag()
try:
    os.kill(os.getpid(), signal.{name})
except BaseException:
    pass
"""
    done = run_python(code)
    expected = (
        "stopped: by Ctrl-C before the first step"
        if name == "SIGINT"
        else f"preempted: {name} before anything was begun"
    )
    assert (done.returncode, done.stderr[: len(expected)]) == (75, expected)


def flag() -> StopFlag:
    """One of a run that has imported what it needs."""
    stop = StopFlag()
    stop.raises()
    return stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_before_the_loop_ends_the_run_at_once(name):
    flag()
    with pytest.raises(Preempted, match=f"{name}; run the same command again"):
        send(signal.Signals[name])


def test_ctrl_c_before_the_first_step_says_that_nothing_was_saved():
    stop = flag()
    with pytest.raises(
        Preempted, match="by Ctrl-C before the first step of this attempt; it saved nothing"
    ) as caught:
        send(signal.SIGINT)
    assert caught.value.label == "stopped"
    assert caught.value.exit_code == 75
    stop = flag()
    stop.only_note()
    send(signal.SIGINT)
    with pytest.raises(Preempted, match="SIGINT; run the same command again") as caught:
        stop.at_once()
    assert caught.value.label == "preempted"


def test_ctrl_c_in_the_loop_says_at_once_what_happens_and_what_a_second_one_does(
    capfd, monkeypatch
):
    for rank, is_printed in ((None, True), ("0", True), ("1", False)):
        monkeypatch.delenv("RANK", raising=False)
        if rank is not None:
            monkeypatch.setenv("RANK", rank)
        stop = flag()
        stop.only_note()
        send(signal.SIGINT)
        assert (
            "stopping after this step, then saving; Ctrl-C again quits at once"
            in capfd.readouterr().err
        ) == is_printed


def test_a_second_ctrl_c_quits_at_once():
    code = """
import os, signal
from finetune.survival.preemption import StopFlag
stop = StopFlag()
stop.raises()
stop.only_note()
for _ in range(2):
    os.kill(os.getpid(), signal.SIGINT)
"""
    done = run_python(code)
    assert done.returncode == 130
    assert done.stderr.count("stopping after this step") == 1


def test_only_preemption_limits_the_time_of_the_last_save():
    for number, is_limited in ((signal.SIGTERM, True), (signal.SIGINT, False)):
        stop = flag()
        stop.configure(grace_seconds=20, max_minutes=None, cloud=None, log=print)
        stop.only_note()
        send(number)
        assert (stop.save_seconds() is not None) == is_limited


def test_nohup_is_heeded():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = flag()
    send(signal.SIGHUP)
    assert not stop.is_set
    stop.close()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


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


def test_a_first_interrupt_after_another_signal_is_not_the_second():
    stop = flag()
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGINT)
    assert stop.is_set


def test_the_first_reason_and_its_deadline_stay():
    stop = flag()
    stop.configure(grace_seconds=20, max_minutes=None, cloud=None, log=print)
    assert stop.seconds_left() == 20
    stop.only_note()
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert stop.reason == "SIGTERM"
    assert 15 < stop.seconds_left() < 20


def test_only_a_deadline_before_the_first_step_is_an_error():
    """Trying again would end in the same way; what is saved is another matter."""
    stop = flag()
    stop.configure(grace_seconds=30, max_minutes=0.2 / 60, cloud=None, log=print)
    with pytest.raises(
        CheckpointError, match="checkpoint.max_minutes are over before the first step"
    ):
        time.sleep(5)
    stop = flag()
    stop.configure(grace_seconds=30, max_minutes=1 / 60, cloud=None, log=print)
    stop.only_note()
    stop.at_once()
    with pytest.raises(Preempted, match="checkpoint.max_minutes are over"):
        time.sleep(5)


def test_a_run_that_has_ended_cannot_be_stopped_any_more():
    stop = flag()
    stop.close()
    send(signal.SIGTERM)
    assert not stop.is_set


# A training script: notes that it has begun, and, at its end, why it ended.
SCRIPT = """
import sys, time
from pathlib import Path
from finetune.survival.preemption import StopFlag
stop = StopFlag()
stop.follow_launcher()
stop.raises()
stop.only_note()
notes = Path(sys.argv[1])
(notes / "begun").touch()
until = time.monotonic() + 20
while not stop.is_set and not (notes / "end").exists() and time.monotonic() < until:
    time.sleep(0.01)
(notes / "ended").write_text(str(stop.reason))
"""
# What starts it as `accelerate launch` does; `thread`: in a thread that ends.
LAUNCH = """
import subprocess, sys, threading, time
command = [sys.executable, "-c", *sys.argv[-2:]]
if "thread" in sys.argv:
    thread = threading.Thread(target=subprocess.Popen, args=[command])
    thread.start()
    thread.join()
    time.sleep(100)
subprocess.Popen(command).wait()
"""


@pytest.fixture
def launched(tmp_path):
    """Start a launcher by these words; yield its process and the session that holds the script."""
    started = []

    def launch(*words, **environment):
        command = [sys.executable, "-c", LAUNCH, *words, SCRIPT, str(tmp_path)]
        environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        before = signal.signal(
            signal.SIGTERM, signal.SIG_DFL
        )  # what this process ignores, its children would, too
        try:
            started.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            )
        finally:
            signal.signal(signal.SIGTERM, before)
        return started[-1]

    yield launch
    (tmp_path / "end").touch()
    for process in started:
        process.kill()
        process.wait()
        until(lambda: not session(process.pid))  # noqa: B023


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)
    return found


def reason_of_the_end(folder):
    return until(lambda: (folder / "ended").exists() and (folder / "ended").read_text())


@pytest.mark.parametrize(
    "words",
    [
        ["/opt/bin/accelerate", "launch", "train.py"], ["-m", "accelerate.commands.launch"],
        ["/opt/bin/torchrun"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_death_of_accelerate_launch_stops_the_script(launched, tmp_path, words, number):
    launcher = launched(*words)
    until((tmp_path / "begun").exists)
    launcher.send_signal(number)
    launcher.wait()
    assert reason_of_the_end(tmp_path) == "the launcher has died"


def test_death_of_accelerate_launch_while_python_starts_leaves_no_script(launched, tmp_path):
    """The name of the launcher is gone before it can be read."""
    for trial in range(6):
        launcher = launched("accelerate", "launch", ACCELERATE_MIXED_PRECISION="no")
        until(lambda: len(session(launcher.pid)) > 1)  # noqa: B023
        time.sleep(0.004 * trial)
        launcher.kill()
        launcher.wait()
        until(lambda: not session(launcher.pid), seconds=10)  # noqa: B023
        begun, ended = (tmp_path / "begun"), (tmp_path / "ended")
        assert begun.exists() == ended.exists(), "it did not end by itself"
        assert not ended.exists() or ended.read_text() == "the launcher has died"
        begun.unlink(missing_ok=True)
        ended.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "words", [["bash"], ["python", "train.py", "accelerate"], ["vi", "accelerate.yaml", "launch"]]
)
def test_death_of_a_shell_does_not_stop_what_runs_in_its_background(launched, tmp_path, words):
    shell = launched(*words)
    until((tmp_path / "begun").exists)
    shell.kill()
    shell.wait()
    time.sleep(0.1)
    assert session(shell.pid), "it goes on"
    (tmp_path / "end").touch()
    assert reason_of_the_end(tmp_path) == "None"


def test_end_of_the_launchers_thread_does_not_stop_the_script(launched, tmp_path):
    launcher = launched("thread", "accelerate", "launch")
    until((tmp_path / "begun").exists)
    time.sleep(0.1)
    assert not (tmp_path / "ended").exists()
    launcher.kill()
    launcher.wait()
    assert reason_of_the_end(tmp_path) == "the launcher has died"
