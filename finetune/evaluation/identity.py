"""What tells one model from another, without reading its weights."""

import json
import os
from hashlib import blake2b
from pathlib import Path

from finetune.config.base import decides_what_opens, is_adapter, recorded_base
from finetune.errors import ModelError
from finetune.export.load import commit_of
from finetune.generation.remote import is_remote

SMALL = 1 << 20  # bytes of a file that is hashed; a larger one counts by size and time of change


def identity_of(model: str, base: str | None = None, revision: str | None = None) -> str:
    """Return the identity of a folder, a Hub id or MODEL@URL; of an adapter with its base.

    base: where the base of an adapter is now. revision: of a Hub id, which counts by its commit. A
    changed file gives another identity, and so does a copy of large weights, whose answers are then
    asked for again.
    """
    if is_remote(model):
        return model
    if not os.path.isdir(model):
        return ", ".join([model, *_version(model, revision)])
    folder = Path(model)
    files: list[list[object]] = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and decides_what_opens(path.relative_to(folder).as_posix()):
            about = path.stat()
            content: object = [about.st_size, about.st_mtime_ns]
            if about.st_size <= SMALL:
                content = blake2b(path.read_bytes(), digest_size=16).hexdigest()
            files.append([path.relative_to(folder).as_posix(), content])
    if is_adapter(folder):
        files.append(["base", identity_of(base or recorded_base(folder))])
    return blake2b(json.dumps(files).encode(), digest_size=16).hexdigest()


def _version(name: str, revision: str | None) -> list[str]:
    """Return which version of a model on the Hub it is, as far as that can be known here."""
    try:
        commit = commit_of(name, revision)
    except ModelError:  # all answers may be there, and nothing to load
        commit = None
    if commit is not None:
        return [f"commit {commit}"]
    return [] if revision is None else [f"revision {revision}"]
