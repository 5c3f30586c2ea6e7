"""The records of token reads: every whole record of every file, as one sequence."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from mlstor.errors import UsageError
from mlstor.storage.transfers import WHOLE
from mlstor.stream.reads import Records
from mlstor.stream.tokens import RECORD_NBYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlstor._io import Pattern
    from mlstor.stream.catalog import Objects, Packed
    from mlstor.stream.draws import U64
    from mlstor.stream.handles import Handles
    from mlstor.stream.tokens import Tokens

MOST_FILES = 1 << 20
"""Files of which the paths are kept in memory. Token sets have hundreds."""


class TokenRecords(Records):
    """Every whole record of every file once per epoch, in one order over all; positions are 64-bit.

    Raises
    ------
    UsageError
        If there are too many files for their paths to be kept in memory, or none of them holds a record.
    """

    def __init__(self, objects: Objects, record_nbytes: int = RECORD_NBYTES) -> None:
        self.nbytes = record_nbytes
        self.words = f"records of {record_nbytes} bytes"
        if len(objects) > MOST_FILES:
            raise UsageError(f"--pattern tokens is for large files, up to {MOST_FILES}; there are {len(objects)}")
        self._packed = objects.pack(np.arange(len(objects), dtype=np.uint64))
        if (self._packed.sizes == np.uint64(WHOLE)).any():
            raise UsageError("--pattern tokens needs the files' sizes: give them in --list-file behind a tab")
        counts = self._packed.sizes // np.uint64(record_nbytes)
        # where each file's records begin in the sequence of all, and where the last one's end
        self._starts = np.concatenate([np.zeros(1, np.uint64), np.cumsum(counts, dtype=np.uint64)])
        self.units = int(self._starts[-1])
        if not self.units:
            raise UsageError(f"no file holds a record of {record_nbytes} bytes: check the URL, or write with --fill N")
        self.objects = _WithoutTails(objects, self.units * record_nbytes)

    def unit_nbytes(self, units: U64) -> U64:
        return np.full(len(units), self.nbytes, np.uint64)

    def pick(self, units: U64) -> tuple[U64, Packed, U64, U64]:
        """Of each record the file's index, its name and size, the offset, and the bytes."""
        index = np.searchsorted(self._starts, units, side="right") - 1
        offset = (units - self._starts[index]) * np.uint64(self.nbytes or 1)
        names, start, lengths, sizes = self._packed
        packed = type(self._packed)(names, start[index], lengths[index], sizes[index])
        return index.astype(np.uint64), packed, offset, self.unit_nbytes(units)


class _WithoutTails:
    """Objects whose total is that of their whole records."""

    def __init__(self, objects: Objects, total_bytes: int) -> None:
        self._objects = objects
        self.total_bytes = total_bytes
        self.digest = objects.digest
        self.name, self.pack = objects.name, objects.pack

    def __len__(self) -> int:
        return len(self._objects)


def kept(
    root: str,
    objects: Objects,
    tokens: Tokens,
    in_flight: int,
    pattern_of: Callable[[int], Pattern] | None = None,
) -> Handles:
    """Kept handles for the records of `objects`, whose keys are relative to the directory `root`; see `Handles`."""
    from mlstor.stream.handles import AHEAD, AHEAD_IN_MEMORY, Handles, most_files_open

    most_open = most_files_open(tokens.most_handles, 0)
    ahead = AHEAD if pattern_of is None else AHEAD_IN_MEMORY
    if len(objects) > most_open:  # then reads under way have files open beside those that are kept
        ahead = AHEAD_IN_MEMORY
        most_open = most_files_open(tokens.most_handles, in_flight + ahead)
    return Handles(
        [os.path.join(root, objects.name(index)) for index in range(len(objects))],
        record_nbytes=tokens.record_nbytes,
        in_flight=in_flight,
        ahead=ahead,
        most_open=most_open,
        pattern_of=pattern_of,
    )
