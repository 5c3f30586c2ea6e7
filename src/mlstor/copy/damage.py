"""Where a copy differs from what it is a copy of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from mlstor.storage.store import Store

_BLOCK_BYTES = 4096
_STEP_BYTES = 8 << 20


def differing(source: Store, destination: Store, key: str, nbytes: int) -> list[tuple[int, int, bool]]:
    """Offset, bytes and whether zeros lie there, of each block of 4 KiB that differs.

    Raises
    ------
    OSError
        If one of them can't be read any more.
    """
    found = []
    there = min(nbytes, destination.stat(key).nbytes)
    for offset in range(0, there, _STEP_BYTES):
        count = min(_STEP_BYTES, there - offset)
        wanted, got = (_bytes(store, key, offset, count) for store in (source, destination))
        differs = np.zeros(-(-count // _BLOCK_BYTES) * _BLOCK_BYTES, bool)
        differs[:count] = wanted != got
        for block in np.flatnonzero(differs.reshape(-1, _BLOCK_BYTES).any(axis=1)).tolist():
            at = block * _BLOCK_BYTES
            size = min(_BLOCK_BYTES, count - at)
            found.append((offset + at, size, not got[at : at + size].any()))
    return found


def _bytes(store: Store, key: str, offset: int, nbytes: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    data = store.read(key, None, offset, nbytes)
    assert isinstance(data, bytes)
    return np.frombuffer(data, np.uint8)
