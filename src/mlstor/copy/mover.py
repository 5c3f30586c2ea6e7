"""The loop of a copy: objects and parts of objects, from the source through bounded memory to the destination.

Memory is a row of slots, each as large as a part. A slot holds a part of a large object, or as many whole small ones
as it has room for. All of a slot is read, written and looked at again before it is used for others. Small objects go in
arrays, without a Python object for each.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlstor._io import AlignedBuffer
from mlstor.copy.calls import Calls
from mlstor.copy.large import Large, failed_row
from mlstor.copy.larges import Larges
from mlstor.copy.names import refusal
from mlstor.signals import raise_lost
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Digest, Failure, Kind, Memory, Op

if TYPE_CHECKING:
    from mlstor.copy.parts import Target
    from mlstor.copy.resume import Proven
    from mlstor.copy.tally import CopyTally
    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.catalog import Objects
    from mlstor.stream.draws import U64

#: Small objects in one slot at most: a tag is the number of the slot and that of the object in it.
PER_SLOT = 256
_BLOCK = 4096
_ROOM = np.uint64(_BLOCK)
_HAS_DIGEST, _COMPARED = 1, 2
#: Pauses between looks while nothing comes: short for what loopback answers, long for what takes its time.
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.0001, 0.004
#: Failures one after the other after which a side is taken to be gone.
MOST_FAILURES = 1000
#: Errors of the destination that all further objects would meet too.
_FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class End(NamedTuple):
    """One side, open. `digest` is that of whole objects, NONE if the store has none."""

    store: Store
    transfers: Transfers
    digest: Digest
    scheme: str


class How(NamedTuple):
    """How it is copied; `verify` is no, checksum or read."""

    verify: str
    part_bytes: int
    memory_bytes: int


class Mover:
    """Copies a process's share.

    Parameters
    ----------
    source, destination : End
    target : Target or None
        Makes large objects; None: the destination has no way to make one of parts.
    objects, todo
        All objects, and the numbers of those that are to be copied, ascending.
    how : How
    tally, proven, calls
        Count what came of it, note what has arrived, make blocking calls.
    tick : callable
        Called often.
    """

    def __init__(
        self,
        source: End,
        destination: End,
        target: Target | None,
        objects: Objects,
        todo: U64,
        how: How,
        tally: CopyTally,
        proven: Proven,
        calls: Calls,
        tick: Callable[[], None],
    ) -> None:
        self.source, self.destination, self.how = source, destination, how
        self.tally, self.proven, self.calls = tally, proven, calls
        self._objects, self._todo, self._tick = objects, todo, tick
        self._at = 0
        count = max(2, how.memory_bytes // how.part_bytes)
        # no more memory than the objects need
        sizes = objects.pack(todo).sizes
        small = np.minimum((sizes + _ROOM) // _ROOM * _ROOM, np.uint64(how.part_bytes)).sum() if len(todo) else 0
        large = int((sizes // np.uint64(how.part_bytes)).sum()) if len(todo) else 0
        self.slots = min(count, large + 2 * (int(small) // how.part_bytes + 1) + len(todo) // PER_SLOT + 1)
        self.memory = AlignedBuffer(self.slots * how.part_bytes)
        self._free = list(range(self.slots))[::-1]
        self._left = np.zeros(self.slots, np.int64)
        self._names: list[Any] = [b""] * self.slots
        capacity = self.slots * PER_SLOT
        self._items: Any = np.zeros(capacity, TRANSFER_DTYPE)
        self._index, self._version = np.zeros(capacity, np.uint64), np.zeros(capacity, np.uint64)
        self._wrote: Any = np.zeros(capacity, COMPLETION_DTYPE)
        self._out: Any = np.zeros(4096, COMPLETION_DTYPE)
        self.larges = Larges(self, target)
        self._pause_s = _FIRST_PAUSE_S
        self._stopping = False
        verifies = how.verify != "no"
        #: computed while an object is read; sent with it
        self.read_digest = (source.digest or destination.digest or Digest.CRC32C) if verifies else Digest.NONE
        self._write_digest = (destination.digest or self.read_digest) if verifies else Digest.NONE

    # ---- the loop ----

    def run(self) -> None:
        """All of `todo`.

        Raises
        ------
        OSError
            If the destination takes nothing any more, or nothing ends well.
        KeyboardInterrupt
            When interrupted; `stop` is to be called then, as after an error.
        """
        while True:
            self._begin()
            self._tick()
            raise_lost()
            if not (self.source.transfers.outstanding or self.destination.transfers.outstanding or self.calls.running):
                if self._at >= len(self._todo) and not self.larges.under_way:
                    return
                if not self._free:
                    raise AssertionError("slots are taken, and nothing is under way")
            self._collect()
            if self.tally.in_a_row >= MOST_FAILURES:
                last = self.tally.failures[-1]
                text = f"{self.tally.in_a_row} objects failed one after the other, the last ones with {last.fault}"
                raise OSError(errno.EIO, f"{text} ({last.message})" if last.message else text, last.url or None)

    def stop(self, wait_s: float) -> None:
        """Nothing more is begun, uploads are aborted; waits `wait_s` seconds at most for what is under way."""
        deadline = time.monotonic() + wait_s
        self._stopping = True
        self.source.transfers.cancel()
        self.destination.transfers.cancel()
        self.larges.abort_all()
        while time.monotonic() < deadline and (
            self.source.transfers.outstanding or self.destination.transfers.outstanding or not self.calls.idle
        ):
            self._collect()
        self.larges.abort_rest()

    def _collect(self) -> None:
        """Take what has ended on either side, and if there is nothing wait a little."""
        found = self._reap(self.source, 0.0, self._were_read) + self._reap(self.destination, 0.0, self._were_written)
        while self.calls.take():
            found += 1
        if found:
            self._pause_s = _FIRST_PAUSE_S
            return
        if self.destination.transfers.outstanding:
            self._reap(self.destination, self._pause_s, self._were_written)
        elif self.source.transfers.outstanding:
            self._reap(self.source, self._pause_s, self._were_read)
        elif self.calls.running:
            self.calls.take(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)

    def _reap(self, end: End, timeout_s: float, take: Callable[[Any, dict[int, Failure]], None]) -> int:
        transfers = end.transfers
        if not transfers.outstanding:
            return 0
        count = transfers.reap(self._out, 1, timeout_s)
        if count:
            rows = self._out[:count].copy()
            bad = (rows["kind"] != Kind.OK).any()
            said = {failure.tag: failure for failure in transfers.failures()} if bad else {}
            take(rows, said)
        return count

    # ---- what is begun ----

    def _begin(self) -> None:
        while self._free:
            slot = self._free[-1]
            if self.larges.next_part(slot):
                self._free.pop()
                continue
            if self._at >= len(self._todo):
                return
            if self._bundle(slot):
                self._free.pop()

    def _bundle(self, slot: int) -> bool:
        """Begin to read as many small objects as the slot has room for, or announce a large one."""
        indices = self._todo[self._at : self._at + PER_SLOT]
        packed = self._objects.pack(indices)
        sizes = packed.sizes
        if int(sizes[0]) > self.how.part_bytes:
            self._at += 1
            index = int(indices[0])
            name = self._objects.name(index)
            if self._may_be_named(index, name):
                self.larges.add(Large(index, name, int(sizes[0]), self.how.part_bytes, self.larges.target_for(name)))
            return False
        # also an empty one has room: a READ to its end needs a place
        room = np.maximum((sizes + _ROOM - np.uint64(1)) // _ROOM * _ROOM, _ROOM)
        fits = (np.cumsum(room) <= np.uint64(self.how.part_bytes)) & (sizes <= np.uint64(self.how.part_bytes))
        count = len(fits) if fits.all() else int(np.argmin(fits))
        self._at += count
        named = np.array(
            [self._may_be_named(int(index), self._objects.name(int(index))) for index in indices[:count]], bool
        )
        if not named.any():
            return False
        low, high = int(packed.key_start[0]), int(packed.key_start[count - 1]) + int(packed.key_nbytes[count - 1])
        items: Any = np.zeros(int(named.sum()), TRANSFER_DTYPE)
        tags = np.arange(len(items)) + slot * PER_SLOT
        items["tag"], items["op"], items["memory"] = tags, Op.READ, Memory.BUFFER
        items["key_start"] = packed.key_start[:count][named] - np.uint64(low)
        items["key_nbytes"] = packed.key_nbytes[:count][named]
        items["nbytes"], items["object_nbytes"] = WHOLE, sizes[:count][named]
        items["place"] = (np.cumsum(room) - room)[:count][named] + np.uint64(slot * self.how.part_bytes)
        items["room"] = room[:count][named]
        items["digest"] = self.read_digest
        self._names[slot] = packed.names[low:high]  # not copied: of far-apart objects it may be most of the catalog
        self._items[tags], self._index[tags] = items, indices[:count][named]
        self._left[slot] = len(items)
        self.source.transfers.submit(items, self._names[slot], self.memory)
        return True

    def _may_be_named(self, index: int, name: str) -> bool:
        text = refusal(name, self.destination.scheme)
        if not text:
            return True
        row = failed_row(Op.WRITE, Kind.SYSTEM, -errno.EINVAL, time.monotonic_ns())
        self.tally.fail("put", row, Failure(0, Kind.SYSTEM, 0, "", text), name)
        return False

    # ---- what has ended ----

    def _were_read(self, rows: Any, said: dict[int, Failure]) -> None:
        rows = self.larges.were_read(rows, said)
        well = rows["kind"] == Kind.OK
        for row in rows[~well]:
            self._failed("get", row, said, damaged=row["kind"] == Kind.CHECKSUM)
        rows = rows[well]
        self.tally.got(rows)
        tags = rows["tag"].astype(np.int64)
        if self._stopping:
            return
        self._items["digest_value"][tags] = rows["digest_value"]
        self._version[tags] = self.proven.versions(self.source.scheme, rows["etag"].tolist())
        self._items["nbytes"][tags] = self._items["object_nbytes"][tags]

        def write(items: Any) -> None:
            items["op"], items["object_nbytes"] = Op.WRITE, WHOLE
            items["digest"] = self._write_digest
            items["flags"] = _HAS_DIGEST if self._write_digest and self._write_digest == self.read_digest else 0
            without_bytes(items, items["nbytes"] == 0)

        self._hand_over(tags, write)

    def _hand_over(self, tags: Any, change: Callable[[Any], None]) -> None:
        """Give these items to the destination, slot by slot, for each has its own names."""
        for slot, mine in by_slot(tags):
            items = self._items[mine]
            change(items)
            self.destination.transfers.submit(items, self._names[slot], self.memory)

    def _were_written(self, rows: Any, said: dict[int, Failure]) -> None:
        rows = self.larges.were_written(rows, said)
        written = rows["op"] == Op.WRITE
        for row in rows[rows["kind"] != Kind.OK]:
            differs = row["kind"] in (Kind.CHECKSUM, Kind.LENGTH)
            # a server that refuses a write keeps what it had before
            if differs and (row["op"] != Op.WRITE or self.destination.scheme == "file"):
                self.spoilt(self._key(int(row["tag"])), int(self._items["nbytes"][int(row["tag"])]))
            self._failed("put", row, said, damaged=differs)
        self._check_written(rows[written & (rows["kind"] == Kind.OK)])
        self._arrived(rows[~written & (rows["kind"] == Kind.OK)])

    def _check_written(self, rows: Any) -> None:
        """Ask the destination what it has: the size, and its checksum or every byte."""
        if self._stopping:
            return
        tags = rows["tag"].astype(np.int64)
        self._wrote[tags] = rows
        reads = self.how.verify == "read"

        def look(items: Any) -> None:
            items["op"] = Op.READ if reads else Op.STAT
            items["memory"], items["place"], items["room"] = Memory.DROP, 0, 0
            items["object_nbytes"] = items["nbytes"]
            items["flags"] = 0 if self.how.verify == "no" else _HAS_DIGEST
            items["nbytes"] = WHOLE
            items["digest"] = self.read_digest if reads else self._write_digest
            if not reads and self._write_digest != self.read_digest:  # computed by who wrote it
                items["digest_value"] = self._wrote["digest_value"][items["tag"].astype(np.int64)]
            without_bytes(items, items["object_nbytes"] == 0)

        self._hand_over(tags, look)

    def _arrived(self, rows: Any) -> None:
        if not len(rows):
            return
        tags = rows["tag"].astype(np.int64)
        nbytes = self._items["nbytes"][tags]
        wrong = rows["object_nbytes"] != nbytes
        for row in rows[wrong]:  # a store that was not told what to expect
            row["kind"] = Kind.LENGTH
            self.spoilt(self._key(int(row["tag"])), int(self._items["nbytes"][int(row["tag"])]))
            self._failed("put", row, {}, damaged=True)
        rows, tags, nbytes = rows[~wrong], tags[~wrong], nbytes[~wrong]
        if not len(rows):
            return
        compared = (rows["flags"] & _COMPARED).astype(bool) | (self.how.verify == "read")
        wrote = self._wrote[tags]
        wrote["flags"] |= rows["flags"] & np.uint8(_COMPARED)
        self.tally.arrived(wrote, int(nbytes[compared].sum()), int(rows["end_ns"].max()))
        keys = [self._objects.name(int(index)) for index in self._index[tags]]
        self.proven.add(keys, nbytes, self._items["digest_value"][tags], self._version[tags])
        self._done(tags)

    def _failed(self, op: str, row: Any, said: dict[int, Failure], damaged: bool) -> None:
        tag = int(row["tag"])
        self.tally.fail(op, row, said.get(tag), self._key(tag), bool(damaged))
        self._done(np.array([tag]))
        self.fatal(op, row, said.get(tag), self._key(tag))

    def fatal(self, op: str, row: Any, failure: Failure | None, key: str) -> None:
        """Raise what no further object would escape: the destination is full, or takes no writes."""
        if op == "put" and not self._stopping and row["kind"] == Kind.SYSTEM and -int(row["result"]) in _FATAL:
            text = failure.message if failure is not None and failure.message else "the destination takes no more"
            raise OSError(-int(row["result"]), text, failure.url if failure is not None and failure.url else key)

    def _done(self, tags: Any) -> None:
        for slot, mine in by_slot(tags):
            self.release(slot, len(mine))

    def hold(self, slot: int) -> memoryview:
        """A slot's memory, for a part."""
        self._left[slot] = 1
        return memoryview(self.memory)[slot * self.how.part_bytes : (slot + 1) * self.how.part_bytes]

    def release(self, slot: int, count: int = 1) -> None:
        """So many of a slot's items have come to their end."""
        self._left[slot] -= count
        if not self._left[slot]:
            self._free.append(slot)

    def spoilt(self, key: str, nbytes: int) -> None:
        """What the destination has is not what was read: say where, and remove it, lest it is taken for good."""
        from mlstor.copy.damage import differing

        source, store = self.source.store, self.destination.store
        locates = self.how.verify == "read"

        def look_and_remove() -> list[tuple[int, int, bool]]:
            blocks = differing(source, store, key, nbytes) if locates else []
            store.delete([key])
            return blocks

        def note(answer: Any) -> None:
            if isinstance(answer, OSError):
                row = failed_row(Op.DELETE, Kind.SYSTEM, -(answer.errno or errno.EIO), time.monotonic_ns())
                text = f"the damaged copy could not be removed: {answer.strerror}"
                self.tally.note(row, Failure(0, Kind.SYSTEM, 0, str(answer.filename or ""), text), key)
            else:
                self.tally.locate(key, answer)

        self.calls.make(look_and_remove, note)

    def _key(self, tag: int) -> str:
        return self._objects.name(int(self._index[tag]))


def without_bytes(items: Any, empty: Any) -> None:
    """Of an object without bytes its size says all: no checksum is asked for."""
    items["digest"][empty] = Digest.NONE
    items["flags"][empty] = 0


def by_slot(tags: Any) -> Iterator[tuple[int, Any]]:
    """Slots, and which of these tags are of each."""
    if len(tags):
        slots = tags // PER_SLOT
        for slot in np.unique(slots).tolist():
            yield slot, tags[slots == slot]
