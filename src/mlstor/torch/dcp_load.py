"""What a rank wants of one data file: read, verified and put into its tensors."""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import ReadItem

from mlstor.blob.types import Blob, require_same
from mlstor.errors import CorruptionError
from mlstor.formats.dcp_sidecar import Sums, parse
from mlstor.torch.dcp_fetch import Scratch, Want, fetch, fetch_digests, fetch_verified
from mlstor.torch.dcp_layout import combined, is_plain
from mlstor.torch.dcp_ranges import Box, part_of, slabs, straight
from mlstor.torch.dcp_stock import Record, Stored, check_item, find_records, unpickled, untransformed


class Wanted(NamedTuple):
    """One item of the plan."""

    request: ReadItem
    #: where in the data file
    info: _StorageInfo
    #: what ``.metadata`` says of the stored part; no bytes where the item is no tensor
    dtype: torch.dtype
    shape: torch.Size
    #: None for an item that is no tensor
    destination: torch.Tensor | None

    @property
    def name(self) -> str:
        return self.request.storage_index.fqn


class Loaded(NamedTuple):
    """What came of a file."""

    #: the bytes of items that are no tensors, by their place in the list of what was wanted
    contents: dict[int, memoryview]
    verified_bytes: int
    unverified_bytes: int
    #: why, where a sums file is missing or damaged
    notes: list[str]


