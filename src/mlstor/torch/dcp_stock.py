"""Items of data files without sums, as stock torch writes them: each a zip that tells where its bytes lie."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from mlstor._io import AlignedBuffer, crc32
from mlstor.blob.types import Blob, make_pieces
from mlstor.errors import CorruptionError
from mlstor.formats.zip_directory import Directory, header_nbytes, kind_of, local_offset, read_directory
from mlstor.torch.dcp_layout import plain_pickle

#: Read from both ends of an item: the first records, the directory. What lies elsewhere is read on its own.
_END_BYTES = 4096


class Stored(NamedTuple):
    """An item of a data file, by ``.metadata``."""

    offset: int
    nbytes: int
    dtype: torch.dtype
    shape: torch.Size
    name: str


class Record(NamedTuple):
    """A tensor's elements in row-major order."""

    #: in the data file
    offset: int
    nbytes: int
    #: CRC-32; None if the file holds none
    crc: int | None


def find_records(blob: Blob, items: Sequence[Stored], etag: str = "") -> list[Record | None]:
    """Where the tensors' elements lie; None for an item that only torch can unpickle. `etag` as in `Blob.fetch`.

    Raises
    ------
    CorruptionError
        If a zip is damaged.
    """
    sizes = [min(item.nbytes, 2 * _END_BYTES) for item in items]
    buffer = AlignedBuffer(max(sum(sizes), 1))
    rows: list[tuple[int, int, int, int]] = []
    place = 0
    for item, size in zip(items, sizes, strict=True):
        head = size - size // 2
        rows.append((item.offset, head, buffer.address + place, -1))
        rows.append((item.offset + item.nbytes - size // 2, size // 2, buffer.address + place + head, -1))
        place += size
    blob.fetch(make_pieces(rows), keep=buffer, etag=etag)
    found: list[Record | None] = []
    memory, place = memoryview(buffer), 0
    for item, size in zip(items, sizes, strict=True):
        found.append(_record(_Slice(blob, item, bytes(memory[place : place + size])), item))
        place += size
    return found


class _Slice:
    """An item of which both ends are here."""

    def __init__(self, blob: Blob, item: Stored, ends: bytes) -> None:
        self.name = f"{blob.name}: {item.name}"
        self._blob = blob
        self._item = item
        self._ends = ends
        self._head = len(ends) - len(ends) // 2
        self._tail_offset = item.nbytes - len(ends) // 2

    def read(self, offset: int, nbytes: int) -> bytes:
        if offset >= self._tail_offset:
            start = offset - self._tail_offset + self._head
            return self._ends[start : start + nbytes]
        if offset + nbytes <= self._head:
            return self._ends[offset : offset + nbytes]
        return self._blob.read(self._item.offset + offset, nbytes)

    def guess(self, offset: int, nbytes: int) -> bytes:
        """As `read`, with zeros for what is not here: what is asked for from the end is mostly too much."""
        if offset + nbytes == self._item.nbytes and offset < self._tail_offset:
            tail = self._ends[self._head :]
            return bytes(nbytes - len(tail)) + tail
        return self.read(offset, nbytes)


def _record(item: _Slice, stored: Stored) -> Record | None:
    try:
        directory = read_directory(item.guess, stored.nbytes, item.name)
    except CorruptionError:  # perhaps of the zeros: an item of many records
        directory = read_directory(item.read, stored.nbytes, item.name)
    expected = plain_pickle(stored.dtype, tuple(stored.shape))
    nbytes = stored.shape.numel() * stored.dtype.itemsize
    entries = directory.entries
    if "data/0" not in entries or "data.pkl" not in entries or entries["data/0"].nbytes != nbytes:
        return None
    if _content(item.read, directory, "data.pkl", item.name) != expected:
        return None
    if "byteorder" in entries and _content(item.read, directory, "byteorder", item.name) != b"little":
        return None
    entry = entries["data/0"]
    head = item.read(entry.header_offset, header_nbytes(entry, directory.stem))
    offset = stored.offset + local_offset(entry, directory.stem, head, item.name)
    return Record(offset, nbytes, entry.crc if directory.has_crc else None)


def _content(read: Callable[[int, int], bytes], directory: Directory, record: str, name: str) -> bytes:
    entry = directory.entries[record]
    head = read(entry.header_offset, header_nbytes(entry, directory.stem))
    return read(local_offset(entry, directory.stem, head, name), entry.nbytes)


def check_item(content: memoryview, name: str) -> bool:
    """Verify a whole item by the CRC-32s in it; False if it holds none.

    Raises
    ------
    CorruptionError
        If a record is not what was written.
    """
    if kind_of(bytes(content[:512])) != "zip":
        return False
    directory = read_directory(lambda offset, nbytes: bytes(content[offset : offset + nbytes]), len(content), name)
    if not directory.has_crc:
        return False
    for record, entry in directory.entries.items():
        offset = local_offset(entry, directory.stem, content[entry.header_offset :], name)
        if crc32(content[offset : offset + entry.nbytes]) != entry.crc:
            raise CorruptionError(f"{name}: the record {record} is not what was written: the CRC-32 differs")
    return True


def untransformed(content: memoryview, transforms: Sequence[str], request: Any) -> memoryview:
    """A verified item before torch's extensions had a hand in it."""
    from torch.distributed.checkpoint.filesystem import _StorageReaderTransforms

    stream: Any = io.BytesIO(content)
    return memoryview(_StorageReaderTransforms().transform_load_stream(request, transforms, stream).read(-1))


def unpickled(content: memoryview, request: Any) -> torch.Tensor:
    """The tensor of a verified item, as stock torch reads it."""
    tensor = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor):
        raise CorruptionError(f"the item of {request.storage_index.fqn!r} holds {type(tensor).__name__}, no tensor")
    return tensor
