"""Anyone who can write to a run directory can forge a pickle; checkpoints execute nothing."""

import hashlib
import json
import os
import pickle
from enum import Enum
from pathlib import Path

import pytest
import torch
from conftest import short
from faults.forked import start
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from finetune.errors import DamagedCheckpoint, LostCheckpoints, ModelError
from finetune.unpickling import Reader, require_tensors, weights_only


class Command:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def forge(checkpoint: Path) -> None:
    """Hashes that fit, as an attacker would write them."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest.pop("sha256")
    for name, about in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        about |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest))


def replace_entry(shards: Path, kind: type, content: bytes, where: str | None = None) -> None:
    """Let an entry of dcp's metadata point at other bytes, or at another file."""
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    kinds = metadata.state_dict_metadata
    index = next(key for key in metadata.storage_data if isinstance(kinds[key.fqn], kind))
    path = shards / metadata.storage_data[index].relative_path
    begin = path.stat().st_size
    with path.open("ab") as file:
        file.write(content)
    metadata.storage_data[index] = _StorageInfo(where or path.name, begin, len(content))
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))


def metadata(folder: Path, value: object) -> Reader:
    (folder / ".metadata").write_bytes(pickle.dumps(value))
    return Reader(folder)


def by_name(member, protocol):
    """3.11.2 (Debian 12) pickles an enum member as a call of getattr, later ones as its value."""
    return getattr, (type(member), member.name)


def test_metadata_of_every_python_version_is_read(tmp_path, monkeypatch):
    weight = TensorStorageMetadata(TensorProperties(), torch.Size([2]), [])
    written = Metadata({"weight": weight}, storage_data={})
    for is_by_name in (False, True):
        with monkeypatch.context() as patch:
            if is_by_name:
                patch.setattr(Enum, "__reduce_ex__", by_name)
            reader = metadata(tmp_path, written)
        assert b"getattr" in (tmp_path / ".metadata").read_bytes() or not is_by_name
        assert reader.read_metadata() == written


class Attribute:
    """Asks for any attribute of a class that a checkpoint may name."""

    def __init__(self, *path: object) -> None:
        self.path = path

    def __reduce__(self):
        return getattr, self.path


def test_torch_files_of_every_python_version_are_read(tmp_path, monkeypatch):
    """DeepSpeed saves members of its enums with torch.save."""
    path, classes = tmp_path / "a.pt", [_MEM_FORMAT_ENCODING]
    monkeypatch.setattr(Enum, "__reduce_ex__", by_name)
    written = {"kind": _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST}
    torch.save(written, path)
    require_tensors([path], classes)
    with weights_only(classes):
        assert torch.load(path, weights_only=False) == written
    torch.save(Attribute(_MEM_FORMAT_ENCODING, "mro"), path)
    with weights_only(classes), pytest.raises(pickle.UnpicklingError, match="nothing was executed"):
        torch.load(path, weights_only=False)


@pytest.mark.parametrize(
    "path",
    [
        (Metadata, "__init__"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        ("text", "join"),
    ],
)
def test_getattr_gives_members_of_enums_only(tmp_path, path):
    with pytest.raises(DamagedCheckpoint, match="nothing was executed"):
        metadata(tmp_path, Attribute(*path)).read_metadata()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["metadata", "a number", "a tensor", "another folder"])
def test_code_in_a_checkpoint_is_refused_and_not_executed(workshop, where):
    settings = {"train__max_steps": 1, "train__micro_batch_size": 8}
    run, marker = workshop.train(**settings), workshop.folder / "executed"
    shards = newest(run) / "shards"
    torch.save(Command(marker), workshop.folder / "evil.pt")
    evil = (workshop.folder / "evil.pt").read_bytes()
    if where == "metadata":
        (shards / ".metadata").write_bytes(pickle.dumps(Command(marker)))
    elif where == "another folder":
        replace_entry(shards, BytesStorageMetadata, evil, "../../../../evil.pt")
    else:
        kind = BytesStorageMetadata if where == "a number" else TensorStorageMetadata
        replace_entry(shards, kind, evil)
    forge(newest(run))
    (run / "outcome.json").unlink()
    refused = "nothing was executed|eights.only|not in the checkpoint's folder"
    with pytest.raises(LostCheckpoints, match=refused):
        workshop.train(**settings)
    assert not marker.exists()
    assert shards.exists(), "it stays as it is"


@pytest.mark.slow
@pytest.mark.parametrize("topology", short(["zero1", "zero3"], "zero3"))
def test_code_in_the_files_of_deepspeed_is_refused_and_not_executed(workshop, topology):
    config = workshop.write(workshop.config(train__max_steps=1))
    marker = workshop.folder / "executed"
    launch = start(config, topology, 1)
    assert launch.codes() == [0], launch.output()
    run = workshop.run_dir()
    for path in newest(run).glob("shards/engine/*.pt"):
        torch.save(Command(marker), path)
    forge(newest(run))
    (run / "outcome.json").unlink()
    launch = start(config, topology, 1)
    assert launch.codes() == [2]
    assert "cannot be loaded" in launch.output()
    assert not marker.exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["base", "adapter"])
def test_code_in_weights_that_are_a_pickle_is_refused_and_not_executed(workshop, what):
    """Older repositories have pytorch_model.bin and adapter_model.bin."""
    base = workshop.train("base", train__max_steps=1) / "model"
    marker = workshop.folder / "executed"
    settings = {
        "model__init": "pretrained", "model__path": str(base), "model__config": None,
        "model__tokenizer": None, "adapter__kind": "lora", "train__max_steps": 1,
    }  # fmt: skip
    if what == "base":
        (base / "model.safetensors").unlink()
        torch.save(Command(marker), base / "pytorch_model.bin")
    else:
        first = workshop.train("first", **settings) / "model"
        (first / "adapter_model.safetensors").unlink()
        torch.save(Command(marker), first / "adapter_model.bin")
        settings["adapter__path"] = str(first)
    with pytest.raises(ModelError):
        workshop.train(**settings)
    assert not marker.exists()
