"""Damaged notes of a run are named or left out; no traceback, no loss."""

import argparse
import json
import os
import re
import shutil
import subprocess
from datetime import date

import pytest
from conftest import Workshop, read_jsonl, short

from finetune import config as configs
from finetune import files, replay
from finetune.engine import receipt as receipts
from finetune.engine import rundir
from finetune.errors import Outage, Preempted, RunDirectoryError

pytestmark = pytest.mark.slow

JUNK = {
    "empty": b"", "torn": b'{"step": 3, "eva', "binary": b"\xff\xfe\x00\x01", "null": b"null\n",
    "a list": b"[1]\n",
    "deep": b"[" * 100_000,
    "other types": b'{"step": "3", "state": 5, "train_data": [], "eval_loss": {}}\n',
    "no values": b'{"step": 3}\n', "negative": b'{"step": -3, "eval_loss": 1}\n',
    "no number": b'{"step": 1e999, "eval_loss": "x"}\n',
}  # fmt: skip
SETTINGS = {
    "data__eval_fraction": 0.2,
    "evaluation__every_steps": 2,
    "evaluation__export_best": True,
    "checkpoint__every_steps": 2,
    "train__micro_batch_size": 8,
}

DATED = (
    "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|{{ m.role }}|>{{ m.content "
    "}}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class LaterDay(date):
    @classmethod
    def today(cls):
        return cls(2099, 1, 1)


def start(workshop):
    """Start the run of these tests, in a folder with its rows and its template."""
    template = workshop.rows.with_name("dated.jinja")
    return workshop.train(**SETTINGS, data__template=str(template))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    workshop = Workshop(tmp_path_factory.mktemp("original"))
    (workshop.folder / "dated.jinja").write_text(DATED)
    return start(workshop)


@pytest.fixture
def run(workshop, original):
    """Return a copy of a complete run of 4 steps."""
    return workshop.copy_of(original)


@pytest.fixture
def ended(run):
    """Return one that was done but for its outcome: the next start exports again."""
    (run / "outcome.json").unlink()
    return run


@pytest.mark.parametrize("junk", short(list(JUNK), "torn", "binary", "other types"))
def test_damaged_notes_do_not_stop_a_run(workshop, ended, junk, monkeypatch):
    day = json.loads((ended / "receipt.json").read_text())["template_date"]
    monkeypatch.setattr(rundir, "date", LaterDay)
    logs = {
        name: (ended / name).read_bytes() for name in ("metrics.jsonl", "eval.jsonl", "saves.jsonl")
    }
    for name, content in logs.items():
        (ended / name).write_bytes(JUNK[junk] + b"\n" + content)
    for name in ("receipt.json", "outcome.json"):
        (ended / name).write_bytes(JUNK[junk])
    start(workshop)
    assert json.loads((ended / "receipt.json").read_text())["template_date"] == day, (
        "a checkpoint knows it"
    )
    for name, content in logs.items():
        kept = [
            line
            for line in (ended / name).read_bytes().splitlines(keepends=True)
            if line in content.splitlines(keepends=True)
        ]
        assert b"".join(kept).startswith(content), name
    assert json.loads((ended / "outcome.json").read_text())["state"] == "complete"


def test_an_unreadable_log_line_is_reported_and_kept_beside(workshop, ended, capsys):
    log = ended / "eval.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 3}\n' + '{"step": 4, "eva')
    damaged = log.read_text()
    start(workshop)
    assert (
        f"note: {log}: damaged lines are left out: 1, from line {whole.count(chr(10)) + 1} on"
        in capsys.readouterr().out
    )
    assert log.with_name("eval.jsonl.damaged").read_text() == damaged
    assert log.read_text() == whole


def test_a_complete_run_without_its_receipt_is_refused_unchanged(workshop, run):
    for damage in (None, "{", "[]", '{"train_data": null}', '{"train_data": {"fingerprint": 5}}'):
        (run / "receipt.json").unlink()
        if damage is not None:
            (run / "receipt.json").write_text(damage)
        before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        with pytest.raises(
            RunDirectoryError, match=r"is complete, but its receipt.json .* put it back"
        ):
            start(workshop)
        assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
        (run / "receipt.json").touch()


def test_a_folder_in_place_of_a_file_is_reported(workshop):
    """And a file where a folder does."""
    run, kept = workshop.train(), workshop.folder / "kept"
    names = [
        "config.yaml",
        "metrics.jsonl",
        "eval.jsonl",
        "outcome.json",
        "receipt.json",
        "checkpoints",
        "model",
    ]
    for path in (run / name for name in names):
        was_there = path.exists()
        if was_there:
            path.rename(kept)
        path.write_text("") if kept.is_dir() else path.mkdir()
        with pytest.raises(RunDirectoryError, match=f"{path}"):
            workshop.train()
        path.unlink() if path.is_file() else path.rmdir()
        if was_there:
            kept.rename(path)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "one bit"),
        ("model.safetensors", "missing"),
        (".", "missing"),
        ("tokenizer.json", "shorter"),
        ("config.json", "one bit"),
    ],
)
def test_a_damaged_export_is_repeated(workshop, run, capsys, name, damage):
    path = run / "model" / name
    content = path.read_bytes() if path.is_file() else None
    if content is None:
        shutil.rmtree(path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "one bit" else b""))
    start(workshop)
    assert f"was complete, but {path}" in capsys.readouterr().out
    assert content is None or path.read_bytes() == content
    assert (run / "model/model.safetensors").exists()


