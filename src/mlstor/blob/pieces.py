"""Arrays of pieces before they are used: checked, neighbours as one; and the digests of their groups."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mlstor.blob.types import DigestKind, LatePiece


def checked(pieces: NDArray[Any], name: str, nbytes: int | None = None, late: Sequence[LatePiece] = ()) -> NDArray[Any]:
    """The pieces that have bytes, in their order.

    Raises
    ------
    ValueError
        If pieces or late pieces overlap or lie beyond `nbytes`, or (where `nbytes` is given: a publication) a piece has
        no address.
    """
    import numpy as np

    from mlstor.blob.types import PIECE_DTYPE

    if pieces.dtype != np.dtype(PIECE_DTYPE):
        raise ValueError(f"{name}: pieces have the dtype {pieces.dtype}, not PIECE_DTYPE")
    pieces = pieces[pieces["nbytes"] != 0]
    starts = np.concatenate((pieces["offset"], np.array([piece.offset for piece in late if piece.nbytes], "<u8")))
    sizes = np.concatenate((pieces["nbytes"], np.array([piece.nbytes for piece in late if piece.nbytes], "<u8")))
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], (starts + sizes)[order]
    if (ends < starts).any() or (nbytes is not None and len(ends) and int(ends.max()) > nbytes):
        raise ValueError(f"{name}: a piece ends at {int(ends.max())}, beyond the end at {nbytes}")
    overlaps = np.flatnonzero(ends[:-1] > starts[1:])
    if len(overlaps):
        raise ValueError(f"{name}: pieces overlap at offset {int(starts[overlaps[0] + 1])}")
    if nbytes is not None and (pieces["address"] == 0).any():
        raise ValueError(f"{name}: a piece has no address")
    return pieces


def joined(pieces: NDArray[Any]) -> NDArray[Any]:
    """Those that follow one another in the array, in the blob and in memory, and have no digest, as one."""
    import numpy as np

    if not len(pieces):
        return pieces
    before, after = pieces[:-1], pieces[1:]
    apart = (before["group"] >= 0) | (after["group"] >= 0) | (before["offset"] + before["nbytes"] != after["offset"])
    dropped = (before["address"] == 0) & (after["address"] == 0)
    real = (before["address"] != 0) & (before["address"] + before["nbytes"] == after["address"])
    first = np.flatnonzero(np.concatenate(([True], apart | ~(dropped | real))))
    found = pieces[first]
    found["nbytes"] = np.add.reduceat(pieces["nbytes"], first)
    return found


def sums(pieces: NDArray[Any], kind: DigestKind) -> NDArray[Any]:
    """The digest of each piece of memory, as unsigned 64-bit numbers; 0 for those without a group."""
    import numpy as np

    from mlstor._io import crc_pieces

    values = np.zeros(len(pieces), "<u8")
    wanted = np.flatnonzero(pieces["group"] >= 0)
    if len(wanted):
        # numpy's types know fewer buffers than it makes
        out: Any = np.zeros(len(wanted), "<u8" if kind == "crc32+crc32c" else "<u4")
        addresses: Any = np.ascontiguousarray(pieces["address"][wanted])
        sizes: Any = np.ascontiguousarray(pieces["nbytes"][wanted])
        crc_pieces(kind, addresses, sizes, out)
        values[wanted] = out
    return values


def by_group(pieces: NDArray[Any], values: NDArray[Any], kind: DigestKind) -> dict[int, int]:
    """The digest of each group from those of its pieces, which follow one another in the order of the array."""
    import numpy as np

    from mlstor._io import crc_combine

    wanted = pieces["group"] >= 0
    groups, found = pieces["group"][wanted], values[wanted]
    if len(np.unique(groups)) == len(groups):
        return dict(zip(groups.tolist(), found.tolist(), strict=True))
    digests: dict[int, int] = {}
    for group, value, nbytes in zip(groups.tolist(), found.tolist(), pieces["nbytes"][wanted].tolist(), strict=True):
        digests[group] = crc_combine(kind, digests[group], value, nbytes) if group in digests else value
    return digests
