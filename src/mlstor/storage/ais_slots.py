"""Transfers under way, by a number of their own that goes to the engine as tag: what is needed to send one again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mlstor.storage.transfers import TRANSFER_DTYPE

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor._io import Pattern

# Copying records field by field takes numpy 10 us a time: here they are rows of 64-bit words.
TRANSFER = numpy.dtype(TRANSFER_DTYPE)
WORDS = TRANSFER.itemsize // 8
_TAG = TRANSFER.fields["tag"][1] // 8 if TRANSFER.fields else 0


class Batch(NamedTuple):
    """What was submitted in one call; kept until the last of it is done, since any of it may be sent again."""

    names: Buffer
    buffer: Buffer | None
    pattern: Pattern | None


class Slots:
    """As many as there are transfers under way; they are used again, and grow in number when they have to."""

    def __init__(self) -> None:
        self._records = numpy.zeros((0, WORDS), numpy.uint64)
        self._tags = numpy.zeros(0, numpy.uint64)
        self._batches: list[Batch | None] = []
        self._free = numpy.zeros(0, numpy.uint64)
        self._nfree = 0

    def take(self, words: Any, batch: Batch) -> None:
        """Slots for the transfers that are the rows of `words`, whose tags they become."""
        count = len(words)
        if self._nfree < count:
            self._grow(count)
        self._nfree -= count
        slots = self._free[self._nfree : self._nfree + count]
        self._tags[slots] = words[:, _TAG]
        words[:, _TAG] = slots
        self._records[slots] = words
        for slot in slots.tolist():
            self._batches[slot] = batch

    def _grow(self, count: int) -> None:
        old = len(self._tags)
        new = max(64, 2 * old, old + count)
        self._records = numpy.concatenate([self._records, numpy.zeros((new - old, WORDS), numpy.uint64)])
        self._tags = numpy.concatenate([self._tags, numpy.zeros(new - old, numpy.uint64)])
        self._batches += [None] * (new - old)
        free = numpy.zeros(new, numpy.uint64)
        free[: self._nfree] = self._free[: self._nfree]
        free[self._nfree : self._nfree + new - old] = numpy.arange(old, new)
        self._free = free
        self._nfree += new - old

    def give_back(self, slots: Any) -> Any:
        """The transfers' own tags; the slots are free from now on."""
        for slot in slots.tolist():
            self._batches[slot] = None
        self._free[self._nfree : self._nfree + len(slots)] = slots
        self._nfree += len(slots)
        return self._tags[slots]

    def tag(self, slot: int) -> int:
        return int(self._tags[slot])

    def keep(self, slot: int, record: Any) -> None:
        """How a transfer is handed to the engine now."""
        self._records[slot] = record.view(numpy.uint64)

    def record(self, slot: int) -> tuple[Any, Batch]:
        """A copy of a transfer as it was handed to the engine, as an array of one, and what it was submitted with."""
        batch = self._batches[slot]
        assert batch
        return self._records[slot : slot + 1].copy().view(TRANSFER)[:, 0], batch
