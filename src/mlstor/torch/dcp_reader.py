"""The `StorageReader` for ``torch.distributed.checkpoint``: parallel, verified, straight into the tensors."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import uuid
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader as _StorageReader
from torch.futures import Future

from mlstor.blob.target import open_directory
from mlstor.blob.types import BlobDirectory, read_all
from mlstor.errors import CorruptionError
from mlstor.formats.dcp_sidecar import SUFFIX
from mlstor.torch.dcp_load import FileLoad, Loaded, Wanted
from mlstor.torch.dcp_metadata import read_metadata
from mlstor.torch.dcp_ranges import apart
from mlstor.torch.dcp_share import Share, exchange, give_up, local_offer, shared_plans
from mlstor.torch.dcp_target import check_target, is_target
from mlstor.torch.loading import UnverifiedWarning
from mlstor.torch.saving import opening

#: Data files that are read at one time; each is read by many requests already.
_FILES_AT_ONCE = 8
#: Memory for what can't be read straight to its place, at one time, of all files.
SCRATCH_BYTES = 256 << 20


class StorageReader(_StorageReader):
    """Reads distributed checkpoints that `StorageWriter` or stock torch wrote, into any sharding.

    The bytes that a rank wants are read, no more, and straight into its tensors where they lie as in the file. What
    mlstor wrote is verified chunk by chunk; what stock torch wrote is verified by the CRC-32s in its items where an
    item is read as a whole, else it counts as unverified, with one `UnverifiedWarning`.

    Parameters
    ----------
    path
        A directory, or the URL of a prefix: ``s3://BUCKET/PREFIX``, ``ais://BUCKET/PREFIX``.
    verify
        False: read without comparing sums.
    share_reads
        Ranks on one host that want the same bytes read them once, and hand them over through shared memory.
    trust
        Unpickle ``.metadata`` whatever it names, as stock torch does. By default only torch's own classes.
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
        verify: bool = True,
        share_reads: bool = True,
        trust: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._path = check_target(path)
        self._verify = verify
        self._share_reads = share_reads
        self._trust = trust
        self._options = opening(None, options)
        self._load_id = str(uuid.uuid4())
        self._metadata: Metadata | None = None
        self._files: dict[str, str] | None = None
        #: where, and a hash of the metadata: what tells the checkpoint from others
        self._checkpoint: tuple[str, str] | None = None
        self._shapes: dict[str, dict[torch.Size | None, torch.Size]] = {}
        #: bytes that the last load verified on this rank, and that it could not verify
        self.verified_bytes = 0
        self.unverified_bytes = 0

    # The contract of torch's StorageReader.

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A new load begins, from `checkpoint_id` if it is given."""
        if checkpoint_id:
            self._path = check_target(checkpoint_id)
        self._load_id = str(uuid.uuid4())
        self._metadata = self._files = self._checkpoint = None
        self._shapes = {}

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Reads ``.metadata``, or with ``rank=`` that of a rank which saved without collectives.

        Raises
        ------
        CorruptionError
            If it is damaged.
        UsageError
            If it names other classes than torch's; see `trust`.
        """
        rank = kwargs.get("rank")
        blob = self._directory().blob(".metadata" if rank is None else f"__{rank}.metadata")
        content = read_all(blob)
        metadata, self._files = read_metadata(content, blob.name, trust=self._trust)
        self._checkpoint = (self._path, hashlib.sha256(content).hexdigest())
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self._load_id
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """torch hands over ``rank`` and ``use_collectives`` because a parameter is named kwargs."""
        if metadata.storage_data is None:
            raise CorruptionError(f"{self._path}: the metadata do not say where the data lie")
        self._metadata = metadata
        self._shapes = {}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Says which host this is, so that its ranks can share what they read."""
        return local_offer(plan, self._checkpoint) if self._share_reads and self._checkpoint else plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Decides which rank reads what several on a host want."""
        return shared_plans(plans, self._checkpoint, self._kind)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads this rank's items into its tensors."""
        self.verified_bytes = self.unverified_bytes = 0
        share = plan.storage_data if isinstance(plan.storage_data, Share) else None
        try:
            tensors = {
                index: planner.resolve_tensor(request)
                for index, request in enumerate(plan.items)
                if request.type == LoadItemType.TENSOR
            }
        except BaseException:
            if share is not None:
                with contextlib.suppress(OSError):  # the planner's error is the one to raise
                    give_up(share)
            raise
        notes: list[str] = []

        def load(indices: list[int]) -> None:
            """Reads those items; tensors that share memory one after the other, as stock torch does."""
            for some in apart(indices, tensors):
                for index, content in self._load(plan.items, some, tensors, notes).items():
                    planner.load_bytes(plan.items[index], io.BytesIO(content))

        if share is None:
            load(list(range(len(plan.items))))
        else:
            exchange(share, plan.items, tensors, load)
        for index, tensor in tensors.items():
            if not tensor.is_inference():  # written behind autograd's back: it must know
                torch.autograd.graph.increment_version(tensor)
            planner.commit_tensor(plan.items[index], tensor.detach())
        self._warn(notes)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """Where the checkpoint is."""
        return self._path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a path, or a URL that mlstor understands."""
        return is_target(checkpoint_id)

    def _directory(self) -> BlobDirectory:
        return open_directory(self._path, **self._options)

    def _load(
        self, items: list[ReadItem], indices: list[int], tensors: Mapping[int, torch.Tensor], notes: list[str]
    ) -> dict[int, bytes | memoryview]:
        """Loads some of the plan's items; returns the contents of those that are no tensors."""
        by_file: dict[str, list[tuple[int, Wanted]]] = {}
        for index in indices:
            wanted = self._wanted(items[index], tensors.get(index))
            by_file.setdefault(wanted.info.relative_path, []).append((index, wanted))
        directory = self._directory()
        most_bytes = SCRATCH_BYTES // max(1, min(len(by_file), _FILES_AT_ONCE))
        loads = {
            name: FileLoad(
                directory.blob(name),
                directory.blob(name + SUFFIX),
                (self._files or {}).get(name),
                self._verify,
                [wanted for _, wanted in some],
                most_bytes,
            )
            for name, some in by_file.items()
        }
        contents: dict[int, bytes | memoryview] = {}
        for name, loaded in _run_all(loads).items():
            self.verified_bytes += loaded.verified_bytes
            self.unverified_bytes += loaded.unverified_bytes
            notes += loaded.notes
            contents.update({by_file[name][place][0]: content for place, content in loaded.contents.items()})
        return contents

    def _wanted(self, request: ReadItem, tensor: torch.Tensor | None) -> Wanted:
        assert self._metadata is not None
        index = request.storage_index
        info = self._metadata.storage_data[index]
        stored = self._metadata.state_dict_metadata[index.fqn]
        if tensor is None or not isinstance(stored, TensorStorageMetadata):
            return Wanted(request, info, torch.uint8, torch.Size(()), None)
        return Wanted(request, info, stored.properties.dtype, self._shape(index.fqn, index.offset), tensor.detach())

    def _shape(self, name: str, offset: torch.Size | None) -> torch.Size:
        """Of the stored part of a tensor that begins at `offset`."""
        shapes = self._shapes.get(name)
        if shapes is None:
            assert self._metadata is not None
            chunks = self._metadata.state_dict_metadata[name].chunks  # type: ignore[union-attr]  # of a tensor
            shapes = self._shapes[name] = {chunk.offsets: chunk.sizes for chunk in chunks}
            shapes[None] = chunks[0].sizes
        return shapes[offset]

    def _kind(self, request: ReadItem) -> tuple[int, torch.dtype]:
        """Bytes and stored type of an item of the plan; 0 bytes for one that is no tensor."""
        assert self._metadata is not None
        stored = self._metadata.state_dict_metadata[request.storage_index.fqn]
        if request.type != LoadItemType.TENSOR or not isinstance(stored, TensorStorageMetadata):
            return 0, torch.uint8
        return request.lengths.numel() * stored.properties.dtype.itemsize, stored.properties.dtype

    def _warn(self, notes: list[str]) -> None:
        if not self._verify or not (self.unverified_bytes or notes):
            return
        if not self.unverified_bytes:  # the zips in the items have CRC-32s of their own
            text = f"{self._path}: all that was wanted is verified by the items' own CRC-32s, but {'; '.join(notes)}"
            warnings.warn(text, UserWarning, stacklevel=4)
            return
        why = "; ".join(notes) or "stock torch wrote it, and only a part of an item was wanted, or it holds no CRC-32"
        warnings.warn(
            f"{self._path}: loaded, but {self.unverified_bytes} of "
            f"{self.unverified_bytes + self.verified_bytes} bytes are unverified: {why}",
            UnverifiedWarning,
            stacklevel=4,
        )


def _run_all(loads: Mapping[str, FileLoad]) -> dict[str, Loaded]:
    """Loads from all files, several at a time; the first error is raised."""
    if len(loads) == 1:  # in this thread, where Ctrl-C is heard at once
        return {name: load.run() for name, load in loads.items()}
    pool = ThreadPoolExecutor(_FILES_AT_ONCE, "mlstor-dcp")
    mode = torch.is_inference_mode_enabled()  # of this thread; tensors that are made in it are changed in it alone

    def run(load: FileLoad) -> Loaded:
        with torch.inference_mode(mode):
            return load.run()

    try:
        futures = {name: pool.submit(run, load) for name, load in loads.items()}
        found = {name: future.result() for name, future in futures.items()}
    except BaseException as error:
        # After an error somebody may load something else into the same tensors: nothing may write to them any more
        pool.shutdown(wait=isinstance(error, Exception), cancel_futures=True)
        raise
    pool.shutdown()
    return found
