"""Read a checkpoint's pickles without executing what they name.

Anyone who can write to a run directory or its object store can also write a manifest with the right
hashes, so a hash does not make a file safe. A pickle is a program; what is read here may only name
the classes that a checkpoint consists of.
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

# All that dcp's `.metadata` names, the same in torch 2.11, 2.13 and 2.14.
DCP = frozenset(
    {("torch", "Size"), ("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")}
    | {("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )}
    | {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")}
    | {("collections", "OrderedDict")}
)  # fmt: skip


class _Foreign(pickle.UnpicklingError):
    """What a file holds that it must not; goes on from the file's name."""


def _needless(what: str) -> _Foreign:
    return _Foreign(
        f"holds more than tensors: it {what}, which checkpoints do not need; nothing was executed"
    )


@contextmanager
def _reading(path: Any) -> Iterator[None]:
    """Raise DamagedCheckpoint that names the file for whatever the block raises: a damaged pickle,
    as a program, may fail at anything.
    """
    try:
        yield
    except _Foreign as exc:
        raise DamagedCheckpoint(f"{path} {exc}") from exc
    except Exception as exc:
        failures.reraise(exc, f"{path} cannot be read now")
        raise DamagedCheckpoint(f"{path} is damaged ({type(exc).__name__})") from exc


def _member(kind: Any, name: str) -> Enum:
    """An enum's member by name: all that `getattr` may do here.

    Python 3.11.2, which Debian 12 has, pickles a member as `getattr(kind, name)`; 3.11.7 as
    `kind(value)`.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _needless(f"calls getattr({kind!r}, {name!r})")
    return kind[name]


MEMBER = (
    _member,
    "builtins.getattr",
)  # for torch.serialization.safe_globals: which function stands for which name


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in DCP:
            raise _needless(f"names {module}.{name}")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """dcp's reader, whose own `read_metadata` is a bare `pickle.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamagedCheckpoint that names the file, also for a class that no checkpoint needs."""
        path = self._get_metadata_path(kwargs.get("rank"))
        with _reading(path):
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Unpickler(file).load()
            _require_parts(metadata)
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


def _require_parts(metadata: Any) -> None:
    """Raise _Foreign, AttributeError or TypeError unless this is what dcp writes, of files in the
    checkpoint's own folder.
    """
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
    """Raise DamagedCheckpoint that names the first of torch.save's files which names another class
    than `classes`.

    Only the list of what is in a file is read, so this takes no time next to loading it.
    """
    for path in paths:
        with _reading(path), torch.serialization.safe_globals([*classes, MEMBER]):
            if foreign := torch.serialization.get_unsafe_globals_in_checkpoint(path):
                raise _needless(f"names {foreign[0]}")


@contextmanager
def weights_only(classes: Sequence[type] = ()) -> Iterator[None]:
    """Inside, every `torch.load` of this process is `weights_only`, even if a library asks for
    more.

    dcp reads objects, and DeepSpeed reads all its files, with `weights_only=False`. torch obeys
    this variable above that argument. `classes`: what files may hold besides tensors and Python's
    own types.
    """
    names = (
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
    )  # both set is an error of torch
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals([*classes, MEMBER]):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
