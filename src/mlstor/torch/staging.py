"""A state in an arena, in the layout of its file: position and offset agree, so it is written without another copy."""

from __future__ import annotations

import threading
import zlib
from typing import TYPE_CHECKING, NamedTuple

from mlstor._io import crc_pieces
from mlstor.blob.types import make_pieces
from mlstor.formats.zip_layout import Layout, Record, directory, header, lay_out, serialization_id

if TYPE_CHECKING:
    from mlstor.blob.types import Blob, Published
    from mlstor.torch.arena import Arena, Lease
    from mlstor.torch.pickling import Described

#: From here on a record is read back straight into a tensor, if its offset is congruent with the tensor's memory.
_LARGE_BYTES = 1 << 20
#: Large blocks of torch's CPU allocator start 64 bytes into a page (glibc's header before them, rounded up to 64).
_FRESH_RESIDUE = 64


class Staged(NamedTuple):
    """A state that was copied: later changes of its tensors don't reach it."""

    stem: str
    layout: Layout
    lease: Lease

    def seal(self) -> None:
        """Fill in what depends on the bytes: local headers with their CRC-32s, and the directory."""
        import numpy as np

        *records, identity = self.layout.placed
        sums = np.zeros(len(records), np.uint32)
        addresses = np.array([self.lease.address + record.offset for record in records], np.uint64)
        sizes = np.array([record.nbytes for record in records], np.uint64)
        crc_pieces("crc32", addresses.data, sizes.data, sums.data)
        crcs: list[int] = sums.tolist()
        digits = serialization_id([record.name for record in records], crcs)
        self._put(identity.offset, digits)
        crcs.append(zlib.crc32(digits))
        for record, crc in zip(self.layout.placed, crcs, strict=True):
            self._put(record.header_offset, header(self.stem, record, crc))
        self._put(self.layout.directory_offset, directory(self.stem, self.layout, crcs))

    def _put(self, position: int, data: bytes) -> None:
        self.lease.view[position : position + len(data)] = data

    def publish(self, blob: Blob, *, max_bandwidth: int = 0, cancel: threading.Event | None = None) -> Published:
        """Seal it and write it; `max_bandwidth` in bytes per second, 0 for no limit."""
        self.seal()
        nbytes = self.layout.nbytes
        pieces = make_pieces([(0, nbytes, self.lease.address, -1)])
        return blob.publish(nbytes, pieces, keep=self.lease.memory, max_bandwidth=max_bandwidth, cancel=cancel)


def stage(described: Described, stem: str, arena: Arena, *, wait: bool = True) -> Staged:
    """Copy a state to an arena. The tensors may change as soon as this returns; release the lease when it is written.

    Parameters
    ----------
    described
        From `pickling.describe`.
    stem
        The archive's name.
    wait
        Until the arena is free, or raise BusyError.

    Raises
    ------
    BusyError, UsageError, MemoryError
        As `Arena.lease`.
    """
    sizes = [(f"data/{key}", storage.nbytes()) for key, storage in described.storages]
    layout = lay_out(
        stem,
        [
            Record("data.pkl", len(described.pickle)),
            Record("byteorder", 6),
            *(Record(name, nbytes, _FRESH_RESIDUE if nbytes >= _LARGE_BYTES else -1) for name, nbytes in sizes),
            Record("version", 2),
            Record(".data/serialization_id", 40),
        ],
    )
    staged = Staged(stem, layout, arena.lease(layout.nbytes, wait=wait))
    try:
        pickled, byteorder, *storages, version, _ = layout.placed
        staged._put(pickled.offset, described.pickle)
        staged._put(byteorder.offset, b"little")
        staged._put(version.offset, b"3\n")
        staged.lease.stage(
            [(placed.offset, storage) for placed, (_, storage) in zip(storages, described.storages, strict=True)]
        )
    except BaseException:
        staged.lease.release()
        raise
    return staged
