"""What is read next: the epochs of one rank, and which bytes of each object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mlstor.errors import UsageError
from mlstor.storage.transfers import WHOLE
from mlstor.stream.draws import U64, Purpose, generator
from mlstor.stream.order import Order, Scope, Share, Uneven

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlstor.stream.catalog import Objects, Packed
    from mlstor.stream.order import Kind as OrderKind

_CHUNK = 1 << 20
_NOTHING_READ = "--bytes never ends: nothing is in the objects"


@dataclass(frozen=True)
class Picked:
    """What is read next, one element of each array per read; `nbytes` is WHOLE for whole objects of unknown size."""

    epoch: npt.NDArray[np.uint32]
    index: U64
    packed: Packed
    offset: U64
    nbytes: U64


class Ranges:
    """Which bytes of an object are read: all of them.

    Attributes
    ----------
    units : int
        What an epoch consists of: objects, or records.
    """

    words: str | None = None
    nbytes: int | None = None

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.units = len(objects)

    def pick(self, units: U64) -> tuple[U64, Packed, U64, U64]:
        """Of each unit the object's index, its name and size, the offset, and the bytes."""
        packed = self.objects.pack(units)
        return units, packed, np.zeros(len(units), np.uint64), packed.sizes

    def unit_nbytes(self, units: U64) -> U64:
        """Bytes of each unit, without picking them."""
        return _known(self.objects.pack(units).sizes)


class FixedRanges(Ranges):
    """The same range of every object; of one that ends within it, what there is of it.

    Raises
    ------
    UsageError
        If an object ends before the range begins: servers refuse such a read (HTTP 416).
    """

    def __init__(self, objects: Objects, offset: int, nbytes: int) -> None:
        super().__init__(objects)
        self.offset, self.nbytes = offset, nbytes
        self.words = f"{nbytes} bytes at {offset}"
        short = sum(int((sizes <= np.uint64(offset)).sum()) for sizes in _all_sizes(objects)) if offset else 0
        if short:
            raise UsageError(
                f"--read-offset {offset} lies at or beyond the end of {short:,} of the {len(objects):,} objects: "
                "give a smaller one, or leave them out by --list-file"
            )

    def unit_nbytes(self, units: U64) -> U64:
        return self.pick(units)[3]

    def pick(self, units: U64) -> tuple[U64, Packed, U64, U64]:
        packed = self.objects.pack(units)
        sizes = _known(packed.sizes)
        offset = np.full(len(units), self.offset, np.uint64)
        return units, packed, offset, np.minimum(np.uint64(self.nbytes or 0), sizes - offset)


class RandomRanges(Ranges):
    """A range of every object, at a multiple of `align_nbytes` that is drawn anew each time."""

    def __init__(self, objects: Objects, nbytes: int, align_nbytes: int, draws: np.random.Generator) -> None:
        super().__init__(objects)
        self.nbytes, self.align, self._draws = nbytes, align_nbytes, draws
        self.words = f"{nbytes} bytes at a random multiple of {align_nbytes}"

    def unit_nbytes(self, units: U64) -> U64:
        nbytes: U64 = np.minimum(np.uint64(self.nbytes or 0), super().unit_nbytes(units))
        return nbytes

    def pick(self, units: U64) -> tuple[U64, Packed, U64, U64]:
        packed = self.objects.pack(units)
        sizes = _known(packed.sizes)
        nbytes = np.minimum(np.uint64(self.nbytes or 0), sizes)
        places = (sizes - nbytes) // np.uint64(self.align) + np.uint64(1)
        return units, packed, self._draws.integers(0, places, dtype=np.uint64) * np.uint64(self.align), nbytes


