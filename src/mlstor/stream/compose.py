"""The next transfers of a workload, made by the batch: arrays in, arrays out, no Python object per transfer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlstor.storage.transfers import TRANSFER_DTYPE, WHOLE, Digest, Memory, Op
from mlstor.stream.draws import U64
from mlstor.stream.mix import Kind, Kinds, Mix
from mlstor.stream.slots import Slots
from mlstor.stream.sources import Heads, Writes

if TYPE_CHECKING:
    from mlstor._io import Pattern
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.catalog import Objects, Packed
    from mlstor.stream.reads import Picked, Reads

# Transfers that are handed over ahead at least: some milliseconds of the fastest stores.
_LEAST_AHEAD = 256
_OP = np.zeros(len(Kind), np.uint8)
_OP[[Kind.GET, Kind.GET_RANGE]] = Op.READ
_OP[Kind.PUT], _OP[Kind.HEAD], _OP[Kind.DELETE] = Op.WRITE, Op.STAT, Op.DELETE


@dataclass
class Limits:
    """What is left of this rank's part of the run; None: no limit."""

    ops: int | None = None
    nbytes: int | None = None


class Verified(NamedTuple):
    """What reads are compared with: the pattern of the run that wrote, or nothing but the store's checksum."""

    pattern: Pattern | None
    digest: Digest


@dataclass
class Pace:
    """An open loop: operation k of this rank is begun `first_ns` + k * `step_ns`, whatever became of those before."""

    first_ns: float
    step_ns: float


