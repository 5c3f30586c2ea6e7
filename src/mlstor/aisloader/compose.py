"""What aisloader's options add to a stream's operations: updates, parts, parallel ranges, archives, limits of PUTs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlstor._io import Pattern
from mlstor.aisloader.batches import MEMBER
from mlstor.storage.transfers import IN_PARTS, TRANSFER_DTYPE, Digest, Memory, Op
from mlstor.stream.catalog import Packed
from mlstor.stream.compose import Batch, Composer, gathered
from mlstor.stream.draws import U64
from mlstor.stream.mix import Kind
from mlstor.stream.slots import Slots

if TYPE_CHECKING:
    from mlstor.aisloader.names import Names
    from mlstor.aisloader.shards import Shards

#: Parts of a body that is made of a pattern begin at multiples of this.
ALIGN_BYTES = 4096
_LATEST = b"latest-ver=true"


@dataclass
class PutLimits:
    """What this process may still write; None: no limit."""

    count: int | None = None
    nbytes: int | None = None


@dataclass
class Extras:
    """What is done beside a stream's own operations. Percentages are of GETs or PUTs; each has a generator of its own.

    Attributes
    ----------
    run_key : int
        Of the bytes that are written.
    parts : int
        Of a PUT in parts; range_bytes of a GET in ranges.
    batched, archives : bool
        Reads are batches, see `batches.BatchedReads`; names may be those of files in archives, see `lists`.
    """

    run_key: int
    limits: PutLimits
    names: Names | None
    draws: dict[str, np.random.Generator]
    update_percent: int = 0
    parts: int = 0
    parts_percent: int = 0
    parallel_percent: int = 0
    range_bytes: int = 0
    batched: bool = False
    archives: bool = False
    latest: bool = False
    shards: Shards | None = None
    put_digest: Digest = Digest.NONE
    #: transfers that are handed over at most; None: as many as the core never waits for
    capacity: int | None = None


class LoaderComposer(Composer):
    """Makes the transfers of a stream as aisloader's options change them; `extras` is set right after it is made."""

    extras: Extras
    #: when nothing more is begun, CLOCK_MONOTONIC
    stops_ns: int | None = None

    def prepare(self, extras: Extras) -> None:
        """Say what is done beside a stream's operations; before the first `fill`."""
        self.extras = extras
        self._update_pattern = Pattern(extras.run_key)
        self.slots, self.capacity = Slots(extras.capacity or self.capacity), extras.capacity or self.capacity
        self._to_update = np.zeros(self.capacity, np.bool_)
        self._updating = np.zeros(self.capacity, np.bool_)

    def hand_over(self, batch: Batch) -> None:
        """See `Composer.hand_over`."""
        self._cut_puts(batch)
        updates = np.zeros(batch.count, np.bool_)
        gets = np.isin(batch.kinds, (Kind.GET, Kind.GET_RANGE))
        if gets.any():
            updates = self._reads(batch, gets)
        puts = np.flatnonzero(batch.kinds == Kind.PUT)
        if len(puts):
            self._writes(batch, puts)
        super().hand_over(batch)
        if batch.count:
            self._to_update[batch.transfers["tag"][updates].astype(np.int64)] = True

    def _cut_puts(self, batch: Batch) -> None:
        """Nothing behind the PUT that reaches a limit."""
        limits, puts = self.extras.limits, batch.kinds == Kind.PUT
        sizes = np.where(puts, batch.transfers["nbytes"], np.uint64(0))
        ends = [batch.count]
        if limits.count is not None and puts.sum() >= limits.count:
            ends.append(int(np.flatnonzero(np.cumsum(puts) >= limits.count)[0]) + 1 if limits.count else 0)
        if limits.nbytes is not None and sizes.sum() >= limits.nbytes:
            ends.append(
                int(np.flatnonzero(np.cumsum(sizes) >= np.uint64(limits.nbytes))[0]) + 1 if limits.nbytes else 0
            )
        if len(ends) > 1:
            self.finished = True
            if self.writes is not None:
                self.writes.begun -= int(puts[min(ends) :].sum())
            batch.keep(min(ends))
        if limits.count is not None:
            limits.count -= int(puts[: batch.count].sum())
        if limits.nbytes is not None:
            limits.nbytes = max(0, limits.nbytes - int(sizes[: batch.count].sum()))

    # -- reads --

    def _reads(self, batch: Batch, gets: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Make the reads what they are to be; which of them are followed by an update."""
        extras, t = self.extras, batch.transfers
        updates = np.zeros(batch.count, np.bool_)
        if extras.batched:
            batch.kinds[gets] = Kind.BATCH
            return updates
        if extras.parallel_percent:
            parallel = gets & (extras.draws["parallel"].random(batch.count) * 100 < extras.parallel_percent)
            batch.kinds[parallel] = Kind.GET_PARALLEL
            t["flags"][parallel] |= IN_PARTS
            t["room"][parallel] = extras.range_bytes
            t["digest"][parallel] = Digest.NONE  # of the whole: parts have none
            gets &= ~parallel
        if extras.update_percent:
            updates = gets & (extras.draws["update"].random(batch.count) * 100 < extras.update_percent)
        if extras.archives or extras.latest:
            self._ask_for(batch)
        return updates

    def _ask_for(self, batch: Batch) -> None:
        """Put queries behind the names: of the file in an archive, and for the latest version."""
        extras, t = self.extras, batch.transfers
        text, start = _names_of(batch)
        reads = np.flatnonzero(t["op"] == Op.READ)
        more = bytearray()
        for row in reads.tolist():
            at, end = int(start[row]), int(start[row]) + int(t["key_nbytes"][row])
            joint = text.find(MEMBER, at, end) if extras.archives else -1
            query = text[joint + 1 : end] if joint >= 0 else b""
            if joint >= 0:
                batch.kinds[row] = Kind.GET_ARCHIVED
                t["key_nbytes"][row] = joint - at
            if extras.latest:
                query = b"&".join(filter(None, (query, _LATEST)))
            t["query_start"][row], t["query_nbytes"][row] = len(text) + len(more), len(query)
            more += query
        t["key_start"] = start
        batch.names = np.frombuffer(text + bytes(more), np.uint8)

    # -- writes --

    def _writes(self, batch: Batch, puts: npt.NDArray[np.int64]) -> None:
        extras, t = self.extras, batch.transfers
        t["digest"][puts] = extras.put_digest
        if extras.parts_percent and extras.parts:
            chosen = puts[extras.draws["parts"].random(len(puts)) * 100 < extras.parts_percent]
            batch.kinds[chosen] = Kind.PUT_PARTS
            t["flags"][chosen] |= IN_PARTS
            t["room"][chosen] = part_bytes(t["nbytes"][chosen], extras.parts)
        if extras.shards is not None and extras.names is not None:
            self._make_shards(batch, puts[extras.names.is_shard(batch.index[puts])])

    def _make_shards(self, batch: Batch, rows: npt.NDArray[np.int64]) -> None:
        extras, t = self.extras, batch.transfers
        assert extras.shards is not None
        made = []
        for row in rows.tolist():
            index = int(batch.index[row])
            made.append(extras.shards.make(index, int(t["nbytes"][row]), Pattern(extras.run_key, 0, index, 0)))
        if not made:
            return
        sizes = np.array([len(one) for one in made], np.uint64)
        batch.kinds[rows] = Kind.PUT_SHARD
        t["memory"][rows] = Memory.BUFFER
        t["place"][rows] = np.cumsum(sizes) - sizes
        t["nbytes"][rows] = t["object_nbytes"][rows] = t["room"][rows] = sizes
        batch.buffer = b"".join(made)

    # -- what follows --

    def done(self, slots: npt.NDArray[np.int64], well: npt.NDArray[np.bool_]) -> None:
        """See `Composer.done`; objects that were read are written again, where that was drawn."""
        again = slots[well & self._to_update[slots]]
        index, epoch = self.slots.index[again].copy(), self.slots.epoch[again].copy()
        shards = self.slots.kind[slots] == Kind.PUT_SHARD
        parts = self.slots.kind[slots] == Kind.PUT_PARTS
        updated = self._updating[slots]
        if self.writes is not None and (wrote := well & (shards | parts)).any():
            self.writes.wrote(self.slots.index[slots[wrote]], False)
        self._to_update[slots] = self._updating[slots] = False
        super().done(slots, well & ~updated)
        if len(index) and not self.stopped and (self.stops_ns is None or time.monotonic_ns() < self.stops_ns):
            self._update(index, epoch)

    def _update(self, index: U64, epoch: npt.NDArray[np.uint32]) -> None:
        assert self.reads is not None
        packed = self.reads.ranges.objects.pack(index)
        slots = self.slots.take(len(index))
        transfers: Any = np.zeros(len(index), TRANSFER_DTYPE)
        transfers["tag"], transfers["op"] = slots, Op.WRITE
        transfers["key_start"], transfers["key_nbytes"] = packed.key_start, packed.key_nbytes
        transfers["nbytes"] = transfers["object_nbytes"] = packed.sizes
        transfers["memory"], transfers["place"] = Memory.PATTERN, index
        transfers["digest"] = self.extras.put_digest
        self.slots.kind[slots], self.slots.index[slots], self.slots.epoch[slots] = Kind.PUT, index, epoch
        self.slots.offset[slots] = self.slots.intended_ns[slots] = 0
        self._updating[slots] = True
        self.transfers.submit(transfers, packed.names, None, self._update_pattern)


def part_bytes(nbytes: U64, parts: int) -> U64:
    """Bytes of a part of objects that are to go in `parts` parts: a multiple of 4 KiB, the last part may be shorter."""
    each = -(-nbytes.astype(np.int64) // (parts * ALIGN_BYTES)) * ALIGN_BYTES
    return np.maximum(each, ALIGN_BYTES).astype(np.uint64)


def _names_of(batch: Batch) -> tuple[bytes, U64]:
    """The names of a batch and where each begins, without those of other objects."""
    t = batch.transfers
    blob, start = gathered(Packed(batch.names, t["key_start"], t["key_nbytes"], t["object_nbytes"]))
    return blob.tobytes(), start
