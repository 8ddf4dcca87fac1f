"""A checkpoint that was changed and hashed again: its reader names the file, and what to do."""

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl

from finetune import unpickling
from finetune.engine.checkpoint import folder, resume
from finetune.engine.progress import Progress
from finetune.errors import CheckpointError, DamagedCheckpoint, RunDirectoryError


def manifest_of(step: int) -> dict:
    return {
        "format": folder.FORMAT, "progress": {**Progress().to_dict(), "step": step},
        "num_processes": 1, "topology": "single",
        "config": {"optimizer": {"kind": "adamw"}}, "identity": {},
    }  # fmt: skip


def checkpoint(root: Path, step: int) -> Path:
    writing = folder.begin(root, step)
    (writing / "data").write_bytes(b"d" * 10)
    return folder.commit(
        writing, {**manifest_of(step), "files": folder.described(writing, ["data"])}
    )


def rehash(manifest: object) -> str:
    """Text of a manifest with the hash that fits it."""
    if isinstance(manifest, dict):
        manifest.pop("sha256", None)
        manifest["sha256"] = hashlib.sha256(
            json.dumps(manifest, sort_keys=True).encode()
        ).hexdigest()
    return json.dumps(manifest)


def wrong(key: str, value: object):
    """A change of a manifest: `a.b` is a key b in a; None takes it out."""

    def change(manifest: dict) -> dict:
        *parts, last = key.split(".")
        place = manifest
        for part in parts:
            place = place[part]
        place[last] = value
        if value is None:
            del place[last]
        return manifest

    return change


WRONG = [
    *(wrong(key, value) for key in manifest_of(1) for value in (None, [1], -1.5)),
    *(wrong(key, "3") for key in manifest_of(1) if key != "topology"),
    *(wrong(
        f"progress.{key}", value,
    ) for key in Progress().to_dict() for value in (None, [], True, -1)),
    *(wrong("files", value) for value in (
        {}, [], "data", {"data": 5}, {"data": {}}, {"data": {"bytes": "10", "sha256": "a"}},
    )),
    *(wrong(
        "files", {name: {"bytes": 1, "sha256": "a"}},
    ) for name in ("../data", "/data", "a\0b", ".", "gone")),
    wrong("progress.step", 2), wrong("config.optimizer", None), wrong("config.optimizer", []),
    wrong("config.optimizer.kind", 5), wrong("config.train", 5), lambda manifest: [manifest],
    lambda manifest: "a", lambda manifest: 5, lambda manifest: None, lambda manifest: {},
]  # fmt: skip


@pytest.mark.parametrize("change", WRONG)
def test_malformed_manifest_is_skipped_and_reported(tmp_path, change):
    older, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    path = newest / "manifest.json"
    path.write_text(rehash(change(json.loads(path.read_text()))))
    found, damaged = resume.find(tmp_path, None)
    assert found.path == older
    [problem] = damaged.values()
    assert "Error" not in problem
    assert not folder.looks_whole(newest)
    shutil.rmtree(older)
    with pytest.raises(
        CheckpointError, match=f"no checkpoint is valid, and nothing was deleted:\n  {newest}: "
    ):
        resume.find(tmp_path, None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"format": 3, "pro',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
)
def test_damaged_manifest_is_skipped(tmp_path, content):
    older, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 4)
    (newest / "manifest.json").write_bytes(content)
    found, damaged = resume.find(tmp_path, None)
    assert found.path == older
    assert "manifest.json is damaged" in damaged[newest]


def test_checkpoint_of_another_version_is_named_and_stays(tmp_path):
    path = checkpoint(tmp_path, 5) / "manifest.json"
    path.write_text(rehash({**json.loads(path.read_text()), "format": 2}))
    with pytest.raises(
        RunDirectoryError, match=r"step-00000005 was written by another version .*format 2"
    ):
        resume.find(tmp_path, None)
    assert path.exists()


def test_checkpoint_of_a_step_beyond_the_end_is_skipped(tmp_path):
    older, newest = checkpoint(tmp_path, 2), checkpoint(tmp_path, 9)
    found, damaged = resume.find(tmp_path, None, num_steps=5)
    assert (found.path, damaged) == (older, {newest: "it is of step 9, but the run has 5 steps"})


class Command:
    """What a hostile file would run."""

    def __reduce__(self):
        return print, ("executed",)


HOSTILE = {
    "a command": (pickle.dumps(Command()), "holds more than tensors: it names builtins.print"),
    "no metadata": (pickle.dumps({"a": 1}), "is damaged"),
    "a torn one": (b"\x80\x04\x95", "is damaged"), "empty": (b"", "is damaged"),
    "binary": (b"\xff" * 50, "is damaged"), "text": (b"hello", "is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
def test_foreign_checkpoint_metadata_is_reported(tmp_path, hostile, capsys):
    content, says = HOSTILE[hostile]
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match=f"{tmp_path / '.metadata'} {says}"):
        unpickling.Reader(tmp_path).read_metadata()
    assert capsys.readouterr().out == ""


def test_deepspeed_files_with_unexpected_classes_are_reported(tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({"weights": torch.zeros(2)}, path)
    unpickling.require_tensors([path], [])
    whole = path.read_bytes()
    torch.save({"weights": torch.zeros(2), "more": Command()}, path)
    with pytest.raises(
        DamagedCheckpoint, match=f"{path} holds more than tensors: it names builtins.print"
    ):
        unpickling.require_tensors([path], [])
    for content in (b"", b"junk", whole[:-50]):
        path.write_bytes(content)
        with pytest.raises(DamagedCheckpoint, match=f"{path} is damaged"):
            unpickling.require_tensors([path], [])
    assert capsys.readouterr().out == ""


DAMAGES = {
    "metadata": (
        "shards/.metadata", lambda old: pickle.dumps(Command()), "holds more than tensors",
    ),
    "half of metadata": ("shards/.metadata", lambda old: old[: len(old) // 2], "is damaged"),
    "half of the shards": (
        "shards/__0_0.distcp", lambda old: old[: len(old) // 2], "shards is damaged",
    ),
    "random numbers": ("process-0000.json", lambda old: b"{}", "is damaged"),
    "a list": ("process-0000.json", lambda old: b"[1]", "is damaged"),
    "types": (
        "process-0000.json", lambda old: b'{"random": {"python": 5}, "scaler": null}', "is damaged",
    ),
}  # fmt: skip


@pytest.mark.slow
def test_checkpoint_that_cannot_be_loaded_names_its_file_and_an_older_one(workshop):
    settings = {"checkpoint__every_steps": 2}
    run = workshop.train(**settings)
    (run / "outcome.json").unlink()
    older, newest = run / "checkpoints/step-00000004", run / "checkpoints/step-00000005"
    kept = workshop.folder / "kept"
    shutil.copytree(newest, kept)
    for name, damaged, says in DAMAGES.values():
        path = newest / name
        path.write_bytes(damaged(path.read_bytes()))
        manifest = json.loads((newest / "manifest.json").read_text())
        manifest["files"] |= folder.described(newest, [name])
        (newest / "manifest.json").write_text(rehash(manifest))
        with pytest.raises(CheckpointError) as problem:
            workshop.train(**settings)
        message = str(problem.value)
        assert f"checkpoint {newest} cannot be loaded: " in message, message
        assert says in message, message
        assert name.split("/")[0] in message, message
        assert message.endswith(
            f"move it away (from checkpoint.storage too, where that is set) to resume from {older}"
        )
        assert "\n" not in message
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    shutil.rmtree(newest)
    workshop.train(**settings)
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
