"""A machine that is taken away: the run saves, exits with 75 and goes on elsewhere."""

import signal
import threading

import pytest
from conftest import Workshop, losses, pairs, read_jsonl, write_jsonl
from faults.forked import assert_same_end, long_form, run_to_completion, start, wait_for
from metadata_server import ASKED_FOR, REBALANCE, REBALANCED, Metadata, final

from finetune.survival.notices import CLOUDS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LONG = {
    "train__max_steps": 60, "train__epochs": 99, "train__micro_batch_size": 2,
    "checkpoint__every_minutes": None, "train__global_batch_size": 4,
    "schedule__kind": "constant",
}  # fmt: skip

FOR_EVER = LONG | {"train__max_steps": 100_000, "train__epochs": 100_000}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Workshop:
    workshop = Workshop(tmp_path_factory.mktemp("undisturbed"))
    run_to_completion(workshop.write(workshop.config("run", **LONG)))
    return workshop


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(
            pytest.param(number, marks=long_form)
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1)
        ),
    ],
    ids=lambda n: n.name,
)
def test_a_signal_saves_the_step_and_exits_with_75(workshop, undisturbed, number):
    config = workshop.write(workshop.config(**LONG))
    launch = start(config)
    wait_for(lambda: workshop.num_lines() > 5)
    launch.kill([0], number)
    assert launch.codes() == [75], launch.output()
    saved = workshop.outcome()
    assert saved["state"] == "preempted"
    assert number.name in saved["reason"]
    assert 5 < saved["step"] < 60
    assert workshop.num_lines() == saved["step"], (
        "the step under way was finished, and no other begun"
    )
    run_to_completion(config)
    assert_same_end(workshop.run_dir(), undisturbed.run_dir())


def assert_saved(workshop: Workshop) -> None:
    """Check that the step at which the run stopped has a whole checkpoint."""
    step = workshop.outcome()["step"]
    assert (workshop.run_dir() / f"checkpoints/step-{step:08d}/manifest.json").exists()


def test_a_second_interrupt_quits_at_once(workshop):
    launch = start(workshop.write(workshop.config(**LONG)), STANDS_STILL="0:7")
    wait_for(lambda: workshop.num_lines() == 7)
    launch.kill([0], signal.SIGTERM)
    launch.processes[0].join(0.5)
    launch.kill([0], signal.SIGINT)
    launch.processes[0].join(0.5)
    assert launch.processes[0].is_alive(), "the step under way is waited for"
    launch.kill([0], signal.SIGINT)
    assert launch.codes(within=10) == [130], launch.output()


def many(workshop: Workshop):
    """Evaluation rows that take seconds."""
    return write_jsonl(workshop.folder / "many.jsonl", pairs(2000)[40:])


def test_a_signal_is_heeded_in_the_middle_of_an_evaluation(workshop):
    config = workshop.write(
        workshop.config(**LONG, data__eval=str(many(workshop)), evaluation__every_steps=3)
    )
    launch = start(config)
    wait_for(lambda: workshop.num_lines() == 3)
    launch.kill([0], signal.SIGTERM)
    assert launch.codes(within=10) == [75], launch.output()
    assert workshop.outcome()["step"] == 3
    assert workshop.num_lines("eval.jsonl") == 0
    assert_saved(workshop)


@pytest.mark.parametrize("topology", ["ddp", pytest.param("fsdp2", marks=long_form)])
def test_a_signal_to_one_process_stops_all_after_the_same_step(workshop, undisturbed, topology):
    config = workshop.write(workshop.config(**LONG | {"train__max_steps": 30}))
    launch = start(config, topology, 2)
    wait_for(lambda: workshop.num_lines() > 5)
    launch.kill([1], signal.SIGTERM)
    assert launch.codes() == [75, 75], launch.output()
    assert "another process at step" in workshop.outcome()["reason"]
    run_to_completion(config, topology, 2)
    assert losses(workshop.run_dir()) == pytest.approx(losses(undisturbed.run_dir())[:30], rel=1e-4)