class Composer:
    """Makes transfers and hands them over.

    Parameters
    ----------
    transfers
        They are submitted here.
    in_flight
        Transfers that the core has under way at most. More than these are handed over ahead, so that it never waits.
    reads, heads, writes
        Where names come from; None for operations that `mix` has not.
    deleted
        Objects for deletions that this run has not written: their order, and the names.
    write_pattern, write_digest
        Contents of what is written, and the checksum that is sent with it.
    ends_ns
        In an open loop with a duration: operations that are meant to begin from here on are not made (CLOCK_MONOTONIC).
    """

    def __init__(
        self,
        transfers: Transfers,
        in_flight: int,
        mix: Mix,
        limits: Limits,
        *,
        reads: Reads | None = None,
        heads: Heads | None = None,
        writes: Writes | None = None,
        deleted: Heads | None = None,
        verified: Verified | None = None,
        write_pattern: Pattern | None = None,
        write_digest: Digest = Digest.NONE,
        pace: Pace | None = None,
        ends_ns: int | None = None,
    ) -> None:
        self.transfers, self.in_flight, self.mix, self.limits = transfers, in_flight, mix, limits
        self.capacity = in_flight + max(2 * in_flight, _LEAST_AHEAD)
        self.reads, self.heads, self.writes, self.deleted = reads, heads, writes, deleted
        self.verified = verified or Verified(None, Digest.NONE)
        self.write_pattern, self.write_digest = write_pattern, write_digest
        self.pace, self.ends_ns = pace, ends_ns
        self.slots = Slots(self.capacity)
        self.finished = self.stopped = False
        self._made = 0
        self._epoch = reads.epoch if reads is not None else 0
        self._pattern = self.verified.pattern or write_pattern
        whole = reads is None or reads.ranges.nbytes is None
        self._get = Kind.GET if whole else Kind.GET_RANGE

    def fill(self) -> int:
        """Hand over as many as there is room for; how many those were. Sets `finished` behind the last one."""
        left = self.slots.free if self.limits.ops is None else min(self.slots.free, self.limits.ops)
        left = self._in_time(left)
        if left <= 0 or self.finished:
            self.finished |= self.slots.free > 0
            return 0
        deletable = self._deletable()
        count = left
        if Kind.DELETE in self.mix.percent and self.deleted is None:
            # What is deleted has to be written first: too far ahead nothing is there yet, and deletions would be late.
            count = min(left, max(0, self.in_flight - self.outstanding) + deletable)
        kinds = self.mix.take(count, deletable)
        if not len(kinds) and not self.outstanding:
            self.finished = True  # only deletions are left, and nothing is under way that could be deleted
        picked = self.reads.take(int((kinds == Kind.GET).sum())) if self.reads is not None else None
        if picked is not None and len(picked.index) < (kinds == Kind.GET).sum():
            kinds = kinds[: int(np.flatnonzero(kinds == Kind.GET)[len(picked.index)])]
            self.finished = True
        batch = Batch(self, kinds, picked)
        self.hand_over(batch)
        if self.limits.ops is not None:
            self.limits.ops -= batch.count
            self.finished |= self.limits.ops == 0
        return batch.count

    @property
    def outstanding(self) -> int:
        """Transfers that are handed over and not yet done."""
        return self.capacity - self.slots.free

    def stop(self) -> None:
        """Nothing more is to be begun, not even what follows from what is under way."""
        self.finished = self.stopped = True

    def _in_time(self, count: int) -> int:
        """How many of the next `count` operations are meant to begin before the end."""
        if self.pace is None or self.ends_ns is None:
            return count
        left = (self.ends_ns - self.pace.first_ns) / self.pace.step_ns - self._made
        return max(0, min(count, int(np.ceil(left))))

    def not_begun(self) -> dict[int, int]:
        """By kind, when the time of an open loop is over: operations that were meant to begin before, and that found no
        room. Of a mix they have its shares; where bytes are the limit, nobody knows.
        """
        if self.pace is None or self.ends_ns is None or self.finished or self.limits.nbytes is not None:
            return {}
        count = self._in_time(1 << 62 if self.limits.ops is None else self.limits.ops)
        missed = {kind: round(count * share / 100) for kind, share in self.mix.percent.items()}
        if self.reads is not None and Kind.GET in missed and self.reads.left is not None:
            missed[Kind.GET] = min(missed[Kind.GET], self.reads.left)
        return {int(self._get if kind is Kind.GET else kind): count for kind, count in missed.items() if count}

    def _deletable(self) -> int:
        if self.deleted is not None:
            return self.deleted.left
        return self.writes.deletable if self.writes is not None else 0

    def hand_over(self, batch: Batch) -> None:
        """Submit what was made."""
        count = batch.count
        if not count:
            return
        transfers, slots = batch.transfers, self.slots.take(count)
        transfers["tag"] = slots
        if self.pace is not None:
            order = np.arange(self._made, self._made + count)
            transfers["not_before_ns"] = (self.pace.first_ns + order * self.pace.step_ns).astype(np.uint64)
        self._made += count
        self.slots.kind[slots] = batch.kinds
        self.slots.index[slots] = batch.index
        self.slots.epoch[slots] = batch.epoch
        self.slots.offset[slots] = transfers["offset"]
        self.slots.intended_ns[slots] = transfers["not_before_ns"]
        self.transfers.submit(transfers, batch.names, batch.buffer, self._pattern)

    def done(self, slots: npt.NDArray[np.int64], well: npt.NDArray[np.bool_]) -> None:
        """Transfers have ended, those of `well` as they should; their slots are free again."""
        if self.writes is not None:
            wrote = well & (self.slots.kind[slots] == Kind.PUT)
            if wrote.any():
                keep = self.deleted is None and Kind.DELETE in self.mix.percent
                self.writes.wrote(self.slots.index[slots[wrote]], keep)
        self.slots.give_back(slots)

    def epochs_of(self, kinds: Kinds, picked: Picked | None) -> npt.NDArray[np.uint32]:
        """The epoch that each operation falls into: that of the read before it."""
        epochs = np.full(len(kinds), self._epoch, np.uint32)
        if picked is not None and len(picked.epoch):
            at = np.flatnonzero(kinds == Kind.GET)
            epochs[at] = picked.epoch[: len(at)]
            epochs = np.maximum.accumulate(epochs)
            self._epoch = int(epochs[-1]) if len(epochs) else self._epoch
        return epochs

    def read_kind(self) -> Kind:
        """What a GET is called: of whole objects or of ranges."""
        return self._get


