"""The `StorageWriter` for ``torch.distributed.checkpoint``: durable, with sums, and readable by stock torch."""

from __future__ import annotations

import errno
import io
import os
import pickle
import re
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter as _StorageWriter, WriteResult
from torch.futures import Future

from mlstor.blob.target import open_directory
from mlstor.blob.types import Blob, BlobDirectory
from mlstor.errors import UsageError
from mlstor.formats.dcp_sidecar import CHUNK_BYTES, SUFFIX, is_data_file, pack, seal
from mlstor.operations import is_leftover
from mlstor.torch.dcp_layout import FileImage
from mlstor.torch.dcp_stage import Stager
from mlstor.torch.dcp_target import check_target, is_target
from mlstor.torch.saving import opening, parse_bandwidth

#: Copies (of tensors on devices, of strided and of small ones, of objects) that are held at once; then a data file ends
#: and another begins.
COPIED_BYTES = 1 << 30


class Placed(NamedTuple):
    """What a rank tells the coordinator of an item."""

    info: _StorageInfo
    #: id of the data file and of its sums
    file_id: str


class StorageWriter(_StorageWriter):
    """Writes distributed checkpoints to a directory or under an object store's prefix.

    The layout is that of torch's ``FileSystemWriter``: stock ``FileSystemReader`` reads it. Each file is written
    through the native engine, synced and renamed; ``.metadata`` is published last, over the old one, so that at every
    moment the directory holds a whole checkpoint, the old or the new. Each data file has a ``.sums`` file beside it.

    With ``dcp.async_save`` the writer is its own stager: the state is copied to memory that is used again by the next
    save, once this one's upload is over.

    Parameters
    ----------
    path
        A directory, or the URL of a prefix: ``s3://BUCKET/PREFIX``, ``ais://BUCKET/PREFIX``.
    overwrite
        Whether a checkpoint that is already there may be replaced: then with a warning, else `UsageError` is raised.
    max_bandwidth
        Most bytes per second that this rank writes, as a number or ``"500MB/s"``. None: no limit.
    options
        Of the store, by keyword, as ``mlstor.storage.store.open_store`` takes them (endpoint, profile, ...).

    Raises
    ------
    UsageError
        The path is no directory's name, or the URL is not understood.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = True,
        max_bandwidth: str | int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._path = check_target(path)
        self._overwrite = overwrite
        self._bytes_per_s = parse_bandwidth(max_bandwidth)
        self._options = opening(None, options)
        self._save_id = str(uuid.uuid4())
        self._rank: int | None = None
        self._collectives = True
        self._stager = Stager()

    def __getstate__(self) -> dict[str, Any]:
        self._stager.touch()
        return {name: value for name, value in vars(self).items() if name != "_stager"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stager=Stager())

    # The contract of torch's StorageWriter.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new save begins, to `checkpoint_id` if it is given."""
        self._stager.touch()
        if checkpoint_id:
            self._path = check_target(checkpoint_id)
        self._save_id = str(uuid.uuid4())

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """torch hands over ``rank`` and ``use_collectives`` because a parameter is named kwargs."""
        self._stager.touch()
        self._rank = kwargs.get("rank")
        self._collectives = kwargs.get("use_collectives", True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes the directory, and looks whether there is a checkpoint already."""
        directory = self._directory()
        directory.make()
        own = self._own()
        if own is not None and _exists(directory.blob(_metadata_name(None))):
            raise UsageError(
                f"{directory.name}: there is a checkpoint that was saved with collectives, and loads would take that "
                "one: name another place"
            )
        # Its own, not rank 0's: without collectives that may be of this save already
        if any(_exists(directory.blob(_metadata_name(rank))) for rank in {own, self._rank}):
            if not self._overwrite:
                raise UsageError(
                    f"{directory.name}: there is a checkpoint already: name another place, or overwrite=True"
                )
            warnings.warn(
                f"{directory.name}: there is a checkpoint already; it will be replaced when the new one is durable",
                stacklevel=2,
            )
        if self._rank is not None and not self._collectives:
            plan = replace(plan, storage_data=_StoragePrefix(f"__{self._rank}_"))
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Gives each rank the beginning of its files' names."""
        return [
            plan if plan.storage_data is not None else replace(plan, storage_data=_StoragePrefix(f"__{index}_"))
            for index, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's items, durably, each data file with its sums."""
        directory = self._directory()
        names = _free_names(directory, plan.storage_data.prefix)
        results: list[WriteResult] = []
        for image, items in _images(plan, planner):
            name = next(names)
            file_id = uuid.uuid4().hex
            published = directory.blob(name).publish(
                image.nbytes,
                image.pieces(),
                image.late(),
                digest="crc32+crc32c",
                keep=image.keep,
                max_bandwidth=self._bytes_per_s,
                block_bytes=CHUNK_BYTES,
            )
            publish_bytes(directory.blob(name + SUFFIX), pack(image.sums(file_id, published.digests)))
            for write, item in zip(items, image.items, strict=True):
                placed = Placed(_StorageInfo(name, item.offset, item.nbytes), file_id)
                results.append(WriteResult(write.index, item.nbytes, placed))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Publishes ``.metadata``: from now on there is a checkpoint. Then removes what belonged to the old one."""
        written = [result for of_rank in results for result in of_rank]
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data.info for result in written}
        metadata.storage_meta = self.storage_meta()
        files = {result.storage_data.info.relative_path: result.storage_data.file_id for result in written}
        directory = self._directory()
        own = self._own()
        publish_bytes(directory.blob(_metadata_name(own)), seal(pickle.dumps(metadata), files))
        _tidy(directory, files, own)

    def storage_meta(self) -> StorageMeta | None:
        """What ``.metadata`` says of this save."""
        self._stager.touch()
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """Where the checkpoint is saved."""
        self._stager.touch()
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path, or a URL that mlstor understands."""
        return is_target(checkpoint_id)

    # The contract of torch's AsyncStager; see torch.distributed.checkpoint.staging.

    _synchronize_after_execute = False

    @property
    def should_synchronize_after_execute(self) -> bool:
        """False: when `stage` returns, all is copied."""
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state that training may not disturb; waits until the one before is written."""
        return self._stager.stage(state_dict)

    def synchronize_staging(self) -> None:
        """Nothing: `stage` has copied when it returns."""

    def close(self) -> None:
        """Gives up the memory of copies."""
        self._stager.close()

    @property
    def stall_s(self) -> float:
        """How long the last `stage` took, waiting included, s: what ``dcp.async_save`` stalls training by."""
        return self._stager.stall_s

    @property
    def staged_bytes(self) -> int:
        """Memory that holds copies, bytes."""
        return self._stager.nbytes

    def _own(self) -> int | None:
        """The rank, where each has metadata of its own."""
        return None if self._collectives else self._rank

    def _directory(self) -> BlobDirectory:
        return open_directory(self._path, **self._options)


def publish_bytes(blob: Blob, content: bytes) -> None:
    """Publish a blob that is in memory."""
    import numpy as np

    from mlstor.blob.types import make_pieces

    memory = np.frombuffer(content, np.uint8)
    blob.publish(len(content), make_pieces([(0, len(content), memory.ctypes.data, -1)]), keep=memory)


def _images(plan: SavePlan, planner: SavePlanner) -> Iterator[tuple[FileImage, list[WriteItem]]]:
    """The rank's data files; one, but where tensors must be copied and the copies would take too much memory."""
    image, items = FileImage(), list[WriteItem]()
    for write in sorted(plan.items, key=_rank_in_file):
        if image.copied_bytes >= COPIED_BYTES:
            yield image, items
            image, items = FileImage(), []
        data = planner.resolve_data(write)
        if isinstance(data, io.BytesIO):
            image.add_bytes(data.getbuffer())
        else:
            if write.tensor_data is None:
                raise ValueError(f"the planner gave a tensor for {write.index.fqn!r}, but did not plan one")
            described = write.tensor_data.properties.dtype, write.tensor_data.chunk.sizes
            image.add_tensor(data.detach().cpu(), *described, is_copy=not data.is_cpu)
        items.append(write)
    if items:
        yield image, items


def _rank_in_file(write: WriteItem) -> int:
    """What is small first, so that it is gathered at one place."""
    if write.type == WriteItemType.BYTE_IO or write.tensor_data is None:
        return 0
    return write.tensor_data.chunk.sizes.numel() * write.tensor_data.properties.dtype.itemsize


def _exists(blob: Blob) -> bool:
    try:
        blob.stat()
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        return False
    return True


def _free_names(directory: BlobDirectory, prefix: str) -> Iterator[str]:
    """Names of data files that nobody has: those of a checkpoint that is there stay valid until it is replaced."""
    number = 0
    while True:
        name = f"{prefix}{number}.distcp"
        if not _exists(directory.blob(name)):
            yield name
        number += 1


def _metadata_name(rank: int | None) -> str:
    return ".metadata" if rank is None else f"__{rank}.metadata"


def _tidy(directory: BlobDirectory, files: Mapping[str, str], own: int | None) -> None:
    """Removes data files and sums that no metadata name any more, ranks' metadata where there are metadata of all, and
    what killed writers left.
    """
    keep = {_metadata_name(own), *files, *(name + SUFFIX for name in files)}
    try:
        directory.remove([name for name in directory.names() if _is_ours(name, own) and name not in keep])
    except OSError as error:  # the new checkpoint is whole and durable: only room is lost
        warnings.warn(f"{directory.name}: files of the old checkpoint could not be removed: {error}", stacklevel=2)


def _is_ours(name: str, own: int | None) -> bool:
    if is_leftover(name):
        name = name[1:].rsplit(".", 2)[0]
    if own is not None:
        return name == _metadata_name(own) or (name.startswith(f"__{own}_") and is_data_file(name))
    return is_data_file(name) or re.fullmatch(r"(__\d+)?\.metadata", name) is not None
