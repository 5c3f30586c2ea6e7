"""`TokenDataset`: records of token files as samples, as ``mlstor stream --pattern tokens`` reads them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mlstor._io import AlignedBuffer, Engine, open_range_set
from mlstor.errors import UsageError
from mlstor.operations import DONE_DTYPE, RANGE_DTYPE
from mlstor.storage.posix import PosixStore
from mlstor.stream.handles import most_files_open
from mlstor.stream.token_records import TokenRecords
from mlstor.stream.tokens import RECORD_NBYTES
from mlstor.torch._batches import Batches, indices_of
from mlstor.torch._worker import PerProcess, Place, in_flight_here, objects_of
from mlstor.torch.dataset import transformed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor.storage.store import Store
    from mlstor.stream.catalog import Objects

_ALIGN_BYTES = 4096
_SLOT_NBYTES = 64 << 10  # of the engine's staging: records are small
_MOST_HANDLES = 512  # half of the usual RLIMIT_NOFILE of 1024
_DTYPES = ("uint8", "int16", "uint16", "int32", "uint32", "int64")


class TokenDataset(Dataset[Any]):
    """Records of files of raw tokens, as tensors: every whole record of every file, in the order of the files' names.

    What is left at a file's end is dropped. Files of a directory stay open (up to 512 of them); of objects the records'
    ranges are read. A DataLoader fetches a batch by `__getitems__`: all its records are under way at once.

    Parameters
    ----------
    source : str, path or Store
        A directory, ``s3://BUCKET/PREFIX`` or ``ais://BUCKET/PREFIX``; or a store that was opened already.
    transform : callable, optional
        Makes a sample of a record's tensor, in the worker.
    record_nbytes : int
        4096 by default: 2048 tokens of 16 bits.
    dtype : str
        Of the tokens in the files, little-endian: uint8, int16, uint16, int32, uint32 or int64; uint16 by default.
    raw : bool
        Tensors keep that type. False: they are int64, which is what an embedding takes.
    catalog, prefix, options, in_flight
        As of `ObjectDataset`.

    Attributes
    ----------
    objects : Catalog or Synthetic
        The files' names and sizes.
    digest : str
        Of them and the records' size.
    url : str

    Raises
    ------
    UsageError
        If no file holds a record, or an option is not understood.
    OSError
        As of `ObjectDataset`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | Store,
        transform: Callable[[torch.Tensor], Any] | None = None,
        *,
        record_nbytes: int = RECORD_NBYTES,
        dtype: str = "uint16",
        raw: bool = False,
        catalog: Objects | str | os.PathLike[str] | None = None,
        prefix: str = "",
        options: Mapping[str, Any] | None = None,
        in_flight: int | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown; choose from {', '.join(_DTYPES)}")
        if record_nbytes < 1 or record_nbytes % np.dtype(dtype).itemsize:
            raise UsageError(f"record_nbytes={record_nbytes} is no number of whole tokens of {dtype}")
        if in_flight is not None and in_flight < 1:
            raise UsageError(f"in_flight={in_flight} has to be above zero")
        place = Place(source, options)
        self.transform = transform
        self.record_nbytes, self.dtype, self.raw = record_nbytes, dtype, raw
        self.objects, self.url = objects_of(self, place, catalog, prefix)
        self._count = TokenRecords(self.objects, record_nbytes).units
        self.digest = f"{self.objects.digest} {record_nbytes}"
        self._records = PerProcess(partial(_Records, place, self.objects, record_nbytes, in_flight))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        """One record; a loop over single ones waits for each of them."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The records of a batch, in this order."""
        if not len(indices):
            return []
        units = indices_of(indices, self._count)
        with self._records as records:
            read = records.read(units)[:, : self.record_nbytes].view(np.dtype(self.dtype).newbyteorder("<"))
            # a copy in either case: the buffer is read into again for the next batch
            tokens = torch.from_numpy(read.astype(self.dtype if self.raw else "int64"))
        rows = list(tokens.unbind(0))
        if self.transform is None:
            return rows
        return [
            transformed(self.transform, row, f"record {unit}") for unit, row in zip(units.tolist(), rows, strict=True)
        ]


class _Records:
    """Reads of records of one process."""

    def __init__(self, place: Place, objects: Objects, nbytes: int, in_flight: int | None) -> None:
        self._records = TokenRecords(objects, nbytes)
        self._nbytes = nbytes
        self._stride = -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self._buffer: AlignedBuffer | None = None
        store = place.open()
        self._read: _Files | Batches
        if isinstance(store, PosixStore):
            self._read = _Files(store.path, objects, self._stride, in_flight_here(in_flight))
            place.close(store)
        else:
            place.close(store)
            self._read = Batches(place, objects, in_flight)

    def read(self, units: NDArray[np.uint64]) -> Any:
        """The records, a row of `_stride` bytes each, in memory that the next call reads into again."""
        index, packed, offsets, _ = self._records.pick(units)
        needed = len(units) * self._stride
        if self._buffer is None or self._buffer.nbytes < needed:
            self._buffer = AlignedBuffer(needed)
        self._read.ranges(index, packed, offsets, self._nbytes, self._buffer)
        return np.frombuffer(memoryview(self._buffer)[:needed], np.uint8).reshape(len(units), self._stride)


class _Files:
    """Ranges of files that stay open; the same call as `Batches.ranges`."""

    def __init__(self, root: str, objects: Objects, stride: int, in_flight: int) -> None:
        self._paths = [os.path.join(root, objects.name(index)) for index in range(len(objects))]
        self._engine = Engine(workers=1, depth=in_flight, block_bytes=max(_SLOT_NBYTES, stride))
        self._most_open = most_files_open(_MOST_HANDLES, 0)
        if len(self._paths) > self._most_open:  # then reads under way have files open beside those that are kept
            self._most_open = most_files_open(_MOST_HANDLES, in_flight)
        self._set = open_range_set(self._engine, self._paths, self._most_open)
        self._stride = stride

    def ranges(self, files: NDArray[np.uint64], _: Any, offsets: NDArray[np.uint64], nbytes: int, into: Any) -> None:
        count = len(files)
        asked: Any = np.zeros(count, RANGE_DTYPE)
        asked["tag"] = np.arange(count)
        asked["offset"] = offsets
        asked["nbytes"] = nbytes
        asked["dest"] = np.arange(count) * self._stride
        numbers: Any = files.astype(np.uint32)
        if len(self._paths) > self._most_open:  # those of one file together: it is opened once for them
            order = np.argsort(numbers, kind="stable")
            asked, numbers = asked[order], np.ascontiguousarray(numbers[order])
        done: Any = np.zeros(count, DONE_DTYPE)
        self._set.submit(asked, numbers, into)
        came = 0
        try:
            while came < count:
                came += self._set.reap(done[came:], count - came)
        except BaseException:
            self._set.cancel()
            while self._set.outstanding:
                self._set.reap(done)
            raise
        bad = done[done["result"] != nbytes]
        if len(bad):
            first = bad[bad["tag"].argmin()]
            result, path = int(first["result"]), self._paths[int(files[int(first["tag"])])]
            if result >= 0:
                raise OSError(errno.ENODATA, "the file ended before its length: list again if it was replaced", path)
            raise OSError(-result, os.strerror(-result), path)
