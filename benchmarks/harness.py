"""Rounds of contenders in random order, each from the same state of cache and memory, and their statistics.

What a virtual machine does to a measurement decides the design: memory that is touched for the first time
costs up to 3 s per GB, and free memory goes back to the host within seconds. Order alone can change a figure
threefold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlstor.errors import MlstorError, UsageError

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SELF_CHECK_TOLERANCE = 0.10  # the same function on both sides must come out within 10% of 1


class BenchmarkError(MlstorError):
    """A contender failed, so that there is nothing to compare; the message holds its last words."""


@dataclass(frozen=True)
class Sample:
    """One contender in one round.

    Attributes
    ----------
    elapsed_s : float
        From the start of the I/O to its durable end; imports, engine and state are made before.
    cpu_s : float
        User and system time of the process with all its threads in that time.
    nbytes : int
        Payload written or read.
    operations : int
        Random reads done; 0 for streams.
    extra_rss_bytes : int
        Peak resident memory above what the process held when the clock started; -1 where nobody looked.
    detail : dict
        What the contender says of itself: backend, direct or not, cell.
    """

    elapsed_s: float
    cpu_s: float
    nbytes: int
    operations: int = 0
    extra_rss_bytes: int = -1
    detail: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Operations per second where operations are counted, else bytes per second."""
        return (self.operations or self.nbytes) / self.elapsed_s

    @property
    def cpu_s_per_gb(self) -> float:
        """CPU seconds per 10^9 bytes."""
        return self.cpu_s / (self.nbytes / 1e9)


@dataclass(frozen=True)
class Contender:
    """Something that is run once per round.

    Attributes
    ----------
    key : str
        Its name in ``--only`` and in the JSON, such as ``"torch-save"``.
    group : str
        ``"write"``, ``"read"`` or ``"random"``: the table that it stands in.
    label : str
        Its name in the tables.
    run : callable
        Runs it once and returns a `Sample`.
    reads : tuple of Path
        Files that may not be in the page cache when it starts.
    leaves : tuple of Path
        Files that are removed when it is done.
    twin_of : str
        Key of the contender that is the same function; the pair is the harness's self-check.
    """

    key: str
    group: str
    label: str
    run: Callable[[], Sample]
    reads: tuple[Path, ...] = ()
    leaves: tuple[Path, ...] = ()
    twin_of: str = ""


def run_rounds(
    contenders: Sequence[Contender],
    rounds: int,
    seed: int,
    prepare: Callable[[Contender], None],
    progress: Callable[[str], None],
) -> dict[str, list[Sample]]:
    """Run all contenders once per round, in an order drawn for each; samples by key, in round order."""
    samples: dict[str, list[Sample]] = {contender.key: [] for contender in contenders}
    generator = random.Random(seed)
    for number in range(1, rounds + 1):
        for contender in generator.sample(list(contenders), len(contenders)):
            prepare(contender)
            sample = contender.run()
            samples[contender.key].append(sample)
            for path in contender.leaves:
                remove(path)
            shown = f"{sample.rate:,.0f} IOPS" if sample.operations else f"{sample.rate / 1e9:.2f} GB/s"
            progress(f"round {number}/{rounds}  {contender.label}: {shown}")
    return samples


def median(values: Iterable[float]) -> float:
    """The median; of an even number of values the mean of the middle two."""
    return statistics.median(values)


def paired_ratios(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    """Rate of `ours` over that of `theirs`, round by round: drift of the machine between rounds cancels."""
    return [mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True)]


@dataclass(frozen=True)
class SelfCheck:
    """The same function on both sides: the median of the per-round ratios should be 1."""

    label: str
    ratios: list[float]

    @property
    def ratio(self) -> float:
        """Median of the per-round ratios."""
        return median(self.ratios)

    @property
    def passed(self) -> bool:
        """Whether the ratio lies within 10% of 1."""
        return abs(self.ratio - 1) <= SELF_CHECK_TOLERANCE


def self_checks(contenders: Sequence[Contender], samples: Mapping[str, Sequence[Sample]]) -> list[SelfCheck]:
    """One `SelfCheck` for each contender that has a twin."""
    return [
        SelfCheck(contender.label, paired_ratios(samples[contender.key], samples[contender.twin_of]))
        for contender in contenders
        if contender.twin_of
    ]


def drop_caches(paths: Iterable[Path]) -> str:
    """Write back what is dirty and empty the page cache: all of it as root, else of the files in `paths`.

    Returns
    -------
    str
        ``"drop_caches"`` or ``"fadvise"``: which of the two was done.
    """
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("3\n")
        return "drop_caches"
    for path in files_below(paths):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return "fadvise"


def require_uncached(paths: Iterable[Path]) -> None:
    """Look page by page whether `paths` are out of the page cache; a read of cached files is no measurement.

    Raises
    ------
    UsageError
        If more than 1% of a file's pages are in memory.
    """
    for path in files_below(paths):
        inside, pages = cached_pages(path)
        if inside > pages // 100:
            raise UsageError(
                f"{inside} of {pages} pages of {path} stay in the page cache: reads of it can't be measured; "
                "name a directory on a disk with --dir (not tmpfs), and let nobody else read it"
            )


def cached_pages(path: Path) -> tuple[int, int]:
    """Pages of `path` in the page cache, and all its pages, by ``mincore(2)``."""
    nbytes = path.stat().st_size
    if nbytes == 0:
        return 0, 0
    pages = -(-nbytes // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    vector = (ctypes.c_ubyte * pages)()
    # A private writable mapping, never touched: ctypes takes the address of writable memory only.
    with path.open("rb") as file, mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_COPY) as view:
        first = ctypes.c_char.from_buffer(view)
        try:
            status = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), vector)
        finally:
            del first  # releases the export, or the mapping can't be closed
        if status != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    return sum(entry & 1 for entry in bytes(vector)), pages


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files among `paths` and below the directories among them."""
    found: list[Path] = []
    for path in paths:
        found += sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return found


def remove(path: Path) -> None:
    """Remove a file, or a directory with the files in it; what is not there is an error."""
    if path.is_dir():
        for entry in path.iterdir():
            remove(entry)
        path.rmdir()
    else:
        path.unlink()