class Batch:
    """Some transfers that follow one another, without tags and times; `buffer` is for those that name one."""

    buffer: bytes | None = None

    def __init__(self, composer: Composer, kinds: Kinds, picked: Picked | None) -> None:
        self._composer = composer
        self.transfers: Any = np.zeros(len(kinds), TRANSFER_DTYPE)
        self.index: U64 = np.zeros(len(kinds), np.uint64)
        self._nbytes: U64 = np.zeros(len(kinds), np.uint64)
        self._parts: list[tuple[npt.NDArray[np.int64], Packed]] = []
        self.kinds = kinds.copy()
        where = {kind: np.flatnonzero(kinds == kind) for kind in composer.mix.percent}
        if picked is not None and len(where.get(Kind.GET, ())):
            self._gets(where[Kind.GET], picked)
        if len(where.get(Kind.PUT, ())):
            self._puts(where[Kind.PUT])
        if len(where.get(Kind.HEAD, ())) and composer.heads is not None:
            self._others(where[Kind.HEAD], composer.heads.objects, composer.heads.take(len(where[Kind.HEAD])))
        if len(where.get(Kind.DELETE, ())):
            self._deletes(where[Kind.DELETE])
        self.epoch = composer.epochs_of(kinds, picked)
        self.transfers["op"] = _OP[kinds]
        self.count = len(kinds)
        self._cut()
        self.names = self._joined()
        if composer.writes is not None:
            composer.writes.begun += int((self.kinds == Kind.PUT).sum())

    def _gets(self, at: npt.NDArray[np.int64], picked: Picked) -> None:
        composer, t = self._composer, self.transfers
        self.kinds[at] = composer.read_kind()
        index, offset, nbytes = (column[: len(at)] for column in (picked.index, picked.offset, picked.nbytes))
        sizes = picked.packed.sizes[: len(at)]
        self.index[at] = index
        t["offset"][at] = offset
        t["nbytes"][at] = WHOLE if composer.read_kind() is Kind.GET else nbytes
        t["object_nbytes"][at] = sizes
        t["digest"][at] = composer.verified.digest
        if composer.verified.pattern is not None:
            t["memory"][at] = Memory.PATTERN
            t["place"][at] = index
        self._nbytes[at] = np.where(nbytes == np.uint64(WHOLE), np.uint64(0), nbytes)
        self._name(at, picked.packed)

    def _puts(self, at: npt.NDArray[np.int64]) -> None:
        composer, t = self._composer, self.transfers
        assert composer.writes is not None
        index = composer.writes.peek(len(at))
        packed = composer.writes.objects.pack(index)
        self.index[at] = t["place"][at] = index
        t["memory"][at] = Memory.PATTERN
        t["digest"][at] = composer.write_digest
        t["nbytes"][at] = t["object_nbytes"][at] = self._nbytes[at] = packed.sizes
        self._name(at, packed)

    def _deletes(self, at: npt.NDArray[np.int64]) -> None:
        composer = self._composer
        if composer.deleted is not None:
            self._others(at, composer.deleted.objects, composer.deleted.take(len(at)))
        elif composer.writes is not None:
            self._others(at, composer.writes.objects, composer.writes.take_deletable(len(at)))

    def _others(self, at: npt.NDArray[np.int64], objects: Objects, index: U64) -> None:
        self.index[at] = index
        self.transfers["object_nbytes"][at] = WHOLE
        self._name(at, objects.pack(index))

    def _name(self, at: npt.NDArray[np.int64], packed: Packed) -> None:
        self.transfers["key_start"][at] = packed.key_start[: len(at)]
        self.transfers["key_nbytes"][at] = packed.key_nbytes[: len(at)]
        self._parts.append((at, packed))

    def _cut(self) -> None:
        """Nothing behind the operation with which this rank has moved all its bytes."""
        limits = self._composer.limits
        if limits.nbytes is None:
            return
        sums = np.cumsum(self._nbytes)
        if len(sums) and sums[-1] >= limits.nbytes:
            self._composer.finished = True
            self.keep(int(np.searchsorted(sums, np.uint64(limits.nbytes))) + 1)
        limits.nbytes -= int(sums[self.count - 1]) if self.count else 0

    def keep(self, count: int) -> None:
        """Leave out all behind the first `count`."""
        self.count = count
        self.transfers, self.kinds = self.transfers[:count], self.kinds[:count]
        self.index, self.epoch = self.index[:count], self.epoch[:count]

    def _joined(self) -> Any:
        """One buffer with all names; the only one there is, if there is but one."""
        if len(self._parts) == 1:
            return self._parts[0][1].names
        blobs: list[npt.NDArray[np.uint8]] = []
        place = 0
        for at, packed in self._parts:
            blob, start = gathered(packed)
            at = at[at < self.count]
            self.transfers["key_start"][at] = start[: len(at)] + np.uint64(place)
            blobs.append(blob)
            place += len(blob)
        return np.concatenate(blobs) if blobs else np.zeros(0, np.uint8)


def gathered(packed: Packed) -> tuple[npt.NDArray[np.uint8], U64]:
    """The names one after the other, and where each begins: those of a mapped catalog lie far apart."""
    lengths = packed.key_nbytes.astype(np.int64)
    ends = np.cumsum(lengths)
    start = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    place = np.repeat(packed.key_start.astype(np.int64) - start, lengths) + np.arange(total)
    return np.frombuffer(packed.names, np.uint8)[place], start.astype(np.uint64)