class FileLoad:
    """Loads from one data file. Any thread may call `run`.

    Parameters
    ----------
    blob
        The data file.
    sums
        Its sums file.
    file_id
        Which sums file ``.metadata`` promises; None if it promises none.
    verify
        False: no byte more is read than is wanted.
    wanted
    most_bytes
        Of memory for what can't be read straight to its place, at one time.
    """

    def __init__(
        self, blob: Blob, sums: Blob, file_id: str | None, verify: bool, wanted: Sequence[Wanted], most_bytes: int
    ) -> None:
        self._blob = blob
        self._most_bytes = most_bytes
        #: of the data file when the load began
        self._etag = ""
        self._sums_blob = sums
        self._file_id = file_id
        self._verify = verify
        self._wanted = wanted
        self._wants: list[Want] = []
        self._after: list[Callable[[], None]] = []
        self._scratch_bytes = 0
        self._contents: dict[int, memoryview] = {}
        self._records: dict[int, Record] = {}
        #: (offset in the file, bytes, CRC-32) of what was read without sums
        self._read: list[tuple[int, int, int]] = []
        self._verified = self._unverified = 0
        self._notes: list[str] = []

    def run(self) -> Loaded:
        """Read it all.

        Raises
        ------
        CorruptionError
            If something is not what was written.
        OSError
            If the storage fails; ESTALE if the file is replaced meanwhile.
        """
        info = self._blob.stat()
        self._etag = info.etag
        try:
            return self._run(info.nbytes)
        except (CorruptionError, OSError) as error:
            if isinstance(error, CorruptionError) or error.errno == errno.ENODATA:
                require_same(self._blob, self._etag)
            raise

    def _run(self, nbytes: int) -> Loaded:
        sums = self._load_sums()
        self._check_length(nbytes, sums)
        records = self._places(sums)
        for index, wanted in enumerate(self._wanted):
            record = records.get((wanted.info.offset, wanted.info.length))
            if wanted.destination is None:
                self._whole(index, wanted, sums, None)
            elif record is None or wanted.info.transform_descriptors:
                self._whole(index, wanted, sums, wanted.destination)
            else:
                self._part(wanted, record, wanted.destination, sums)
        self._flush(sums)
        self._compare()
        return Loaded(self._contents, self._verified, self._unverified, self._notes)

    def _check_length(self, nbytes: int, sums: Sums | None) -> None:
        if sums is not None and nbytes != sums.nbytes:
            raise CorruptionError(f"{self._blob.name}: it has {nbytes} bytes, and was written with {sums.nbytes}")
        last = max(self._wanted, key=lambda wanted: wanted.info.offset + wanted.info.length)
        end = last.info.offset + last.info.length
        if nbytes < end:
            raise CorruptionError(f"{self._blob.name}: it ends at {nbytes}, but {last.name} goes to {end}")

    def _load_sums(self) -> Sums | None:
        """The sums file; None without one that can be relied on: then the file is as one of stock torch."""
        if self._file_id is None:
            return None
        blob = self._sums_blob
        try:
            sums = parse(blob.read(0, blob.stat().nbytes), blob.name)
        except CorruptionError as error:
            self._notes.append(str(error))
            return None
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise
            self._notes.append(f"{blob.name} is missing")
            return None
        if sums.file_id != self._file_id:
            self._notes.append(f"{blob.name} belongs to another save")
            return None
        return sums

    def _places(self, sums: Sums | None) -> Mapping[tuple[int, int], Record | None]:
        """Where the tensors' elements lie, by the items' offsets and sizes: an item without bytes has a neighbour's
        offset."""
        if sums is None:
            tensors = {wanted.info.offset: wanted for wanted in self._wanted if wanted.destination is not None}
            simple = [wanted for wanted in tensors.values() if not wanted.info.transform_descriptors]
            stored = [
                Stored(wanted.info.offset, wanted.info.length, wanted.dtype, wanted.shape, wanted.name)
                for wanted in simple
            ]
            found = find_records(self._blob, stored, self._etag) if stored else []
            return {(item.offset, item.nbytes): record for item, record in zip(stored, found, strict=True)}
        items = {(item.offset, item.nbytes): item for item in sums.items}
        places: dict[tuple[int, int], Record | None] = {}
        for wanted in self._wanted:
            key = (wanted.info.offset, wanted.info.length)
            item = items.get(key)
            expected = wanted.shape.numel() * wanted.dtype.itemsize
            if item is None or (item.data_offset and item.data_nbytes != expected):
                raise CorruptionError(
                    f"{self._blob.name}: the metadata say that {wanted.name!r} ({expected} bytes) lies in the "
                    f"{wanted.info.length} bytes from {wanted.info.offset} on, its sums file says otherwise"
                )
            places[key] = Record(item.data_offset, item.data_nbytes, None) if item.data_offset else None
        return places

    def _whole(self, index: int, wanted: Wanted, sums: Sums | None, destination: torch.Tensor | None) -> None:
        """An item that torch unpickles."""
        offset, nbytes = wanted.info.offset, wanted.info.length
        scratch = self._scratch(offset, nbytes, wanted.name, sums)

        def take() -> None:
            content = scratch.memory
            if self._verify and sums is None:
                self._count(check_item(content, f"{self._blob.name}: {wanted.name}"), nbytes)
            request = wanted.request
            if wanted.info.transform_descriptors:
                content = untransformed(content, wanted.info.transform_descriptors, request)
            if destination is None:
                self._contents[index] = content
                return
            tensor = unpickled(content, request)
            part = narrow_tensor_by_index(tensor, request.storage_offsets, request.lengths)
            if part.shape != destination.shape:
                raise CorruptionError(
                    f"{self._blob.name}: {wanted.name}: the item gives {tuple(part.shape)} elements where "
                    f"{tuple(destination.shape)} are wanted"
                )
            destination.copy_(part)

        self._after.append(take)

    def _part(self, wanted: Wanted, record: Record, destination: torch.Tensor, sums: Sums | None) -> None:
        """A part of a tensor, by its bytes."""
        request = wanted.request
        itemsize = wanted.dtype.itemsize
        box = Box(tuple(wanted.shape), tuple(request.storage_offsets), tuple(request.lengths), itemsize)
        if tuple(destination.shape) != box.lengths:
            raise ValueError(f"{wanted.name}: {tuple(destination.shape)} are planned for {box.lengths}")
        if not box.nbytes:
            return
        if sums is None and record.crc is not None and self._verify:
            self._records[wanted.info.offset] = record
        elif sums is None and self._verify:
            self._count(False, box.nbytes)
        alike = is_plain(destination) and destination.dtype == wanted.dtype
        alike = alike and not (destination.is_conj() or destination.is_neg())
        runs = straight(box, destination) if alike else None
        if runs is not None:
            self._wants += [Want(record.offset + start, nbytes, to, wanted.name) for start, nbytes, to in runs]
            return
        for slab, part in slabs(box, destination):
            start, end = slab.span()
            self._copy(self._scratch(record.offset + start, end - start, wanted.name, sums), slab, part, wanted.dtype)

    def _copy(self, scratch: Scratch, slab: Box, part: torch.Tensor, dtype: torch.dtype) -> None:
        def take() -> None:
            part.copy_(part_of(slab, scratch.tensor(), dtype))

        self._after.append(take)

    def _scratch(self, offset: int, nbytes: int, name: str, sums: Sums | None) -> Scratch:
        """Memory for a stretch that will be read; what was asked for before is read first if there is too much."""
        if self._scratch_bytes + nbytes > self._most_bytes:
            self._flush(sums)
        self._scratch_bytes += nbytes
        scratch = Scratch(offset, nbytes)
        self._wants.append(Want(offset, nbytes, scratch.address, name))
        return scratch

    def _flush(self, sums: Sums | None) -> None:
        """Reads what was asked for, and puts it into place."""
        wants, after = self._wants, self._after
        self._wants, self._after, self._scratch_bytes = [], [], 0
        keep = (after, self._wanted)
        nbytes = sum(want.nbytes for want in wants)
        if not self._verify:
            fetch(self._blob, wants, keep, self._etag)
        elif sums is not None:
            fetch_verified(self._blob, wants, sums, keep, self._etag)
            self._verified += nbytes
        else:
            for want, crc in zip(wants, fetch_digests(self._blob, wants, keep, self._etag), strict=True):
                self._read.append((want.offset, want.nbytes, crc))
        with torch.no_grad():
            for take in after:
                take()

    def _compare(self) -> None:
        """Verifies records of stock torch that were read from end to end; others count as unverified."""
        self._read = sorted(set(self._read))
        for wanted in self._wanted:
            record = self._records.pop(wanted.info.offset, None)
            if record is None:
                continue
            first, last = (
                bisect_left(self._read, (offset,)) for offset in (record.offset, record.offset + record.nbytes)
            )
            inside = self._read[first:last]
            whole, at = record.nbytes > 0, record.offset
            for offset, nbytes, _ in inside:
                whole, at = whole and offset == at, offset + nbytes
            nbytes = sum(read[1] for read in inside)
            if not whole or at != record.offset + record.nbytes:
                self._count(False, nbytes)
                continue
            if combined("crc32", ((crc, size) for _, size, crc in inside)) != record.crc:
                raise CorruptionError(
                    f"{self._blob.name}: {wanted.name} (bytes {record.offset} to {record.offset + record.nbytes}) "
                    "is not what was written: the CRC-32 differs. What was loaded so far is undefined"
                )
            self._count(True, nbytes)

    def _count(self, verified: bool, nbytes: int) -> None:
        if verified:
            self._verified += nbytes
        else:
            self._unverified += nbytes
