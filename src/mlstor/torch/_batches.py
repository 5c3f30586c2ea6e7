"""Whole objects and parts of them, a batch at a time: all reads of a batch are under way at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import get_worker_info

from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Kind, Memory, Op, zeros
from mlstor.stream.failures import failed
from mlstor.stream.slabs import ALIGN_BYTES, Slabs
from mlstor.torch._worker import Place, in_flight_here

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor.stream.catalog import Objects, Packed

#: Of buffers that came back, kept for the next batches.
KEEP_BYTES = 64 << 20


class Batches:
    """Reads of one process, used by one thread at a time."""

    def __init__(self, place: Place, objects: Objects, in_flight: int | None) -> None:
        self._objects = objects
        self._store = place.open()
        workers = 0 if get_worker_info() is None else 1
        self._transfers = self._store.transfers(workers=workers, in_flight=in_flight_here(in_flight))
        self._slabs = Slabs()

    def whole(self, indices: Sequence[int]) -> list[memoryview]:
        """The bytes of these objects, in this order, in one buffer that lives as long as any of them.

        Raises
        ------
        IndexError
            If there is no such object.
        OSError
            If one can't be read, with errno and its key or URL: the first in the order of `indices`.
        """
        numbers = indices_of(indices, len(self._objects))
        packed = self._objects.pack(numbers)
        sizes = packed.sizes.astype(np.int64)
        room = np.maximum(-(-sizes // ALIGN_BYTES), 1) * ALIGN_BYTES
        ends = np.cumsum(room)
        memory: Any = self._slabs.take(int(ends[-1]), KEEP_BYTES)
        places = ends - room
        asked = _reads(packed, places)
        asked["nbytes"] = WHOLE
        asked["object_nbytes"] = packed.sizes
        asked["room"] = room
        self._carry_out(asked, packed, memory, numbers)
        view = memoryview(memory)
        return [view[place : place + size] for place, size in zip(places.tolist(), sizes.tolist(), strict=True)]

    def ranges(
        self, numbers: NDArray[np.uint64], packed: Packed, offsets: NDArray[np.uint64], nbytes: int, into: Any
    ) -> None:
        """`nbytes` of each object from its offset on, one behind the other at multiples of 4096 of `into`."""
        stride = -(-nbytes // ALIGN_BYTES) * ALIGN_BYTES
        asked = _reads(packed, np.arange(len(numbers), dtype=np.int64) * stride)
        asked["offset"] = offsets
        asked["nbytes"] = nbytes
        asked["object_nbytes"] = packed.sizes
        asked["room"] = stride
        self._carry_out(asked, packed, into, numbers)

    def _carry_out(self, asked: Any, packed: Packed, into: Any, numbers: NDArray[np.uint64]) -> None:
        count = len(asked)
        done = zeros(count, COMPLETION_DTYPE)
        self._transfers.submit(asked, packed.names, into)
        came = 0
        try:
            while came < count:
                came += self._transfers.reap(done[came:], count - came)
        except BaseException:
            self._abandon(done)
            raise
        bad = done[done["kind"] != Kind.OK]
        if len(bad):
            first = bad[bad["tag"].argmin()]
            error = failed(self._transfers, first, self._objects.name(int(numbers[int(first["tag"])])))
            self._transfers.failures()  # those of the others, which nobody will ask for
            raise error

    def _abandon(self, done: Any) -> None:
        """Wait for what can't be called back: the next batch begins with nothing under way."""
        self._transfers.cancel()
        while self._transfers.outstanding:
            self._transfers.reap(done)
        self._transfers.failures()


def _reads(packed: Packed, places: NDArray[np.int64]) -> Any:
    asked = zeros(len(places), TRANSFER_DTYPE)
    asked["tag"] = np.arange(len(places))
    asked["key_start"] = packed.key_start
    asked["key_nbytes"] = packed.key_nbytes
    asked["place"] = places
    asked["op"] = Op.READ
    asked["memory"] = Memory.BUFFER
    return asked


def indices_of(indices: Sequence[int], count: int) -> NDArray[np.uint64]:
    """Indices as numbers.

    Raises
    ------
    IndexError
        If one is below zero or not below `count`.
    TypeError
        If one is no whole number.
    """
    given = np.asarray(indices)
    if given.dtype.kind not in "iu":
        raise TypeError(f"samples are asked for by whole numbers, not by {indices!r}")
    numbers = given.astype(np.int64).reshape(-1)
    wrong = numbers[(numbers < 0) | (numbers >= count)]
    if len(wrong):
        raise IndexError(f"sample {int(wrong[0])} of {count}")
    return numbers.astype(np.uint64)
