"""Memory for objects that are handed to a consumer, and that comes back when the last reference to it is gone."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor._io import AlignedBuffer

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Destinations begin and end at multiples of this, so that direct I/O needs no copy.
ALIGN_BYTES = 4096
_STEP_BYTES = 1 << 20


class Slabs:
    """A free list of aligned buffers.

    Buffers are ordinary memory: a child of `fork` may look at them, unlike at an engine's staging memory.

    Attributes
    ----------
    free_bytes : int
        On the free list.
    """

    def __init__(self) -> None:
        self._free: list[AlignedBuffer] = []
        self.free_bytes = 0
        self._lent: dict[int, tuple[weakref.ref[Any], AlignedBuffer]] = {}
        # A last reference may go in any thread, and in a garbage collection amidst `take`: those come back by an
        # append, which is atomic, and are sorted in later.
        self._returned: deque[AlignedBuffer] = deque()

    def take(self, nbytes: int, keep_bytes: int) -> NDArray[np.uint8]:
        """Memory of at least `nbytes`; it comes back when this array and all buffers made of it are gone.

        Make parts of it by slicing its `memoryview`: numpy's own slices refer past it to the memory. Of the free
        memory at most `keep_bytes` are kept, for this one and later ones.
        """
        self._sort_in(keep_bytes)
        memory = self._best(nbytes)
        if memory is None:
            # in steps, so that objects of about one size can follow one another
            step = _STEP_BYTES if nbytes > _STEP_BYTES else ALIGN_BYTES
            memory = AlignedBuffer(-(-nbytes // step) * step)
        lent: NDArray[np.uint8] = np.frombuffer(memoryview(memory), np.uint8)
        reference = weakref.ref(lent, self._back)
        self._lent[id(reference)] = (reference, memory)
        return lent

    def _best(self, nbytes: int) -> AlignedBuffer | None:
        fitting = [memory for memory in self._free if nbytes <= memory.nbytes <= 2 * max(nbytes, _STEP_BYTES)]
        if not fitting:
            return None
        best = min(fitting, key=lambda memory: memory.nbytes)
        self._free.remove(best)
        self.free_bytes -= best.nbytes
        return best

    def _back(self, reference: weakref.ref[Any]) -> None:
        entry = self._lent.pop(id(reference), None)
        if entry is not None:
            self._returned.append(entry[1])

    def _sort_in(self, keep_bytes: int) -> None:
        while self._returned:
            memory = self._returned.popleft()
            self._free.append(memory)
            self.free_bytes += memory.nbytes
        while self.free_bytes > keep_bytes:
            self.free_bytes -= self._free.pop(0).nbytes  # the one that was free longest: of a size no longer used

    @property
    def lent(self) -> int:
        """How many buffers are out."""
        return len(self._lent)
