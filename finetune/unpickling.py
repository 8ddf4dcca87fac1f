"""Read a checkpoint's pickles without executing what they name.

Anyone who can write to a run directory or its object store can also write a manifest with the right
hashes, so a hash does not make a file safe. A pickle is a program; here it may only name the
classes that a checkpoint consists of.
"""

import os
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from finetune import failures
from finetune.errors import DamagedCheckpoint

# All names in dcp's `.metadata`, the same in torch 2.11, 2.13 and 2.14.
_METADATA = (
    "BytesStorageMetadata ChunkStorageMetadata Metadata "
    "MetadataIndex StorageMeta TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING"
)
DCP = frozenset(
    {
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        *(("torch.distributed.checkpoint.metadata", name) for name in _METADATA.split()),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
        ("pathlib._local", "PurePosixPath"),
        ("collections", "OrderedDict"),
    }
)


class _Foreign(pickle.UnpicklingError):
    """A file holds something it must not; the message continues after the file's name."""


def _needless(what: str) -> _Foreign:
    return _Foreign(
        f"holds more than tensors: it {what}, which checkpoints do not need; nothing was executed"
    )


@contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Raise DamagedCheckpoint that names the file for any error inside: a pickle can raise any."""
    try:
        yield
    except _Foreign as exc:
        raise DamagedCheckpoint(f"{path} {exc}") from exc
    except Exception as exc:
        failures.reraise(exc, f"{path} cannot be read now")
        raise DamagedCheckpoint(f"{path} is damaged ({type(exc).__name__})") from exc


def _member(kind: Any, name: str) -> Enum:
    """Return an enum's member by name: the only use of `getattr` that is allowed here.

    Python 3.11.2, which Debian 12 has, pickles a member as `getattr(kind, name)`; 3.11.7 as
    `kind(value)`.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _needless(f"calls getattr({kind!r}, {name!r})")
    return kind[name]


# For torch.serialization.safe_globals: use this function for that name.
MEMBER = (_member, "builtins.getattr")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in DCP:
            raise _needless(f"names {module}.{name}")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """dcp's reader with a safe `read_metadata`; dcp's own is a bare `pickle.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read `.metadata`. Raises DamagedCheckpoint that names the file, also for a class."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with _reading(path):
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
            _require_parts(metadata)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def _require_parts(metadata: Any) -> None:
    """Raise _Foreign, AttributeError or TypeError unless this is dcp's, of files in its folder."""
    if not isinstance(metadata, Metadata):
        raise _Foreign(f"is damaged: it holds a {type(metadata).__name__}")
    for entry in metadata.state_dict_metadata.values():
        if not isinstance(entry, TensorStorageMetadata | BytesStorageMetadata):
            raise _Foreign(
                f"holds more than tensors: a {type(entry).__name__}; nothing was executed"
            )
    for info in (metadata.storage_data or {}).values():
        if os.path.basename(info.relative_path) != info.relative_path:
            raise _Foreign(f"names {info.relative_path}, which is not in the checkpoint's folder")


def require_tensors(paths: Iterable[Path], classes: Sequence[type]) -> None:
    """Raise DamagedCheckpoint for the first of torch.save's files with a class outside `classes`.

    Reads only a file's list of contents, so this is fast compared with loading it.
    """
    for path in paths:
        with _reading(path), torch.serialization.safe_globals([*classes, MEMBER]):
            if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise _needless(f"names {foreign[0]}")


@contextmanager
def weights_only(classes: Sequence[type] = ()) -> Iterator[None]:
    """Inside, make every `torch.load` of this process `weights_only`, whatever a library passes.

    dcp reads objects, and DeepSpeed all its files, with `weights_only=False`; this environment
    variable overrides that. `classes`: what files may hold besides tensors and Python's types.
    """
    # torch raises an error if both are set.
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals([*classes, MEMBER]):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
