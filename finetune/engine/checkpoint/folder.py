"""A checkpoint as a folder: written so that a torn one is never taken for a whole one. No torch.

Protocol: a fresh directory `.writing-step-00000300` on the same file system; every process writes
its part into it, and every file is flushed to the disk; `manifest.json` comes last, with the size
and hash of each file and a hash of itself; then one rename makes it `step-00000300`, and the parent
directory is flushed too. What a crash leaves begins with a dot, is never read, and goes at the next
save.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.engine.progress import Progress
from finetune.errors import CheckpointError, RunDirectoryError
from finetune.files import flush, json_sha256, sha256

FORMAT = 3  # 2: without the fields of the model's config, tokenizer, template and starting weights
MANIFEST = "manifest.json"
TORN = (".writing-*", ".removing-*", ".fetching-*", ".converting-*")  # never a checkpoint


class OtherFormat(RunDirectoryError, ValueError):
    """A checkpoint that is whole, and of another version of this program."""


@dataclass(frozen=True)
class Found:
    """A checkpoint whose manifest and files agree."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["progress"]["step"])


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name; None for any other."""
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-\d{8}", name) else None


def steps(root: Path) -> list[Path]:
    """Checkpoints under `root`, whole or not, the newest first; what a user keeps next to them is
    not ours.
    """
    return sorted((p for p in root.glob("step-*") if step_of(p.name) is not None), reverse=True)


# ------------------------------------------------------------------------------------- writing


def begin(root: Path, step: int) -> Path:
    """A fresh directory to write into; what crashes left goes."""
    sweep(root)
    writing = root / f".writing-{step_name(step)}"
    writing.mkdir(parents=True)
    return writing


def sweep(root: Path) -> None:
    """Remove what is half written or half removed."""
    for pattern in TORN:
        for torn in root.glob(pattern):
            shutil.rmtree(torn, ignore_errors=True)


def require_space(root: Path, needed_bytes: int) -> None:
    """Raise CheckpointError if the disk is known to be too full."""
    free = shutil.disk_usage(root).free
    if free < needed_bytes:
        raise CheckpointError(
            f"{root} has {free / 1e9:.3g} GB free, and {needed_bytes / 1e9:.3g} GB are needed"
        )


def files(folder: Path) -> list[str]:
    """Every file below `folder` but the manifest, by its path in it."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder) != Path(MANIFEST)
    )


def described(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of some files."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def commit(writing: Path, manifest: dict[str, Any]) -> Path:
    """The manifest, last, and the rename that makes it a checkpoint. `manifest["files"]` describes
    every file.
    """
    final = writing.with_name(writing.name.removeprefix(".writing-"))
    write_json(writing / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})
    for folder in [*(p for p in writing.rglob("*") if p.is_dir()), writing]:
        flush(folder)
    # Trained again from an older one, after this one was found damaged or was asked to be forgotten
    if final.exists():
        remove(final)
    os.rename(writing, final)
    flush(final.parent)
    return final


def prune(root: Path, keep_last: int, protected: set[str]) -> None:
    """Remove whole checkpoints beyond the newest `keep_last`, but none of `protected`.

    Broken ones are neither counted, since they could not be gone on from, nor removed.
    """
    whole = [path for path in steps(root) if looks_whole(path)]
    for path in whole[keep_last:]:
        if path.name not in protected:
            remove(path)