def test_a_damaged_export_without_a_checkpoint_is_reported_and_kept(workshop, run):
    shutil.rmtree(run / "checkpoints")
    path = run / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match="holds a model, but no checkpoint"):
        start(workshop)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("end", ["complete", "damaged", "torn"])
def test_files_a_user_adds_to_an_export_are_kept(workshop, run, end):
    model, mine = run / "model", ["NOTES.md", "quantised/model-q4.gguf"]
    (model / "quantised").mkdir()
    for name in mine:
        (model / name).write_text("mine")
    if end != "complete":
        (model / "model.safetensors").write_text("")
    if end == "torn":  # publishing ended between its two renames
        model.rename(run / ".old-model")
    start(workshop)
    assert [(model / name).read_text() for name in mine] == ["mine", "mine"]
    assert not (run / ".old-model").exists()
    assert not set(mine) & json.loads((run / "outcome.json").read_text())["model"].keys()


OPENS_OTHERWISE = [
    "adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "adapter_model.bin", "quantize_config.json",
    "additional_chat_templates/rag.jinja",
]  # fmt: skip


def test_an_added_file_that_shadows_the_export_is_reported(workshop, run):
    for path in (run / "model" / name for name in OPENS_OTHERWISE):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
        with pytest.raises(
            RunDirectoryError,
            match=f"{path} was not there when the model was verified.*move it away",
        ):
            start(workshop)
        assert path.read_text() == "{}"
        path.unlink()


@pytest.mark.parametrize("kind", ["a file", "a broken link"])
def test_a_checkpoint_that_is_a_file_is_reported_and_set_aside(workshop, ended, capsys, kind):
    newest = ended / "checkpoints/step-00000004"
    shutil.rmtree(newest)
    if kind == "a file":
        newest.write_text("")
    else:
        newest.symlink_to("nowhere")
    start(workshop)
    output = capsys.readouterr().out
    assert f"skipped a damaged checkpoint: {newest}: it is not a folder" in output
    assert "/step-00000002 at step 2" in output
    assert os.path.lexists(ended / "checkpoints/damaged-step-00000004.0")
    assert (newest / "manifest.json").exists()


def test_a_receipt_stays_what_it_was_and_other_versions_are_noted_beside_it(
    workshop, ended, monkeypatch, capsys
):
    before = (ended / "receipt.json").read_bytes()
    start(workshop)
    assert not (ended / "starts.jsonl").exists(), "nothing was different"
    (ended / "outcome.json").unlink()
    monkeypatch.setattr(receipts, "versions", lambda: {"python": "3.99"})
    start(workshop)
    assert (ended / "receipt.json").read_bytes() == before
    [line] = read_jsonl(ended / "starts.jsonl")
    assert line["step"] == 4
    assert any(
        each.startswith("versions.python: was 3.") and each.endswith("now 3.99")
        for each in line["different"]
    )
    assert "versions.python" in capsys.readouterr().out


