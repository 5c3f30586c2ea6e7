"""A blob as one sequence of bytes in memory, of which any stretch can be had: what parts of an object are made of."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlstor.blob.memory import Window
from mlstor.blob.pieces import by_group, sums
from mlstor.blob.types import make_pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor.blob.types import DigestKind, LatePiece

#: From that many bytes on digests are made by two threads: what is sent later is held up by them.
_THREADED_BYTES = 64 << 20
#: Larger pieces are summed in stretches, so that both threads end at about the same time.
_STRETCH_BYTES = 16 << 20


def split(pieces: NDArray[Any], most_bytes: int) -> NDArray[Any]:
    """Pieces of at most `most_bytes`, in order; those of one piece keep its group. Address 0 stays 0."""
    import numpy as np

    counts = (pieces["nbytes"] + np.uint64(most_bytes - 1)) // np.uint64(most_bytes)
    found = np.repeat(pieces, counts.astype("<i8"))
    firsts = np.repeat(np.cumsum(counts) - counts, counts.astype("<i8"))
    moved = (np.arange(len(found), dtype="<u8") - firsts) * np.uint64(most_bytes)
    found["offset"] += moved
    found["address"] += np.where(found["address"] == 0, np.uint64(0), moved)
    found["nbytes"] = np.minimum(found["nbytes"] - moved, np.uint64(most_bytes))
    return found


def group_digests(pieces: NDArray[Any], kind: DigestKind) -> dict[int, int]:
    """The digests of pieces that lie in memory, by group."""
    import numpy as np

    pieces = pieces[pieces["group"] >= 0]
    if int(pieces["nbytes"].sum()) < _THREADED_BYTES:
        return by_group(pieces, sums(pieces, kind), kind)
    from concurrent.futures import ThreadPoolExecutor

    pieces = split(pieces, _STRETCH_BYTES)
    with ThreadPoolExecutor(2, thread_name_prefix="mlstor-digest") as pool:
        halves = list(pool.map(lambda half: sums(half, kind), (pieces[0::2], pieces[1::2])))
    values = np.zeros(len(pieces), "<u8")
    values[0::2], values[1::2] = halves
    return by_group(pieces, values, kind)


def make_late(late: Sequence[LatePiece], digests: Mapping[int, int]) -> list[tuple[int, bytes]]:
    """Offset and bytes of each late piece.

    Raises
    ------
    ValueError
        If one makes more or fewer bytes than it said.
    """
    made = []
    for piece in late:
        data = bytes(piece.make(digests))
        if len(data) != piece.nbytes:
            raise ValueError(f"a late piece of {piece.nbytes} bytes was given {len(data)}")
        if data:
            made.append((piece.offset, data))
    return made


class Composition:
    """Pieces and late bytes in their places, zeros between them.

    Parameters
    ----------
    nbytes
        Of the whole.
    pieces
        As `pieces.checked` gives them.
    late
        Offsets and bytes.
    keep
        Held as long as what `straight` returned.
    """

    def __init__(self, nbytes: int, pieces: NDArray[Any], late: Sequence[tuple[int, bytes]], keep: object) -> None:
        import numpy as np

        self.nbytes = nbytes
        rows = [(offset, len(data), np.frombuffer(data, "u1").ctypes.data, -1) for offset, data in late]
        found = np.concatenate((pieces, make_pieces(rows))) if rows else pieces
        self._pieces = found[np.argsort(found["offset"], kind="stable")]
        self._ends = self._pieces["offset"] + self._pieces["nbytes"]
        self._window = Window(self._pieces, (keep, late))

    def straight(self, offset: int, nbytes: int) -> memoryview | None:
        """That stretch as it lies in memory; None if it is not all in one piece."""
        import numpy as np

        at = int(np.searchsorted(self._ends, offset, "right"))
        if at == len(self._ends):
            return None
        start, _, address, _ = self._pieces[at].tolist()
        if start > offset or int(self._ends[at]) < offset + nbytes or not nbytes:
            return None
        return self._window.slice(address + offset - start, nbytes)

    def gather(self, offset: int, nbytes: int, address: int) -> None:
        """Copy that stretch to `address`."""
        import numpy as np

        end = offset + nbytes
        first = int(np.searchsorted(self._ends, offset, "right"))
        last = int(np.searchsorted(self._pieces["offset"], end, "left"))
        at = offset
        for start, size, source, _ in self._pieces[first:last].tolist():
            begin, stop = max(start, at), min(start + size, end)
            ctypes.memset(address + at - offset, 0, begin - at)
            ctypes.memmove(address + begin - offset, source + begin - start, stop - begin)
            at = stop
        ctypes.memset(address + at - offset, 0, end - at)
