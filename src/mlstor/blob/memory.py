"""Memory that is known by its address: as a buffer, which holds its owner as long as anything holds the buffer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Owned:
    """What numpy makes an array of, and keeps as its base."""

    def __init__(self, address: int, nbytes: int, keep: object) -> None:
        self.keep = keep
        self.__array_interface__ = {"version": 3, "shape": (nbytes,), "typestr": "|u1", "data": (address, False)}


def view(address: int, nbytes: int, keep: object = None) -> memoryview:
    """A writable buffer of the bytes from `address` on, without a look at them; it and its slices hold `keep`."""
    if not nbytes:
        return memoryview(bytearray())
    import numpy as np

    owned: Any = np.asarray(_Owned(address, nbytes, keep))  # numpy's types know fewer buffers than it makes
    return memoryview(owned)


class Window:
    """One buffer from the least to the greatest address of some pieces; what lies between them is not touched.

    Parameters
    ----------
    pieces
        An array of `types.PIECE_DTYPE`; those at address 0 or without bytes don't count.
    keep
        Held as long as `buffer` or a slice of it.
    """

    def __init__(self, pieces: NDArray[Any], keep: object = None) -> None:
        real = pieces[(pieces["address"] != 0) & (pieces["nbytes"] != 0)]
        #: address of the buffer's first byte
        self.address = int(real["address"].min()) if len(real) else 0
        end = int((real["address"] + real["nbytes"]).max()) if len(real) else 0
        self.buffer = view(self.address, end - self.address, keep)

    def slice(self, address: int, nbytes: int) -> memoryview:
        """The buffer of bytes that lie in the window."""
        start = address - self.address
        return self.buffer[start : start + nbytes]