def test_a_restarted_run_keeps_its_old_receipt_beside_the_new(workshop, ended, monkeypatch):
    before = json.loads((ended / "receipt.json").read_text())
    shutil.rmtree(ended / "checkpoints")
    shutil.rmtree(ended / "model")
    monkeypatch.setattr(receipts, "versions", lambda: {"python": "3.99"})
    start(workshop)
    assert json.loads((ended / "receipt.json").read_text())["versions"] == {"python": "3.99"}
    assert read_jsonl(ended / "starts.jsonl")[0]["receipt_before"] == before


@pytest.mark.parametrize("attempt", ["train", "check"])
def test_an_impossible_run_directory_is_refused_at_once(workshop, attempt):
    """Root may write anywhere, says os.access."""
    with pytest.raises(
        RunDirectoryError, match=r"/proc/x/run cannot be written: .*; choose another run\.dir"
    ):
        getattr(workshop, attempt)(run__dir="/proc/x")


def test_temporary_files_of_killed_attempts_go_and_those_of_a_user_stay(workshop, ended):
    ours = [
        ".writing-outcome.json-ab12_xyz",
        ".writing-metrics.jsonl-00000000",
        ".mode-.writing-config.yaml-abcdefgh",
    ]
    users = [
        ".outcome.json-original",
        ".writing-notes.txt-abcdefgh",
        "outcome.json-abcdefgh",
        ".writing-outcome.json-old",
    ]
    for name in (*ours, *users):
        (ended / name).write_text("x")
    (ended / ".writing-config.yaml-12345678").mkdir()
    start(workshop)
    left = {path.name for path in ended.iterdir()}
    assert left.isdisjoint(ours)
    assert left.issuperset([*users, ".writing-config.yaml-12345678"])


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise Preempted("SIGTERM")

    (tmp_path / "outcome.json").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(Preempted):
        files.write_synced(tmp_path / "outcome.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"outcome.json": "old"}


@pytest.fixture
def read_only_disk(tmp_path):
    """A function that makes a folder the root of a disk that is mounted read-only."""
    mounted = []

    def mount(folder):
        for options in (["--bind"], ["-o", "remount,ro,bind"]):
            done = subprocess.run(
                ["mount", *options, str(folder), str(folder)], capture_output=True, check=False
            )
            if done.returncode:
                pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
            mounted.append(folder)

    yield mount
    for folder in mounted[:1]:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def test_a_complete_run_on_a_read_only_disk_is_complete(workshop, run, capsys, read_only_disk):
    capsys.readouterr()
    read_only_disk(run.parent)
    start(workshop)
    assert f"{run} is complete" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no outcome", "no model"])
def test_a_read_only_disk_is_reported_as_an_outage(workshop, run, read_only_disk, damage):
    (run / ("outcome.json" if damage == "no outcome" else "model/config.json")).unlink()
    read_only_disk(run.parent)
    with pytest.raises(Outage, match=f"{run} is on a disk that is mounted read-only"):
        start(workshop)


BROKEN_CONFIGS = [
    (b"", "it is not YAML with sections"), (b"run: {a", "it is not YAML"),
    (b"\xff\xfe", "it is UTF-16"), (b"[1]", "it is not YAML"),
    (b"run: {name: run}\n", "its section model is missing"), (b"[" * 100_000, "it is not YAML"),
    (b"run: " + b"9" * 5000, "it is not YAML"),
]  # fmt: skip


def test_a_damaged_config_is_reported_and_kept(workshop, run):
    for content, says in BROKEN_CONFIGS:
        (run / "config.yaml").write_bytes(content)
        for attempt in (
            lambda: start(workshop),
            lambda: replay.main(argparse.Namespace(run=run, name=None)),
        ):
            with pytest.raises(
                RunDirectoryError,
                match=f"{run / 'config.yaml'} is damaged: {says}.*; put back a copy",
            ):
                attempt()
        assert (run / "config.yaml").read_bytes() == content
    assert json.loads((run / "outcome.json").read_text())["state"] == "complete"


def test_the_error_for_a_lost_config_names_its_copy(workshop, run):
    (run / "config.yaml").unlink()
    with pytest.raises(
        RunDirectoryError,
        match="config.yaml is missing, and .*; put back a copy of it .manifest.json of",
    ):
        start(workshop)
    assert list(run.glob("checkpoints/step-*"))


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"[1,2]", b"5\n", b'{"step": 1, "lo'])
def test_lines_that_a_log_lost_are_noted(workshop, content):
    directory = rundir.RunDirectory(configs.from_dict(workshop.config()))
    directory.path.mkdir(parents=True)
    for log in (directory.logs.metrics, directory.logs.evals):
        log.write_text(
            "".join(json.dumps({"step": step, "eval_loss": 1.0}) + "\n" for step in range(1, 13))
        )
    directory.logs.rewind(10)
    assert directory.logs.missing(10, 1, 2) == []
    for log in (directory.logs.metrics, directory.logs.evals):
        if content is None:
            log.unlink()
        else:
            log.write_bytes(content)
    directory.logs.rewind(10)
    lost = "; evaluation.patience and evaluation.export_best ignore them"
    assert directory.logs.missing(10, 1, None) == directory.logs.missing(10, 1, 2)[:1]
    assert directory.logs.missing(10, 1, 2) == [
        f"note: {directory.logs.metrics} lacks 10 of the 10 lines that tracking.log_every_steps: 1 "
        "asks for up to step 10: 1, 2, 3, 4, 5, ...",
        f"note: {directory.logs.evals} lacks 4 of the 4 lines that evaluation.every_steps: 2 asks "
        f"for up to step 10: 2, 4, 6, 8{lost}",
    ]
    for log in (directory.logs.metrics, directory.logs.evals):
        kept = log.with_name(f"{log.name}.damaged")
        assert (kept.read_bytes() if kept.exists() else b"") == (content or b"")


