"""Write checkpoint folders so that a partial one is never taken for a complete one. No torch.

Protocol: the main process makes `.writing-step-00000300` on the same file system; every process
writes its part into it and flushes each file to the disk; the main process adds `manifest.json`,
with the size and hash of each file and a hash of itself, renames the folder to `step-00000300`, and
flushes the parent. What a crash leaves begins with a dot: it is never read, and the next save
removes it.
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
    """A complete checkpoint of another version of this program."""


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
    """Return the step in a checkpoint's name; None for any other name."""
    return int(name.removeprefix("step-")) if re.fullmatch(r"step-\d{8}", name) else None


def steps(root: Path) -> list[Path]:
    """Return the checkpoints under `root`, complete or not, newest first; skip a user's files."""
    return sorted((p for p in root.glob("step-*") if step_of(p.name) is not None), reverse=True)


# ------------------------------------------------------------------------------------- writing


def begin(root: Path, step: int) -> Path:
    """Make a fresh directory to write into; remove what crashes left."""
    sweep(root)
    writing = root / f".writing-{step_name(step)}"
    writing.mkdir(parents=True)
    return writing


def sweep(root: Path) -> None:
    """Remove checkpoints that are half written or half removed."""
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
    """Return the paths, relative to `folder`, of all files below it except the manifest."""
    return sorted(
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and p.relative_to(folder) != Path(MANIFEST)
    )


def described(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the size and hash of each named file."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in names
    }


def commit(writing: Path, manifest: dict[str, Any]) -> Path:
    """Write the manifest and rename the folder to a checkpoint; return it.

    `manifest["files"]` describes every file.
    """
    final = writing.with_name(writing.name.removeprefix(".writing-"))
    write_json(writing / MANIFEST, {**manifest, "sha256": json_sha256(manifest)})
    for folder in [*(p for p in writing.rglob("*") if p.is_dir()), writing]:
        flush(folder)
    # It exists if this one was damaged or set aside, and the run resumed from an older one.
    if final.exists():
        remove(final)
    os.rename(writing, final)
    flush(final.parent)
    return final


def prune(root: Path, keep_last: int, protected: set[str]) -> None:
    """Remove complete checkpoints beyond the newest `keep_last`, except those named `protected`.

    Damaged ones are not counted, since no run can resume from them, and not removed.
    """
    whole = [path for path in steps(root) if looks_whole(path)]
    for path in whole[keep_last:]:
        if path.name not in protected:
            remove(path)


def remove(path: Path) -> None:
    """Hide a checkpoint with one rename, so that half of it is never seen, then delete it.

    Of a symbolic link, remove only the link.
    """
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    hidden = path.with_name(f".removing-{path.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    shutil.rmtree(hidden)


def set_aside(damaged: list[Path]) -> dict[Path, Path]:
    """Rename damaged checkpoints to `damaged-step-...`, never read; return where each is now."""
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
    """Return the newest valid checkpoint under `root`, or None, and the problem of each newer one.

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
    """Raise ValueError if a checkpoint is beyond the run's last step, which would export it."""
    step = step_of(path.name)
    if step is not None and num_steps is not None and step > num_steps:
        raise ValueError(f"it is of step {step}, but the run has {num_steps} steps")


def verified(path: Path) -> dict[str, Any]:
    """Return the manifest after checking it and every file.

    Raises OSError or ValueError that names the file.
    """
    manifest = read_manifest(path)
    for name, wanted in manifest["files"].items():
        if problem := difference(path / name, wanted):
            raise ValueError(f"{name} {problem}")
    return manifest


def difference(path: Path, wanted: dict[str, Any]) -> str | None:
    """Return how a file differs from what `described` recorded; None if equal. Raises OSError."""
    if not path.is_file():  # reading a pipe could block
        return "is missing, or is not a file"
    size = path.stat().st_size
    if size != wanted["bytes"]:
        return f"has {size} bytes instead of {wanted['bytes']}"
    if sha256(path) != wanted["sha256"]:
        return "is corrupt: its sha256 is not the one on record"
    return None


def looks_whole(path: Path) -> bool:
    """Return whether manifest and sizes agree, which is cheap; `verified` also reads the files."""
    try:
        manifest = read_manifest(path)
        return all(
            (path / name).stat().st_size == wanted["bytes"]
            for name, wanted in manifest["files"].items()
        )
    except (OSError, ValueError):
        return False


def run_id(manifest: bytes) -> str | None:
    """Return the id of a manifest's run, the same for all its attempts; None if it has none."""
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
        raise ValueError(f"{MANIFEST} is corrupt: its content does not match its sha256")
    if type(format := manifest.get("format")) is int and format != FORMAT:
        raise OtherFormat(
            f"{path} was written by another version of this program (format {format}, "
            f"this one reads {FORMAT}), which this version cannot check; "
            "finish the run with that version, or give this one another run.name"
        )
    _require_shape(manifest)
    if manifest["progress"]["step"] != step_of(path.name.removeprefix(".fetching-")):
        raise ValueError(f"{MANIFEST} belongs to another step than {path.name}")
    return manifest


def parsed(content: bytes) -> dict[str, Any]:
    """Parse a manifest without checking its hash or keys. Raises ValueError."""
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
    """Return the bytes of each file of a checkpoint. Raises ValueError, also for a path outside."""
    described = manifest.get("files")
    if not isinstance(described, dict) or not described:
        raise ValueError(f"{MANIFEST} is damaged: files does not list the files of a checkpoint")
    for name, about in described.items():
        if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise ValueError(f"{MANIFEST} names {name}, which is not in the checkpoint's folder")
        if not _is_like(about, {"bytes": 0, "sha256": ""}):
            raise ValueError(f"{MANIFEST} is damaged: files lacks the size or sha256 of {name}")
    return {name: about["bytes"] for name, about in described.items()}


def _require_shape(manifest: dict[str, Any]) -> None:
    """Raise ValueError that names a key which is missing or has the wrong type.

    The hash cannot show this: anyone can hash a changed manifest again.
    """
    sizes(manifest)
    config = manifest.get("config")
    sections: dict[str, Any] = {}
    if isinstance(config, dict):
        sections = {section: {} for section in config}
    like: dict[str, Any] = {
        "format": FORMAT,
        "progress": Progress().to_dict(),
        "config": {**sections, "optimizer": {"kind": ""}},
        "identity": {},
        "topology": "",
        "num_processes": 0,
    }
    if wrong := [key for key in like if not _is_like(manifest.get(key), like[key])]:
        raise ValueError(f"{MANIFEST} is damaged: {wrong[0]} is missing, or has another type")


def _is_like(value: Any, like: Any) -> bool:
    """Return whether a value has the type of `like` and its keys; integers must not be negative."""
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