class Records(Ranges):
    """Every record of every object once per epoch, in one order over all; the last of an object may be short."""

    def __init__(self, objects: Objects, nbytes: int) -> None:
        super().__init__(objects)
        self.nbytes = nbytes
        self.words = f"records of {nbytes} bytes"
        count = len(objects)
        sizes = np.concatenate([np.zeros(0, np.uint64), *_all_sizes(objects)])
        # where each object's records end in the sequence of all: 8 bytes per object
        self._ends = np.cumsum(-(-sizes.astype(np.int64) // nbytes), dtype=np.int64).astype(np.uint64)
        self.units = int(self._ends[-1]) if count else 0
        if not self.units:
            raise UsageError("--range records finds no record: all objects are empty")

    def unit_nbytes(self, units: U64) -> U64:
        return self.pick(units)[3]

    def pick(self, units: U64) -> tuple[U64, Packed, U64, U64]:
        index = np.searchsorted(self._ends, units, side="right").astype(np.uint64)
        first = np.where(index > 0, self._ends[np.maximum(index, np.uint64(1)) - np.uint64(1)], np.uint64(0))
        packed = self.objects.pack(index)
        offset = (units - first) * np.uint64(self.nbytes or 1)
        return index, packed, offset, np.minimum(np.uint64(self.nbytes or 0), packed.sizes - offset)


def _all_sizes(objects: Objects) -> Iterator[U64]:
    """Of all objects, a million at a time."""
    for at in range(0, len(objects), _CHUNK):
        yield _known(objects.pack(np.arange(at, min(at + _CHUNK, len(objects)), dtype=np.uint64)).sizes)


def _known(sizes: U64) -> U64:
    if (sizes == np.uint64(WHOLE)).any():
        raise UsageError(
            "--read-bytes needs the objects' sizes: give them in --list-file behind a tab, or list the URL"
        )
    return sizes


class Reads:
    """The reads of one rank, epoch after epoch.

    Parameters
    ----------
    ranges
        Of which objects, and which bytes of them.
    rank, size
        Of the ranks that share the objects.
    epochs
        How many, None for no end.
    first_epoch
        Where it begins; epochs before it were a warm-up.
    """

    def __init__(
        self,
        ranges: Ranges,
        *,
        seed: int,
        kind: OrderKind,
        rank: int,
        size: int,
        uneven: Uneven,
        scope: Scope,
        epochs: int | None,
        first_epoch: int = 0,
    ) -> None:
        self.ranges = ranges
        self.share = Share(ranges.units, rank, size, uneven, scope)
        self.order = Order(ranges.units, seed, kind, self.share.client)
        self._positions = self.share.positions()
        self.epoch, self._done = first_epoch, 0
        self._end = None if epochs is None else first_epoch + epochs

    @property
    def per_epoch(self) -> int:
        """Reads of this rank in an epoch."""
        return len(self._positions)

    @property
    def next_epoch(self) -> int:
        """The first epoch of which nothing has been taken."""
        return self.epoch + (self._done > 0)

    @property
    def left(self) -> int | None:
        """Reads of this rank up to the last epoch's end; None without an end."""
        return None if self._end is None else (self._end - self.epoch) * self.per_epoch - self._done

    @property
    def epoch_nbytes(self) -> int | None:
        """Bytes of an epoch of all ranks, None if some sizes are not known."""
        return None if self.ranges.objects.total_bytes is None else self._nbytes_of(self.epoch)

    def take(self, count: int) -> Picked:
        """The next `count` reads, fewer where the last epoch ends."""
        units: list[U64] = []
        epochs: list[npt.NDArray[np.uint32]] = []
        while count and self.per_epoch and (self._end is None or self.epoch < self._end):
            now = min(count, self.per_epoch - self._done)
            place = self._positions[self._done]
            units.append(self.order.indices(self.epoch, place, self._positions.step, now))
            epochs.append(np.full(now, self.epoch, np.uint32))
            self._done += now
            count -= now
            if self._done == self.per_epoch:
                self.epoch, self._done = self.epoch + 1, 0
        if not units:
            units, epochs = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint32)]
        return Picked(np.concatenate(epochs), *self.ranges.pick(np.concatenate(units)))

    def count_of(self, total: int) -> int:
        """This rank's part of the first `total` reads of all ranks."""
        if self.share.scope == "client":
            return total // self.share.world + (self.share.rank < total % self.share.world)
        visited = self._visited()
        epochs, rest = divmod(total, visited)
        mine = range(self._positions.start, min(rest, self._positions.stop), self._positions.step)
        return epochs * self.per_epoch + len(mine)

    def total_of(self, nbytes: int) -> int:
        """The least number of reads of all ranks, from the first epoch on, that have `nbytes` bytes together."""
        visited, epoch, count = self._visited(), self.epoch, 0
        if visited == self.share.n and self.order.kind != "replacement":  # then every epoch has as many bytes
            per_epoch = self._nbytes_of(epoch)
            if not per_epoch:
                raise UsageError(_NOTHING_READ)
            epochs, nbytes = divmod(nbytes, per_epoch)
            epoch, count = epoch + epochs, epochs * visited
        while nbytes > 0:
            before = nbytes
            for at in range(0, visited, _CHUNK):
                sums = np.cumsum(self._unit_nbytes(epoch, at))
                if sums[-1] >= nbytes:
                    return count + at + int(np.searchsorted(sums, nbytes)) + 1
                nbytes -= int(sums[-1])
            if nbytes == before:
                raise UsageError(_NOTHING_READ)
            epoch, count = epoch + 1, count + visited
        return count

    def _visited(self) -> int:
        """Reads of all ranks in an epoch."""
        share = self.share
        if share.scope == "client" or share.uneven == "exact":
            return share.n
        return self.per_epoch * share.world

    def _unit_nbytes(self, epoch: int, at: int) -> U64:
        units = self.order.indices(epoch, at, 1, min(_CHUNK, self._visited() - at))
        return self.ranges.unit_nbytes(units)

    def _nbytes_of(self, epoch: int) -> int:
        """Bytes of an epoch of all ranks."""
        known = (
            self.ranges.objects.total_bytes if isinstance(self.ranges, Records) or self.ranges.nbytes is None else None
        )
        if known is None:
            known = sum(int(self._unit_nbytes(epoch, at).sum()) for at in range(0, self._visited(), _CHUNK))
        return known


def make_ranges(
    objects: Objects,
    kind: str | None,
    offset: int,
    nbytes: int | None,
    align_nbytes: int | None,
    seed: int,
    rank: int,
) -> Ranges:
    """The ranges that the options ask for; whole objects without `nbytes`."""
    if nbytes is None:
        return Ranges(objects)
    if kind == "random":
        return RandomRanges(objects, nbytes, align_nbytes or nbytes, generator(seed, rank, Purpose.OFFSET))
    if kind == "records":
        return Records(objects, nbytes)
    return FixedRanges(objects, offset, nbytes)