def test_a_log_that_was_cut_in_half_is_noted_at_the_next_start(workshop, ended, capsys):
    log = ended / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    start(workshop)
    output = capsys.readouterr().out
    assert re.search(
        f"note: {log} lacks [23] of the 4 lines that tracking.log_every_steps: "
        "1 asks for up to step 4: ",
        output,
    )


def test_a_copied_run_goes_on_beside_the_original(workshop):
    """As `cp -r` makes it; each has its own lock, and none writes to the other."""
    from test_outcome import preempted_after

    settings = {"checkpoint__every_steps": 1, "checkpoint__asynchronous": False}
    preempted_after(workshop, 3, checkpoint__asynchronous=False)
    run, elsewhere = workshop.run_dir(), workshop.folder / "elsewhere"
    shutil.copytree(run, elsewhere / "run")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    first = rundir.RunDirectory(configs.from_dict(configs.read_resolved(run / "config.yaml")))
    first.lock(0)
    workshop.train(run__dir=str(elsewhere), checkpoint__grace_seconds=0.1, **settings)
    first.unlock()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    workshop.train(**settings)
    logs = [
        [line["loss"] for line in read_jsonl(folder / "metrics.jsonl")]
        for folder in (run, elsewhere / "run")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 5
    shutil.copytree(run, run.with_name("other"))
    with pytest.raises(RunDirectoryError, match="run.name: was run, now other"):
        workshop.train("other", **settings)


def test_damaged_notes_are_kept_each_time_and_byte_by_byte(workshop, ended, monkeypatch):
    starts, receipt, log = ended / "starts.jsonl", ended / "receipt.json", ended / "eval.jsonl"
    starts.write_bytes(b'\xff\xfe "half')
    monkeypatch.setattr(receipts, "versions", lambda: {"python": "3.99"})
    start(workshop)
    assert starts.read_bytes().startswith(b'\xff\xfe "half\n{')
    whole = log.read_bytes()
    for content in (b"first", b"\xffsecond"):
        receipt.write_bytes(content)
        log.write_bytes(content + b"\n" + whole)
        (ended / "outcome.json").unlink()
        start(workshop)
        assert log.read_bytes() == whole
    for name in ("receipt.json", "eval.jsonl"):
        kept = {path.read_bytes().split(b"\n")[0] for path in ended.glob(f"{name}*.damaged")}
        assert kept == {b"first", b"\xffsecond"}
