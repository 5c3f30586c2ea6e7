"""``.metadata`` is a pickle: it is read with those classes alone that torch's distributed checkpoints are made of."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from mlstor.errors import CorruptionError, UsageError
from mlstor.formats.dcp_sidecar import unseal

#: Classes of torch's own metadata, of this and of older versions; none of them acts when it is made.
_ALLOWED = {
    "builtins": {"bytearray", "complex", "frozenset", "set", "slice"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath"},
    "torch": {"Size"},
    "torch.distributed._shard.metadata": {"ShardMetadata"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}


class _Unpickler(pickle.Unpickler):
    name = ""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            # Python 3.13 alone has it there; every stock checkpoint names its path
            return super().find_class("pathlib" if module == "pathlib._local" else module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise UsageError(
            f"{self.name}: the pickle names {module}.{name}, which torch's own metadata do not hold, and which could "
            "run code; if you trust whoever wrote the checkpoint, give StorageReader(..., trust=True)"
        )


def read_metadata(content: bytes, name: str, *, trust: bool = False) -> tuple[Metadata, dict[str, str] | None]:
    """The metadata, and the file id of each data file; None if stock torch wrote them.

    Parameters
    ----------
    content
        Of the file ``.metadata``.
    name
        For messages.
    trust
        Unpickle whatever it is, as stock torch does.

    Raises
    ------
    CorruptionError
        If it is damaged.
    UsageError
        If the pickle names other classes than torch's.
    """
    pickled, files = unseal(content, name)
    stream = io.BytesIO(pickled)
    unpickler = (pickle.Unpickler if trust else _Unpickler)(stream)
    if isinstance(unpickler, _Unpickler):
        unpickler.name = name
    try:
        metadata = unpickler.load()
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # a damaged pickle fails in every way
        raise CorruptionError(f"{name}: the metadata can't be read, and are damaged: {error}") from error
    if stream.read(1):
        raise CorruptionError(f"{name}: bytes follow the metadata that nobody wrote: the file is damaged")
    if not isinstance(metadata, Metadata):
        raise CorruptionError(f"{name}: the file holds {type(metadata).__name__}, no metadata of a checkpoint")
    return metadata, files
