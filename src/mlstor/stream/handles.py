"""Records of many large files over handles that stay open: files and offsets in, completions out, as arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor._io import AlignedBuffer, Engine, open_range_set
from mlstor.operations import RANGE_DTYPE
from mlstor.storage.transfers import TransferCounters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor._io import Pattern

_ALIGN_BYTES = 4096
AHEAD = 4096
"""Reads that are handed to the engine beyond those in flight: a step of Python for each half of them costs little per
read, and the rest lasts 10 ms where 200,000 are done in a second."""
AHEAD_IN_MEMORY = 512
"""The same where each has memory, or may have a file of its own open: 2 MiB, which a second-level cache holds."""
_OTHER_FILES = 64  # a journal, a library that is loaded late, ...
_SLOT_NBYTES = 64 << 10  # the engine's staging slots: of what is read, not of checkpoints


class Handles:
    """Files of which records are read, `in_flight` at once, and compared with a pattern or dropped.

    Parameters
    ----------
    paths : sequence of str
        Of all files, by number.
    record_nbytes : int
    in_flight : int
        Reads under way at the device.
    ahead : int
        Reads that are handed to the engine beyond that, so that it never waits for Python.
    most_open : int
        Files that stay open, at most. Others are open as long as reads of them are under way.
    pattern_of : callable, optional
        Gives the pattern that a file was written with by its number, for `damaged`: then records go to a buffer that
        the engine registers. Without it they go no further than the engine's own memory, as fio's do.
    """

    workers = 1

    def __init__(
        self,
        paths: Sequence[str],
        *,
        record_nbytes: int,
        in_flight: int,
        ahead: int = AHEAD,
        most_open: int = 512,
        pattern_of: Callable[[int], Pattern] | None = None,
    ) -> None:
        self.paths = paths
        self.record_nbytes = record_nbytes
        self.in_flight, self.ahead = in_flight, ahead
        self.capacity = in_flight + ahead
        self._stride = -(-record_nbytes // _ALIGN_BYTES) * _ALIGN_BYTES
        self._engine = Engine(workers=1, depth=in_flight, block_bytes=max(_SLOT_NBYTES, self._stride))
        self._set = open_range_set(self._engine, paths, most_open)
        self._most_open = most_open
        self._buffer = None if pattern_of is None else AlignedBuffer(self._stride * self.capacity)
        self._pattern_of = pattern_of
        self._patterns: dict[int, Pattern] = {}
        self._free = np.arange(self.capacity)
        self.room = self.capacity
        self._ranges: Any = np.zeros(self.capacity, RANGE_DTYPE)
        self._ranges["nbytes"] = record_nbytes
        self._requests = 0

    @property
    def outstanding(self) -> int:
        """Reads that were begun and not reaped."""
        return self._set.outstanding

    @property
    def backend(self) -> str:
        """Of the engine: io_uring or threads."""
        return self._engine.backend

    @property
    def opens(self) -> int:
        """Files opened since this was made."""
        return self._set.opens

    @property
    def ways_taken(self) -> dict[tuple[str, str, str], int]:
        """How the files were reached, as `RangeSet.ways_taken`."""
        return self._set.ways_taken

    def read(self, files: NDArray[np.uint32], offsets: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Begin to read a record of each file at each offset; the slots that they take, at most `room`.

        Raises
        ------
        OSError
            If a file can't be opened; nothing was begun then.
        """
        count = len(files)
        slots: NDArray[np.intp] = self._free[self.room - count : self.room].copy()
        ranges = self._ranges[:count]
        ranges["tag"] = slots
        ranges["offset"] = offsets
        if self._buffer is not None:
            ranges["dest"] = slots * self._stride
        if len(self.paths) > self._most_open:  # those of one file together: it is opened once for them
            order = np.argsort(files, kind="stable")
            ranges, files = ranges[order], files[order]
        numbers: Any = np.ascontiguousarray(files)
        self._set.submit(ranges, numbers, self._buffer)
        self.room -= count
        self._requests += count
        return slots

    def reap(self, out: Any, min_done: int, timeout_s: float) -> int:
        """Fill `out` with completions (DONE_DTYPE, by slot), as `RangeSet.reap`; how many. Their slots stay taken."""
        return self._set.reap(out, min_done, timeout_s)

    def give_back(self, slots: NDArray[np.intp]) -> None:
        """Slots of which nothing is needed any more."""
        self._free[self.room : self.room + len(slots)] = slots
        self.room += len(slots)

    def damaged(self, slot: int, file: int, offset: int) -> int:
        """4 KiB blocks of the record in a slot that are not what the pattern says."""
        if self._pattern_of is None or self._buffer is None:
            raise ValueError("there is no pattern to compare with")
        pattern = self._patterns.get(file)
        if pattern is None:
            pattern = self._patterns[file] = self._pattern_of(file)
        begin = slot * self._stride
        return len(pattern.check(memoryview(self._buffer)[begin : begin + self.record_nbytes], offset))

    def cancel(self) -> None:
        """Reads that have not begun come back with ECANCELED."""
        self._set.cancel()

    def counters(self) -> TransferCounters:
        """Of the engine."""
        found = self._engine.counters()
        return TransferCounters(found.read_bytes, 0, 0, self._requests, 0, found.busy_ns, found.wait_ns)

    def close(self) -> None:
        """Cancel and wait for what is under way, and end the engine."""
        self._engine.close()


def most_files_open(wanted: int, under_way: int) -> int:
    """`wanted`, or what RLIMIT_NOFILE leaves beside files of reads `under_way` and what else a process opens."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, limit - under_way - len(os.listdir("/proc/self/fd")) - _OTHER_FILES))
