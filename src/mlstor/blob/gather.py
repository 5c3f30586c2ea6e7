"""Many small pieces by few large reads: what lies close together is read at once, and then given to each piece."""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

from mlstor.blob.pieces import sums

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from mlstor._io import AlignedBuffer
    from mlstor.blob.types import DigestKind

#: A piece of that size is read straight to its place: a copy would cost more than a transfer.
STRAIGHT_BYTES = 256 << 10
_ALIGN_BYTES = 4096


class Batch:
    """Stretches of a blob that lie in one scratch buffer, and the small pieces in them.

    Attributes
    ----------
    runs : list of (offset, nbytes, place)
        What is to be read, bytes, and where in the scratch buffer.
    nbytes : int
        Of the scratch buffer.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int, int]] = []
        self.nbytes = 0
        self._spans: list[tuple[int, int]] = []

    def add(self, offset: int, nbytes: int, first: int, last: int) -> None:
        """One more stretch, with the small pieces number `first` to before `last`, counted by offset."""
        self.runs.append((offset, nbytes, self.nbytes))
        self._spans.append((first, last))
        self.nbytes += -(-nbytes // _ALIGN_BYTES) * _ALIGN_BYTES

    def scratch(self) -> AlignedBuffer:
        """Memory for it."""
        from mlstor._io import AlignedBuffer

        return AlignedBuffer(self.nbytes)

    def scatter(self, small: Small, scratch: AlignedBuffer, kind: DigestKind, values: NDArray[Any]) -> None:
        """Give the pieces what was read; their digests go into `values`, by their numbers in the caller's array."""
        import numpy as np

        first, last = self._spans[0][0], self._spans[-1][1]  # runs of a batch follow one another
        found = small.pieces[first:last].copy()
        sizes = np.array([end - begin for begin, end in self._spans])
        moves = np.array([place - offset for offset, _, place in self.runs], "<i8").view("<u8")
        sources = found["offset"] + np.repeat(moves, sizes) + np.uint64(scratch.address)
        rows = zip(found["address"].tolist(), sources.tolist(), found["nbytes"].tolist(), strict=True)
        for address, source, nbytes in rows:
            if address:
                ctypes.memmove(address, source, nbytes)
        found["address"] = sources
        values[small.numbers[first:last]] = sums(found, kind)


class Small:
    """Pieces that are not read straight to their places, by offset.

    Parameters
    ----------
    pieces
    which
        True for them.

    Attributes
    ----------
    numbers : array of int
        Where they are in the caller's array.
    """

    def __init__(self, pieces: NDArray[Any], which: NDArray[Any]) -> None:
        import numpy as np

        numbers = np.flatnonzero(which)
        self.numbers = numbers[np.argsort(pieces["offset"][numbers], kind="stable")]
        self.pieces = pieces[self.numbers]

    def batches(
        self, blob_nbytes: int, *, gap_bytes: int, run_bytes: int, batch_bytes: int, align: bool
    ) -> Iterator[Batch]:
        """How they are read.

        Parameters
        ----------
        blob_nbytes
            Nothing is read beyond it that a piece doesn't ask for.
        gap_bytes
            Pieces at most so far apart are read together; below `STRAIGHT_BYTES`, so that no large piece lies between.
        run_bytes
            Of one read at most.
        batch_bytes
            Of one scratch buffer at most, but for a run that is larger.
        align
            Whole blocks of 4 KiB are read, so that direct I/O needs no other buffer. Then no two runs of a batch touch.
        """
        import numpy as np

        if not len(self.pieces):
            return
        starts, ends = self.pieces["offset"], self.pieces["offset"] + self.pieces["nbytes"]
        breaks = np.flatnonzero(starts[1:] - ends[:-1] > gap_bytes) + 1
        edges = [0, *breaks.tolist(), len(starts)]
        batch = Batch()
        for first, end in itertools.pairwise(edges):
            while first < end:
                offset = int(starts[first])
                offset -= offset % _ALIGN_BYTES if align else 0
                last = first + int(np.searchsorted(ends[first:end], offset + run_bytes, "right"))
                last = max(last, first + 1)
                stop = int(ends[last - 1])
                if align:
                    stop = max(stop, min(-(-stop // _ALIGN_BYTES) * _ALIGN_BYTES, blob_nbytes))
                touches = align and last < end
                if batch.runs and batch.nbytes + stop - offset > batch_bytes:
                    yield batch
                    batch = Batch()
                batch.add(offset, stop - offset, first, last)
                if touches:
                    yield batch
                    batch = Batch()
                first = last
        if batch.runs:
            yield batch
