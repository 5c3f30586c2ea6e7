"""Objects on their way to a consumer: read ahead into memory that is bounded, and handed on when their turn comes."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Kind, Memory, Op, zeros
from mlstor.stream.failures import failed
from mlstor.stream.slabs import ALIGN_BYTES, Slabs

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from mlstor.storage.transfers import Transfers
    from mlstor.stream.catalog import Objects, Packed

#: Small objects share a buffer of this size, so that each costs no allocation and no call of its own.
GROUP_BYTES = 4 << 20
_MOST_IN_GROUP = 1 << 12
_REAP = 256
_WAITING, _READY, _FAILED = range(3)


class Upcoming(NamedTuple):
    """Objects that one rank is to read next, in order."""

    epoch: int
    #: position in the epoch from which this rank's share was dealt
    base: int
    #: how many of that share come before these
    first: int
    indices: NDArray[np.uint64]
    packed: Packed

    def after(self, count: int) -> Upcoming:
        """Without the first `count`."""
        names, start, nbytes, sizes = self.packed
        rest = type(self.packed)(names, start[count:], nbytes[count:], sizes[count:])
        return self._replace(first=self.first + count, indices=self.indices[count:], packed=rest)


class Group:
    """Objects that are read into one buffer by one call."""

    def __init__(self, upcoming: Upcoming, count: int, places: list[int], memory: NDArray[np.uint8]) -> None:
        self.epoch, self.base, self.first = upcoming.epoch, upcoming.base, upcoming.first
        self.indices: list[int] = upcoming.indices[:count].tolist()
        self.sizes: list[int] = upcoming.packed.sizes[:count].tolist()
        self.places = places
        self.memory: Any = memory  # a buffer, which numpy's types don't say before Python 3.12
        self.state = bytearray(count)
        self.delivered = bytearray(count)
        self.prefix = 0  # all before it are delivered
        self.errors: dict[int, OSError] = {}


class Prefetch:
    """Reads that are under way or wait for the consumer, at most `limit_bytes` of them.

    Parameters
    ----------
    limit_bytes
        Of objects that were submitted and not taken. One object is read whatever its size.
    ordered
        Objects are taken in the order in which they were submitted, else as they arrive.

    Attributes
    ----------
    held_bytes : int
        Of memory for objects that were submitted and not taken.
    """

    def __init__(self, transfers: Transfers, objects: Objects, limit_bytes: int, ordered: bool) -> None:
        self._transfers = transfers
        self._objects = objects
        self._limit_bytes = limit_bytes
        self._group_bytes = min(GROUP_BYTES, max(limit_bytes // 8, ALIGN_BYTES))
        self._ordered = ordered
        self._slabs = Slabs()
        self._groups: deque[Group] = deque()
        self._by_number: dict[int, Group] = {}
        self._number = 0
        self._arrived: deque[tuple[Group, int]] = deque()
        self._done = zeros(_REAP, COMPLETION_DTYPE)
        self.held_bytes = 0

    @property
    def empty(self) -> bool:
        """Whether nothing is under way and nothing waits."""
        return not self._groups

    def submit(self, upcoming: Upcoming) -> int:
        """Begin to read the first of these objects; how many, 0 if there is no room now."""
        sizes = upcoming.packed.sizes[:_MOST_IN_GROUP]
        padded = np.maximum(-(-sizes.astype(np.int64) // ALIGN_BYTES), 1) * ALIGN_BYTES
        ends = np.cumsum(padded)
        wanted = max(int(ends[0]), min(self._group_bytes, int(ends[-1])))
        if self._groups and self.held_bytes + wanted > self._limit_bytes:
            return 0
        count = int(np.searchsorted(ends, wanted, side="right"))
        places = ends[:count] - padded[:count]
        room = int(ends[count - 1])
        memory = self._slabs.take(room, keep_bytes=max(self._limit_bytes - self.held_bytes, 0))
        group = Group(upcoming, count, places.tolist(), memory)
        asked = zeros(count, TRANSFER_DTYPE)
        asked["tag"] = np.arange(count) + (self._number * _MOST_IN_GROUP)
        asked["key_start"] = upcoming.packed.key_start[:count]
        asked["key_nbytes"] = upcoming.packed.key_nbytes[:count]
        asked["nbytes"] = WHOLE
        asked["object_nbytes"] = sizes[:count]
        asked["place"] = places
        asked["room"] = padded[:count]
        asked["op"] = Op.READ
        asked["memory"] = Memory.BUFFER
        self._transfers.submit(asked, upcoming.packed.names, group.memory)
        self._by_number[self._number] = group
        self._number += 1
        self._groups.append(group)
        self.held_bytes += room
        return count

    def take(self, settle: Callable[[int, int, int], None]) -> tuple[Group, int, memoryview] | None:
        """The next object and its memory, or None if it is not there yet.

        Parameters
        ----------
        settle
            Called with epoch, base and how many of the share have been delivered without a gap.

        Raises
        ------
        OSError
            If the next object could not be read. It stays the next one.
        """
        found = self._next()
        if found is None:
            return None
        group, at = found
        if group.state[at] == _FAILED:
            raise group.errors[at]
        if not self._ordered:
            self._arrived.popleft()
        group.delivered[at] = 1
        place, size = group.places[at], group.sizes[at]
        self.held_bytes -= max(-(-size // ALIGN_BYTES), 1) * ALIGN_BYTES
        # The memoryview of the whole leads back to the slab; numpy's own slices would not.
        data = memoryview(group.memory)[place : place + size]
        if 0 not in group.delivered:  # out of order it may stay behind a slow one, and need not keep its memory
            group.memory = None
        self._settle(settle)
        return group, at, data

    def _next(self) -> tuple[Group, int] | None:
        if not self._ordered:
            return self._arrived[0] if self._arrived else None
        if not self._groups:
            return None
        group = self._groups[0]
        return (group, group.prefix) if group.state[group.prefix] != _WAITING else None

    def _settle(self, settle: Callable[[int, int, int], None]) -> None:
        while self._groups:
            group = self._groups[0]
            gap = group.delivered.find(0, group.prefix)
            prefix = gap if gap >= 0 else len(group.delivered)
            if prefix > group.prefix:
                group.prefix = prefix
                settle(group.epoch, group.base, group.first + prefix)
            if gap >= 0:
                return
            self._groups.popleft()

    def reap(self) -> None:
        """Wait for one object at least, and note all that have arrived."""
        count = self._transfers.reap(self._done)
        done = self._done[:count]
        kinds = done["kind"]
        for at, tag in enumerate(done["tag"].tolist()):
            number, place = divmod(tag, _MOST_IN_GROUP)
            group = self._by_number[number]
            if kinds[at] == Kind.OK:
                group.state[place] = _READY
            else:
                group.state[place] = _FAILED
                group.errors[place] = failed(self._transfers, done[at], self._objects.name(group.indices[place]))
            if not self._ordered:
                self._arrived.append((group, place))
            if _WAITING not in group.state:
                del self._by_number[number]

    def abandon(self) -> None:
        """Call back what is under way, wait for what can't be, and forget all of it."""
        self._transfers.cancel()
        while self._transfers.outstanding:
            self._transfers.reap(self._done)
        self._transfers.failures()
        self._groups.clear()
        self._by_number.clear()
        self._arrived.clear()
        self.held_bytes = 0
