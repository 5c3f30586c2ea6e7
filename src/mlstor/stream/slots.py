"""What has to be known of the transfers under way."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlstor.stream.draws import U64
from mlstor.stream.mix import Kinds


class Slots:
    """What has to be known of a transfer when it is done; its tag is the number of its slot.

    Attributes
    ----------
    kind, epoch, index, offset, intended_ns : arrays
        By slot. `intended_ns` is 0 in a closed loop.
    """

    def __init__(self, capacity: int) -> None:
        self.kind: Kinds = np.zeros(capacity, np.uint8)
        self.epoch: npt.NDArray[np.uint32] = np.zeros(capacity, np.uint32)
        self.index: U64 = np.zeros(capacity, np.uint64)
        self.offset: U64 = np.zeros(capacity, np.uint64)
        self.intended_ns: U64 = np.zeros(capacity, np.uint64)
        self._free = np.arange(capacity, dtype=np.int64)
        self._left = capacity

    def take(self, count: int) -> npt.NDArray[np.int64]:
        """Slots that are free."""
        self._left -= count
        taken: npt.NDArray[np.int64] = self._free[self._left : self._left + count].copy()
        return taken

    def give_back(self, slots: npt.NDArray[np.int64]) -> None:
        """Slots whose transfer is done, and whose contents nobody needs."""
        self._free[self._left : self._left + len(slots)] = slots
        self._left += len(slots)

    @property
    def free(self) -> int:
        """How many are free."""
        return self._left