@long_form  # test_kills.py tries every line of a save
def test_a_signal_during_a_save_waits_for_it_and_saves_the_latest_step_too(workshop, undisturbed):
    config = workshop.write(
        workshop.config(**LONG, checkpoint__every_steps=4, checkpoint__keep_last=99)
    )
    launch = start(config)
    wait_for(lambda: list((workshop.run_dir() / "checkpoints").glob(".writing-*")))
    launch.kill([0], signal.SIGTERM)
    assert launch.codes() == [75], launch.output()
    steps = [int(p.name[5:]) for p in sorted((workshop.run_dir() / "checkpoints").iterdir())]
    assert steps[0] == 4
    assert steps[-1] == workshop.outcome()["step"]
    run_to_completion(config)
    assert_same_end(workshop.run_dir(), undisturbed.run_dir())


@pytest.mark.parametrize(
    "part", [0.02, *(pytest.param(part, marks=long_form) for part in (0.1, 0.2, 0.3, 0.4))]
)
def test_a_signal_before_the_first_step_ends_at_once(workshop, part):
    """While modules, rows and weights are loaded there is nothing to save."""
    config = workshop.write(workshop.config())
    launch = start(config)
    wait_for(lambda: launch.logs[0].exists())
    threading.Event().wait(part)
    launch.kill([0], signal.SIGTERM)
    assert launch.codes(within=30) == [75], launch.output()
    run_to_completion(config)


def test_a_deadline_stops_the_run_saved(workshop):
    config = workshop.write(workshop.config(**FOR_EVER, checkpoint__max_minutes=0.02))
    launch = start(config)
    assert launch.codes() == [75], launch.output()
    assert "checkpoint.max_minutes" in workshop.outcome()["reason"]
    assert_saved(workshop)


def test_a_run_short_of_time_warns_and_saves_first(workshop):
    config = workshop.write(
        workshop.config(**LONG, checkpoint__every_steps=3, checkpoint__grace_seconds=0.001)
    )
    launch = start(config)
    wait_for(lambda: workshop.num_lines() > 5)
    launch.kill([0], signal.SIGTERM)
    assert launch.codes() == [75], launch.output()
    assert "longer than checkpoint.grace_seconds (0.001)" in launch.output(), (
        "when there was still time to change it"
    )
    assert "note: the last save took" in launch.output()
    assert_saved(workshop)


def test_a_deadline_before_the_first_step_is_a_failure(workshop):
    launch = start(workshop.write(workshop.config(**LONG, checkpoint__max_minutes=1e-4)))
    assert launch.codes() == [1], launch.output()
    assert (
        "checkpoint.max_minutes are over before the first step of this attempt" in launch.output()
    )


@pytest.fixture
def metadata():
    server = Metadata()
    yield server
    server.close()


@pytest.mark.parametrize(
    "cloud",
    [pytest.param(cloud, marks=long_form if cloud != "gcp" else ()) for cloud in CLOUDS],
)
def test_a_clouds_notice_saves_and_stops(workshop, metadata, cloud):
    config = workshop.write(workshop.config(**FOR_EVER, checkpoint__notices=cloud))
    launch = start(config, FINETUNE_METADATA_ADDRESS=metadata.address)
    wait_for(lambda: workshop.num_lines() > 5)
    answer, reason = final(cloud)
    metadata.says(ASKED_FOR[cloud], answer)
    assert launch.codes(within=30) == [75], launch.output()
    assert reason in workshop.outcome()["reason"]
    assert_saved(workshop)


def test_a_clouds_warning_saves_and_continues(workshop, metadata):
    metadata.says(REBALANCE, REBALANCED)
    config = workshop.write(workshop.config(**FOR_EVER, checkpoint__notices="aws"))
    launch = start(config, FINETUNE_METADATA_ADDRESS=metadata.address)
    wait_for(lambda: list((workshop.run_dir() / "checkpoints").glob("step-*")))
    saved = workshop.num_lines()
    wait_for(lambda: workshop.num_lines() > saved + 5)
    assert launch.processes[0].is_alive(), "a warning does not stop the run"
    launch.kill([0], signal.SIGTERM)
    assert launch.codes() == [75], launch.output()
    assert len(read_jsonl(workshop.run_dir() / "saves.jsonl")) == 2, (
        "one for the warning, one for the end"
    )