def remove(path: Path) -> None:
    """Out of sight with one rename, so that half of it is never seen; then away. Of a link only the
    link.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    hidden = path.with_name(f".removing-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def set_aside(damaged: list[Path]) -> dict[Path, Path]:
    """Rename checkpoints that are not whole to `damaged-step-...`: kept, but neither read, counted
    nor in the way. Where each is now.
    """
    kept = {}
    for path in filter(os.path.lexists, damaged):
        free = next(
            n
            for n in range(1000)
            if not os.path.lexists(path.with_name(f"damaged-{path.name}.{n}"))
        )
        kept[path] = path.with_name(f"damaged-{path.name}.{free}")
        os.rename(path, kept[path])
    return kept


# ------------------------------------------------------------------------------------- reading


def find_newest(root: Path, num_steps: int | None = None) -> tuple[Found | None, dict[Path, str]]:
    """The newest valid checkpoint under `root`, and what is wrong with each newer one; None if none
    is valid.

    `num_steps`: of the run; None: unknown.
    """
    damaged: dict[Path, str] = {}
    for path in steps(root):
        try:
            require_step(path, num_steps)
            return Found(path, verified(path)), damaged
        except OtherFormat:
            raise
        except (OSError, ValueError) as exc:
            damaged[path] = str(exc)
    return None, damaged


def require_step(path: Path, num_steps: int | None) -> None:
    """Raise ValueError for a checkpoint of a step that the run does not have: it would export it as
    its end.
    """
    step = step_of(path.name)
    if step is not None and num_steps is not None and step > num_steps:
        raise ValueError(f"it says step {step}, and the run has {num_steps} steps")


def verified(path: Path) -> dict[str, Any]:
    """The manifest, if it and every file are what was written. Raises OSError or ValueError that
    names the file.
    """
    manifest = read_manifest(path)
    for name, wanted in manifest["files"].items():
        if problem := difference(path / name, wanted):
            raise ValueError(f"{name} {problem}")
    return manifest


def difference(path: Path, wanted: dict[str, Any]) -> str | None:
    """How a file is not what `described` said of it; None if it is. Raises OSError."""
    if not path.is_file():  # or reading it could wait for another program
        return "is missing, or is not a file"
    size = path.stat().st_size
    if size != wanted["bytes"]:
        return f"has {size} bytes instead of {wanted['bytes']}"
    return (
        None
        if sha256(path) == wanted["sha256"]
        else "is corrupt: its sha256 is not the one on record"
    )


def looks_whole(path: Path) -> bool:
    """Whether manifest and sizes agree, which costs next to nothing; `verified` also reads the
    files.
    """
    try:
        manifest = read_manifest(path)
        return all(
            (path / name).stat().st_size == wanted["bytes"]
            for name, wanted in manifest["files"].items()
        )
    except (OSError, ValueError):
        return False


def run_id(manifest: bytes) -> str | None:
    """Which run a manifest belongs to, however often that was started; None if it does not say."""
    try:
        return str(parsed(manifest)["progress"]["run_id"])
    except (ValueError, KeyError, TypeError):
        return None


def read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError("it is not a folder")
    try:
        manifest = parsed((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    if manifest.pop("sha256", None) != json_sha256(manifest):
        raise ValueError(f"{MANIFEST} is corrupt: its sha256 differs from what it says")
    if type(format := manifest.get("format")) is int and format != FORMAT:
        raise OtherFormat(
            f"{path} was written by another version of this program (format {format}, "
            f"this one reads {FORMAT}), which this version cannot check; "
            "finish the run with that version, or give this one another run.name"
        )
    _require_shape(manifest)
    if manifest["progress"]["step"] != step_of(path.name.removeprefix(".fetching-")):
        raise ValueError(f"{MANIFEST} is not that of {path.name}")
    return manifest


def parsed(content: bytes) -> dict[str, Any]:
    """What a manifest holds, its hash and its keys not looked at. Raises ValueError."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{MANIFEST} is damaged: it is not JSON ({exc})") from exc
    if not isinstance(manifest, dict):
        raise ValueError(
            f"{MANIFEST} is damaged: it holds a {type(manifest).__name__} instead of an object"
        )
    return manifest


def sizes(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of each file of a checkpoint. Raises ValueError, also for a file outside its folder."""
    described = manifest.get("files")
    if not isinstance(described, dict) or not described:
        raise ValueError(f"{MANIFEST} is damaged: files does not list the files of a checkpoint")
    for name, about in described.items():
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise ValueError(f"{MANIFEST} names {name}, which is not in the checkpoint's folder")
        if not _is_like(about, {"bytes": 0, "sha256": ""}):
            raise ValueError(
                f"{MANIFEST} is damaged: files does not say the size and sha256 of {name}"
            )
    return {name: about["bytes"] for name, about in described.items()}


def _require_shape(manifest: dict[str, Any]) -> None:
    """Raise ValueError that names the key which is missing, or holds what none of our manifests
    does.

    The hash does not show it: a changed manifest can be hashed again.
    """
    sizes(manifest)
    config = manifest.get("config")
    sections: dict[str, Any] = (
        {section: {} for section in config} if isinstance(config, dict) else {}
    )
    like = {
        "format": FORMAT, "progress": Progress().to_dict(), "config": {**sections, "optimizer": {"kind": ""}},
        "identity": {}, "topology": "", "num_processes": 0,
    }  # fmt: skip
    if wrong := [key for key in like if not _is_like(manifest.get(key), like[key])]:
        raise ValueError(
            f"{MANIFEST} is damaged: {wrong[0]} is missing, or holds what no checkpoint does"
        )


def _is_like(value: Any, like: Any) -> bool:
    """Whether a value has the type of `like` and, if that is an object, all of its keys; a number
    counts something.
    """
    if isinstance(like, dict):
        return isinstance(value, dict) and all(
            _is_like(value.get(key), each) for key, each in like.items()
        )
    return type(value) is type(like) and (not isinstance(like, int) or value >= 0)


def write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
