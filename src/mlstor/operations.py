"""What is handed to an engine and what comes back: operations, extents, results. Plain values, no I/O."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from enum import IntFlag
from typing import Any, Literal, NamedTuple


class Step(IntFlag):
    """The steps of an operation beside reading or writing itself; combine them with ``|``."""

    #: fallocate to the final size before the first write; ftruncate where the file system has no fallocate
    PREALLOCATE = 1
    #: fdatasync when all is written
    FDATASYNC = 2
    #: fsync when all is written
    FSYNC = 4
    #: write under a temporary name in the same directory, rename over the path once synced
    RENAME = 8
    #: fsync of the directory, last
    FSYNC_DIR = 16
    #: posix_fadvise(DONTNEED) on each buffered block after it was transferred
    DONTNEED = 32
    #: posix_fadvise(RANDOM) on the whole file at open: no readahead
    RANDOM = 64


#: What a crash leaves is the old file or the new one, never a mixture.
DURABLE = Step.PREALLOCATE | Step.FDATASYNC | Step.RENAME | Step.FSYNC_DIR

TEMPORARY_SUFFIX = ".mlstor-tmp"


def is_leftover(name: str) -> bool:
    """Whether a file name is that of a write which was killed before its rename: ``.<name>.<8 hex>.mlstor-tmp``."""
    return re.fullmatch(r"\..*\.[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX), name, re.DOTALL) is not None


class Late:
    """Bytes that are known only when the digests of the others are, as in an archive's headers.

    Parameters
    ----------
    callback
        Called once, in a worker thread, with ``{group: digest}`` of all groups; returns exactly the extent's bytes.
    """

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[Mapping[int, int]], bytes]) -> None:
        self.callback = callback


class Extent(NamedTuple):
    """A stretch of a file and where its bytes come from or go to."""

    #: where in the file, bytes
    offset: int
    nbytes: int
    #: write: a buffer, a Pattern or a Late. Read: a writable buffer, a Pattern to compare with, or None to drop.
    data: Any = None
    #: "crc32", "crc32c", both at once as "crc32+crc32c" (crc32c << 32 | crc32), or "xxh64", computed in the worker;
    #: xxh64 does not combine and makes the operation serial
    digest: str | None = None
    #: extents of one group are digested as one sequence, in the order of the list
    group: int = 0


class WriteFile(NamedTuple):
    """Write a whole file. Gaps between extents are zeros."""

    path: str | os.PathLike[str]
    extents: Sequence[Extent]
    steps: Step = DURABLE
    #: final size, bytes; None: where the last extent ends
    nbytes: int | None = None
    #: bytes of one transfer, at most the engine's; 0: the setting
    block_bytes: int = 0
    #: auto, require or off; None: the setting
    direct: str | None = None
    #: one worker, in file order
    serial: bool = False
    #: at most so many bytes/s on an average, and a block per worker ahead of that; 0: as fast as it goes
    bytes_per_s: int = 0


class ReadFile(NamedTuple):
    """Read stretches of a file."""

    path: str | os.PathLike[str]
    extents: Sequence[Extent]
    steps: Step = Step(0)
    block_bytes: int = 0
    direct: str | None = None
    serial: bool = False


class Damage(NamedTuple):
    """One 4 KiB block that is not what the pattern says."""

    #: first wrong byte, in the file; for a stamp of something else, the block
    offset: int
    nbytes: int
    #: zeroed, other-run, other-checkpoint, other-file, other-offset, corrupt or no-stamp
    kind: str
    #: what a valid stamp in that place says, else 0
    run_id: int
    checkpoint: int
    file_id: int
    found_offset: int


class Result(NamedTuple):
    """What an operation did and how. Times in ns; start and end on CLOCK_MONOTONIC, the others durations."""

    path: str
    nbytes: int
    start_ns: int
    end_ns: int
    open_ns: int
    data_ns: int
    sync_ns: int
    commit_ns: int
    #: io_uring or threads
    backend: str
    #: yes (confirmed: nothing was in the page cache afterwards), no, or unverified
    direct: Literal["yes", "no", "unverified"]
    #: why direct is no or unverified, or how it was confirmed
    reason: str
    mem_align: int
    offset_align: int
    fs_type: str
    zero_copy_bytes: int
    staged_bytes: int
    digests: dict[int, int]
    #: at most 16 of the damaged blocks, by offset
    damage: list[Damage]
    damaged_blocks: int


class Counters(NamedTuple):
    """What an engine's workers did since it was made. Only ever grows."""

    read_bytes: int
    written_bytes: int
    reads: int
    writes: int
    syncs: int
    #: ns of all workers: working (filling, checking, submitting), and waiting for the storage
    busy_ns: int
    wait_ns: int
    zero_copy_bytes: int
    staged_bytes: int
    #: transfers that the kernel cut short and that were continued
    retried: int


class Histogram(NamedTuple):
    """Durations in log-linear buckets, the same on every rank, so that adding is adding (csrc/histogram.h)."""

    #: bucket index: how many; empty buckets are left out
    buckets: dict[int, int]
    count: int  # type: ignore[assignment]  # a tuple's own count is of no use here
    sum_ns: int
    min_ns: int
    max_ns: int


#: Fields of an array of ranges for `RangeFile.submit`: tag is the caller's, dest the place in the buffer, bytes.
RANGE_DTYPE = [("tag", "<u8"), ("offset", "<u8"), ("nbytes", "<u8"), ("dest", "<u8")]
#: Fields of an array of completions from `RangeFile.reap`: result is bytes, or -errno; the end is on CLOCK_MONOTONIC.
DONE_DTYPE = [("tag", "<u8"), ("result", "<i8"), ("latency_ns", "<u8"), ("end_ns", "<u8")]
