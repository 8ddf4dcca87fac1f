"""outcome.json records how every attempt ended, but never overwrites that of another run."""

import contextlib
import json
import subprocess

import pytest
import torch
import yaml
from conftest import Workshop

from finetune import config as configs
from finetune import files, loop
from finetune.engine import rundir
from finetune.engine.rundir import RunDirectory
from finetune.errors import (
    DataError,
    DirectoryInUse,
    ModelError,
    Outage,
    OutOfMemory,
    Preempted,
    RunDirectoryError,
)
from finetune.export import publish
from finetune.models import attention_probe, build, head, load, parameters


class SafetensorError(Exception):
    """As safetensors calls its own."""


BUG = RuntimeError("shapes do not fit")
SAVES = {"checkpoint__every_steps": 1}
ONE_STEP = {"train__max_steps": 1}


def outcome(workshop):
    found = workshop.outcome()
    return found["state"], found["step"], found["reason"]


def fails(workshop, error, owner, name, exc, **settings):
    """One attempt in which `owner.name` raises."""

    def fail(*_, **__):
        raise exc

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(error) as caught:
            workshop.train(**settings)
    return caught.value


def preempted_after(workshop, number, **settings):
    """A run that saved this step and was preempted."""
    one, done = loop.train_step, []

    def count(*arguments, **keywords):
        done.append(1)
        if len(done) > number:
            raise Preempted("SIGTERM")
        return one(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", count)
        with pytest.raises(Preempted):
            workshop.train(**SAVES, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (attention_probe, "check"), (head, "check"), (parameters, "fingerprints"),
        (RunDirectory, "lock"), (RunDirectory, "create"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_failure_before_the_first_step_leaves_an_outcome(workshop, owner, name):
    fails(workshop, RuntimeError, owner, name, BUG)
    assert outcome(workshop) == ("failed", 0, "RuntimeError: shapes do not fit")
    assert not (workshop.run_dir() / "config.yaml").exists()
    workshop.train(**ONE_STEP)  # the directory belongs to no run yet: it takes another config
    assert outcome(workshop)[:2] == ("complete", 1)


@pytest.mark.slow
def test_failure_before_a_resumption_leaves_an_outcome(workshop):
    preempted_after(workshop, 3)
    assert outcome(workshop) == ("preempted", 3, "SIGTERM")
    fails(workshop, RuntimeError, attention_probe, "check", BUG, **SAVES)
    assert outcome(workshop) == ("failed", 3, "RuntimeError: shapes do not fit")
    full = torch.OutOfMemoryError("CUDA out of memory")
    caught = fails(workshop, OutOfMemory, build, "build", full, **SAVES)
    assert outcome(workshop) == ("failed", 3, str(caught))
    assert "out of memory at the start: CUDA out of memory\n" in str(caught)
    rows = workshop.rows.read_text()
    workshop.rows.write_text('{"question": "a"}\n')
    with pytest.raises(DataError) as wrong:
        workshop.train(**SAVES)
    assert outcome(workshop) == ("failed", 3, str(wrong.value))
    workshop.rows.write_text(rows)
    workshop.train(**SAVES)
    assert outcome(workshop)[:2] == ("complete", 5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("load_tokenizer", {}),
        (
            "load_config",
            {
                "adapter__kind": "qlora", "model__init": "pretrained", "model__path": "a/b",
                "model__tokenizer": None, "model__config": None,
            },
        ),
    ],
)  # fmt: skip
def test_hub_that_does_not_answer_leaves_an_outcome_in_a_new_directory(workshop, name, settings):
    fails(workshop, Outage, load, name, Outage("model 'a/b' cannot be loaded now"), **settings)
    assert outcome(workshop) == ("failed", 0, "model 'a/b' cannot be loaded now")
    workshop.train(**ONE_STEP)
    assert outcome(workshop)[:2] == ("complete", 1)


def test_mistake_of_the_user_leaves_no_new_directory(workshop):
    wrong = ModelError("model.attention: does not fit")
    fails(workshop, ModelError, attention_probe, "check", wrong)
    assert not workshop.run_dir().exists()


def test_refused_attempt_changes_nothing_of_the_other_run(workshop):
    preempted_after(workshop, 3)
    before = {path: path.read_bytes() for path in workshop.run_dir().iterdir() if path.is_file()}
    with pytest.raises(RunDirectoryError, match="holds another run"):
        workshop.train(**SAVES, optimizer__lr=1e-3)
    workshop.rows.write_text('{"question": "new", "answer": "rows"}\n' * 40)
    with pytest.raises(RunDirectoryError, match="training data: was"):
        workshop.train(**SAVES)
    with pytest.raises(DataError):
        workshop.check(data__train="gone.jsonl", **SAVES)
    assert before == {path: path.read_bytes() for path in before}


def test_failed_attempt_beside_a_running_one_leaves_its_outcome_alone(workshop):
    preempted_after(workshop, 3)
    before = outcome(workshop)
    written = yaml.safe_load((workshop.run_dir() / "config.yaml").read_text())
    first = RunDirectory(configs.from_dict(written))
    first.lock(0)
    fails(workshop, RuntimeError, attention_probe, "check", BUG, **SAVES)
    with pytest.raises(DirectoryInUse):
        workshop.train(**SAVES, checkpoint__grace_seconds=0.1)
    assert outcome(workshop) == before
    first.unlock()


def test_failure_after_a_complete_run_keeps_it_complete(workshop):
    workshop.train(**ONE_STEP)
    before = outcome(workshop)
    workshop.rows.write_text('{"question": "a"}\n')
    with pytest.raises(DataError):
        workshop.train(**ONE_STEP)
    assert outcome(workshop) == before


def test_next_start_says_that_the_attempt_before_ended_without_an_outcome(workshop, capsys):
    class Killed(BaseException):
        """Not caught by anything, as the end of a process is not."""

    fails(workshop, Killed, loop, "train_step", Killed(), **ONE_STEP)
    assert outcome(workshop)[0] == "running"
    workshop.train(**ONE_STEP)
    assert "note: the previous attempt left no outcome" in capsys.readouterr().out
    workshop.train(**ONE_STEP)
    assert "the attempt before" not in capsys.readouterr().out


def test_launcher_is_informed_of_run_directory_and_time_limit(workshop: Workshop, monkeypatch):
    note, seen = workshop.folder / "run", []
    monkeypatch.setenv("FINETUNE_BEATS", str(workshop.folder))
    check = attention_probe.check

    def watched(*arguments):
        seen.append(note.read_text())
        return check(*arguments)

    monkeypatch.setattr(attention_probe, "check", watched)
    workshop.check()
    assert seen == []
    workshop.train(**ONE_STEP)
    assert seen == [str(workshop.run_dir())]
    assert not note.exists(), "the outcome is complete"
    other = str(workshop.folder / "other")
    fails(workshop, RuntimeError, attention_probe, "check", BUG, run__dir=other)
    assert not note.exists(), "the outcome is failed"


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of five blocks. Give back how to fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.mark.parametrize("reason", ["short", "long " * 2_000])
def test_an_outcome_is_written_on_a_full_disk(tiny_disk, reason):
    rundir.note_end_of(tiny_disk, "running", "started, or started again")
    with contextlib.suppress(OSError), (tiny_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    with pytest.raises(OSError, match="outcome.json"):
        files.write_synced(tiny_disk / "outcome.json", "{}")
    for state, why in (("failed", reason), ("preempted", "x")):
        rundir.note_end_of(tiny_disk, state, why)
        found = json.loads((tiny_disk / "outcome.json").read_text())
        assert (found["state"], found["reason"]) == (state, why[: rundir.MOST_REASON])
    assert not list(tiny_disk.glob(".writing-*"))


def test_an_outcome_that_is_overwritten_is_json_at_every_moment(tmp_path, monkeypatch):
    """Killed between the write and the cut."""
    path = tmp_path / "outcome.json"
    path.write_text(json.dumps({"state": "running", "reason": "a" * 500}))
    monkeypatch.setattr(rundir.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rundir._overwrite(path, {"state": "failed"}, path.stat().st_size)
    assert json.loads(path.read_text()) == {"state": "failed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["save", "verify"])
def test_an_export_that_fills_the_disk_is_reported_and_cleaned_up(workshop, name):
    full = SafetensorError("No space left on device (os error 28)")
    error = fails(workshop, Outage, publish, name, full, **ONE_STEP)
    target = workshop.run_dir() / "model"
    assert str(error).startswith(f"{target} cannot be written now: the disk is full; free space")
    assert not list(workshop.run_dir().glob(".writing-*"))
    assert outcome(workshop) == ("failed", 1, str(error))
