"""Notes of a run that something has damaged: named, or left out and said; never a traceback, and nothing is lost."""

import json
import os
import shutil

import pytest
from conftest import read_jsonl

from finetune.engine import receipt as receipts
from finetune.errors import RunDirectoryError

pytestmark = pytest.mark.slow

JUNK = {
    "empty": b"", "torn": b'{"step": 3, "eva', "binary": b"\xff\xfe\x00\x01", "null": b"null\n", "a list": b"[1]\n",
    "deep": b"[" * 100_000, "other types": b'{"step": "3", "state": 5, "train_data": [], "eval_loss": {}}\n',
    "no values": b'{"step": 3}\n', "negative": b'{"step": -3, "eval_loss": 1}\n', "no number": b'{"step": 1e999, "eval_loss": "x"}\n',
}  # fmt: skip
SETTINGS = {"data__eval_fraction": 0.2, "evaluation__every_steps": 2, "evaluation__export_best": True}


@pytest.fixture
def ended(workshop):
    """A run that was done but for its outcome: the next start exports again."""
    run = workshop.train(**SETTINGS)
    (run / "outcome.json").unlink()
    return run


@pytest.mark.parametrize("junk", JUNK)
def test_damaged_notes_do_not_stop_a_run(workshop, ended, junk):
    logs = {name: (ended / name).read_bytes() for name in ("metrics.jsonl", "eval.jsonl", "samples.jsonl", "saves.jsonl") if (ended / name).exists()}  # fmt: skip
    for name, content in logs.items():
        (ended / name).write_bytes(JUNK[junk] + b"\n" + content)
    for name in ("receipt.json", "outcome.json"):
        (ended / name).write_bytes(JUNK[junk])
    workshop.train(**SETTINGS)
    for name, content in logs.items():
        kept = [
            line
            for line in (ended / name).read_bytes().splitlines(keepends=True)
            if line in content.splitlines(keepends=True)
        ]
        assert b"".join(kept).startswith(content), name
    assert json.loads((ended / "outcome.json").read_text())["state"] == "complete"


def test_a_line_that_cannot_be_read_is_said_and_kept_beside(workshop, ended, capsys):
    log = ended / "eval.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 3}\n' + '{"step": 4, "eva')
    damaged = log.read_text()
    workshop.train(**SETTINGS)
    assert (
        f"note: {log}: damaged lines are left out: 1, from line {whole.count(chr(10)) + 1} on"
        in capsys.readouterr().err
    )
    assert log.with_name("eval.jsonl.damaged").read_text() == damaged
    assert log.read_text() == whole


@pytest.mark.parametrize("damage", [None, "{", "[]", '{"train_data": null}', '{"train_data": {"fingerprint": 5}}'])
def test_a_complete_run_without_its_receipt_is_not_called_another(workshop, damage):
    run = workshop.train()
    (run / "receipt.json").unlink()
    if damage is not None:
        (run / "receipt.json").write_text(damage)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match=r"is complete, but its receipt.json .* put it back"):
        workshop.train()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.jsonl", "eval.jsonl", "outcome.json", "receipt.json", "checkpoints", "model"]
)
def test_a_folder_where_a_file_belongs_is_named(workshop, name):
    """And a file where a folder does."""
    run = workshop.train()
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_text("")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    with pytest.raises(RunDirectoryError, match=f"{path}"):
        workshop.train()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "one bit"),
        ("model.safetensors", "missing"),
        ("tokenizer.json", "shorter"),
        ("config.json", "one bit"),
    ],
)
def test_a_damaged_export_is_not_complete_and_is_done_again(workshop, capsys, name, damage):
    run = workshop.train()
    path = run / "model" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "one bit" else b""))
    workshop.train()
    assert f"was complete, but {path}" in capsys.readouterr().err
    assert path.read_bytes() == content


def test_a_damaged_export_without_a_checkpoint_is_named_and_stays(workshop):
    run = workshop.train()
    shutil.rmtree(run / "checkpoints")
    path = run / "model/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(RunDirectoryError, match="holds a model, but no checkpoint"):
        workshop.train()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("end", ["complete", "damaged", "torn"])
def test_what_a_user_adds_to_an_export_stays(workshop, end):
    run = workshop.train()
    model, mine = run / "model", ["NOTES.md", "quantised/model-q4.gguf"]
    (model / "quantised").mkdir()
    for name in mine:
        (model / name).write_text("mine")
    if end != "complete":
        (model / "model.safetensors").write_text("")
    if end == "torn":  # publishing ended between its two renames
        model.rename(run / ".old-model")
    workshop.train()
    assert [(model / name).read_text() for name in mine] == ["mine", "mine"]
    assert not (run / ".old-model").exists()
    assert not set(mine) & json.loads((run / "outcome.json").read_text())["model"].keys()


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
     "adapter_model.bin", "quantize_config.json", "additional_chat_templates/rag.jinja"],
)  # fmt: skip
def test_a_file_that_changes_what_opens_in_an_export_is_named(workshop, name):
    run = workshop.train()
    path = run / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    with pytest.raises(RunDirectoryError, match=f"{path} was not there when the model was verified.*move it away"):
        workshop.train()
    assert path.read_text() == "{}"


@pytest.mark.parametrize("kind", ["a file", "a broken link"])
def test_a_checkpoint_that_is_no_folder_is_named_and_set_aside(workshop, capsys, kind):
    settings = {"checkpoint__every_steps": 2}
    run = workshop.train(**settings)
    newest = run / "checkpoints/step-00000005"
    shutil.rmtree(newest)
    if kind == "a file":
        newest.write_text("")
    else:
        newest.symlink_to("nowhere")
    (run / "outcome.json").unlink()
    workshop.train(**settings)
    said = capsys.readouterr().err
    assert f"skipped a damaged checkpoint: {newest}: it is not a folder" in said
    assert os.path.lexists(run / "checkpoints/damaged-step-00000005.0")
    assert (newest / "manifest.json").exists()


def test_a_receipt_stays_what_it_was_and_other_versions_are_noted_beside_it(workshop, ended, monkeypatch, capsys):
    before = (ended / "receipt.json").read_bytes()
    monkeypatch.setattr(receipts, "versions", lambda: {"python": "3.99"})
    workshop.train(**SETTINGS)
    assert (ended / "receipt.json").read_bytes() == before
    [line] = read_jsonl(ended / "starts.jsonl")
    assert line["step"] == 4
    assert any(each.startswith("versions.python: was 3.") and each.endswith("now 3.99") for each in line["different"])
    assert "versions.python" in capsys.readouterr().err


def test_a_receipt_of_a_run_that_began_again_has_the_old_one_beside_it(workshop, ended, monkeypatch):
    before = json.loads((ended / "receipt.json").read_text())
    shutil.rmtree(ended / "checkpoints")
    shutil.rmtree(ended / "model")
    monkeypatch.setattr(receipts, "versions", lambda: {"python": "3.99"})
    workshop.train(**SETTINGS)
    assert json.loads((ended / "receipt.json").read_text())["versions"] == {"python": "3.99"}
    assert read_jsonl(ended / "starts.jsonl")[0]["receipt_before"] == before


def test_an_undisturbed_resumption_notes_nothing(workshop, ended):
    before = (ended / "receipt.json").read_bytes()
    workshop.train(**SETTINGS)
    assert (ended / "receipt.json").read_bytes() == before
    assert not (ended / "starts.jsonl").exists()
