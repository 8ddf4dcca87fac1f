"""A run again, from its receipt: the same to the bit, or refused with what has changed."""

import argparse
import json
import sys

import pytest
from conftest import ROOT, Workshop, launch, run_main

from finetune import replay as replaying
from finetune.__main__ import main
from finetune.errors import RunDirectoryError
from finetune.places import REPLAY_OF

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("original")).train()


@pytest.fixture
def run(workshop, original):
    """Return a copy of a complete run of 5 steps."""
    return workshop.copy_of(original)


@pytest.mark.proof
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_comes_out_the_same_in_its_own_processes(workshop, processes):
    first = workshop.launch(processes=processes, train__micro_batch_size=1)
    assert first.returncode == 0, first.stderr
    again = launch([sys.executable, "-m", "finetune", "replay", str(workshop.run_dir())])
    assert again.returncode == 0, again.stderr
    assert "the same: losses and gradient norms of all 5 steps" in again.stdout
    receipts = [
        json.loads((workshop.run_dir(name) / "receipt.json").read_text())
        for name in ("run", "run-replay")
    ]
    assert receipts[0]["num_processes"] == receipts[1]["num_processes"] == processes


def test_a_run_comes_out_the_same(run, monkeypatch, capsys):
    """In this process, instead of one that the launcher starts."""

    def start(environments, command):
        [environment] = environments
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return run_main(*command[2:])

    monkeypatch.setattr(replaying.launcher, "run", start)
    assert main(["replay", str(run)]) == 0
    assert "the same: losses and gradient norms of all 5 steps" in capsys.readouterr().out


def test_changes_since_the_run_are_listed_and_nothing_trains(workshop, monkeypatch):
    run = workshop.train(train__max_steps=1)
    rows, receipt = workshop.rows.read_text(), json.loads((run / "receipt.json").read_text())
    workshop.rows.write_text(rows.replace("three", "four"))
    receipt["versions"]["torch"], receipt["code"]["sha256"] = "2.0.0", "0" * 64
    (run / "receipt.json").write_text(json.dumps(receipt))
    monkeypatch.setenv(REPLAY_OF, str(run))  # as replay hands it to the processes it starts
    with pytest.raises(RunDirectoryError) as refused:
        workshop.train("run-replay", train__max_steps=1)
    for key in (
        "versions.torch: was 2.0.0, now",
        "code.sha256: was 000",
        "train_data.fingerprint: was",
    ):
        assert key in str(refused.value)
    assert not (workshop.run_dir("run-replay") / "metrics.jsonl").exists()
    assert str(ROOT) not in str(refused.value)


def test_a_run_that_has_not_ended_is_not_repeated(workshop, run):
    outcome = json.loads((run / "outcome.json").read_text())
    (run / "outcome.json").write_text(json.dumps({**outcome, "state": "preempted"}))
    with pytest.raises(RunDirectoryError, match="is preempted"):
        replaying.main(argparse.Namespace(run=run, name=None))
    assert not workshop.run_dir("run-replay").exists()


def test_a_shortened_log_is_refused_before_anything_trains(workshop, run):
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for left in (0, 1, 3, 4.5):
        log.write_text("".join(lines[: int(left)]) + lines[4][: int(40 * (left % 1))])
        with pytest.raises(
            RunDirectoryError, match=f"{log} has no line for .* first is step {int(left) + 1}"
        ):
            replaying.main(argparse.Namespace(run=run, name=None))
    assert not workshop.run_dir("run-replay").exists()


def test_a_missing_or_damaged_note_is_named(run):
    for note in (run / "receipt.json", run / "outcome.json"):
        whole = note.read_text()
        for content in (
            None,
            "",
            "[1]",
            '{"state": 5, "step": "3", "launch": [], "num_processes": 1e999}',
        ):
            note.unlink() if content is None else note.write_text(content)
            what = "is missing" if content is None else "is damaged: .*"
            with pytest.raises(RunDirectoryError, match=f"{note} {what}.*put back a copy"):
                replaying.main(argparse.Namespace(run=run, name=None))
        note.write_text(whole)


def test_a_receipt_sets_only_what_a_launcher_sets(run):
    receipt = json.loads((run / "receipt.json").read_text())
    for name in (
        "LD_PRELOAD",
        "PYTHONPATH",
        "PYTHONSTARTUP",
        "PATH",
        "HF_ENDPOINT",
        "OMP_NUM_THREADS_X",
        "accelerate_x",
    ):
        launch = {"OMP_NUM_THREADS": "1", name: "/tmp/x.so"}
        (run / "receipt.json").write_text(json.dumps({**receipt, "launch": launch}))
        with pytest.raises(
            RunDirectoryError, match=f"launch sets {name}, which this program never"
        ):
            replaying._receipt(run)


@pytest.mark.parametrize(
    ("receipt", "part"),
    [
        ({"device": "cpu", "precision": "bf16"}, 0.0),
        ({"device": "cuda", "precision": "fp32"}, 1e-3),
        ({"device": "cuda", "precision": "bf16"}, 2e-2),
        ({"machine": {"gpus": []}, "precision": "fp32"}, 0.0),
        ({"machine": {"gpus": ["NVIDIA H200"]}, "precision": "fp16"}, 2e-2),
    ],
)
def test_only_a_gpu_may_differ(receipt, part):
    assert replaying.tolerance(receipt) == part


@pytest.mark.parametrize(
    ("one", "other", "part", "same"),
    [
        ((1.0, 2.0), (1.0, 2.0), 0.0, True),
        ((1.0, 2.0), (1.0 + 1e-15, 2.0), 0.0, False),
        ((1.0, 2.0), (1.01, 2.1), 2e-2, True),
        ((1.0, 2.0), (1.05, 2.0), 2e-2, False),
        ((1.0, 2.0), (1.0, 3.0), 2e-2, False),
        ((1.0, 2.0), None, 2e-2, False),
        ((1.0, None), (1.0, None), 2e-2, True),
        ((1.0, None), (1.0, 2.0), 2e-2, False),
        ((float("inf"), 1.0), (1.0, 1.0), 2e-2, False),
    ],
)
def test_steps_agree_within_the_tolerance(one, other, part, same):
    assert replaying.agree(one, other, part) == same
