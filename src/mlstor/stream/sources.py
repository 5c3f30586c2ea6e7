"""Where the names of operations come from that are no reads: new objects, and those of a catalog over and over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlstor.stream.draws import U64

if TYPE_CHECKING:
    from mlstor.stream.catalog import Objects
    from mlstor.stream.order import Order


class Writes:
    """The objects that this rank writes: numbers rank, rank + size, ...; and which of them are there."""

    def __init__(self, objects: Objects, rank: int, size: int) -> None:
        self.objects, self.rank, self.size = objects, rank, size
        #: own objects begun, whatever became of them
        self.begun = 0
        #: own objects, from the first on, of which every one was written
        self.whole = 0
        self._ahead: set[int] = set()
        self._there = np.zeros(0, np.uint64)

    @property
    def deletable(self) -> int:
        """Objects that were written and not yet given to a deletion."""
        return len(self._there)

    def peek(self, count: int) -> U64:
        """Numbers of the next objects."""
        own = np.arange(self.begun, self.begun + count, dtype=np.uint64)
        numbers: U64 = np.uint64(self.rank) + own * np.uint64(self.size)
        return numbers

    def wrote(self, indices: U64, keep: bool) -> None:
        """Objects that are complete now; with `keep` deletions may have them."""
        if keep:
            self._there = np.concatenate([self._there, indices])
        self._ahead.update(((indices - np.uint64(self.rank)) // np.uint64(self.size)).tolist())
        while self.whole in self._ahead:
            self._ahead.remove(self.whole)
            self.whole += 1

    def take_deletable(self, count: int) -> U64:
        """The oldest ones, for deletion."""
        taken, self._there = self._there[:count], self._there[count:]
        return taken


class Heads:
    """Objects for operations that are no reads: in an order of their own, over and over, or `once`.

    Parameters
    ----------
    order
        Of all objects.
    rank, size
        This rank takes every `size`-th.
    """

    def __init__(self, objects: Objects, order: Order, rank: int, size: int, once: bool = False) -> None:
        self.objects, self._order = objects, order
        self._count = len(range(rank, order.n, size))
        self._rank, self._size, self._once = rank, size, once
        self._done = 0

    @property
    def left(self) -> int:
        """How many there still are, where each comes once."""
        return self._count - self._done if self._once else 2**62

    def take(self, count: int) -> U64:
        """The next ones."""
        per_epoch = max(1, self._count)
        rank = self._rank if self._count else 0  # fewer objects than ranks: all ask for the same few
        found: list[U64] = []
        while count > 0:
            epoch, at = divmod(self._done, per_epoch)
            now = min(count, per_epoch - at)
            found.append(self._order.indices(epoch, rank + at * self._size, self._size, now))
            self._done += now
            count -= now
        return np.concatenate(found) if found else np.zeros(0, np.uint64)
