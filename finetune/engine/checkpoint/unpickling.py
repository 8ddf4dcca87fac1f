"""Read a checkpoint's pickles without executing what they name.

Whoever may write to a run directory or to its object store can also write a manifest with the right
hashes, so a hash does not make a file safe. A pickle is a program; what is read here may only name the
classes that a checkpoint consists of.
"""

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

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


def _member(kind: Any, name: str) -> Enum:
    """An enum's member by name: all that `getattr` may do here.

    Python 3.11.2, which Debian 12 has, pickles a member as `getattr(kind, name)`; 3.11.7 as `kind(value)`.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(
            f"it calls getattr({kind!r}, {name!r}), which no checkpoint needs; nothing was executed"
        )
    return kind[name]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in DCP:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which checkpoints do not need; nothing was executed"
            )
        return super().find_class(module, name)


class Reader(FileSystemReader):
    """dcp's reader, whose own `read_metadata` is a bare `pickle.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises UnpicklingError for a foreign class, ValueError for a file outside the checkpoint."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
        for info in (metadata.storage_data or {}).values():
            if os.path.basename(info.relative_path) != info.relative_path:
                raise ValueError(f".metadata names {info.relative_path}, which is not in the checkpoint's folder")
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


@contextmanager
def weights_only(classes: Sequence[type] = ()) -> Iterator[None]:
    """Inside, every `torch.load` of this process is `weights_only`, even if a library asks for more.

    dcp reads objects, and DeepSpeed reads all its files, with `weights_only=False`. torch obeys this
    variable above that argument. `classes`: what files may hold besides tensors and Python's own types.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # both set is an error of torch
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with torch.serialization.safe_globals(list(classes)):
            yield
    finally:
        del os.environ[names[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})
