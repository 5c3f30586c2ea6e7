"""The two ways in which a rank's files are written and read: mlstor's own, and that of MLPerf Storage v3.0.

A profile says which engine it wants for a phase and, for each logical rank, which operations follow one another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlstor.operations import DURABLE, Extent, ReadFile, Step, WriteFile
from mlstor.settings import Settings

#: Bytes that an engine's slot has beside a block (csrc/engine.c).
_SLOT_MARGIN_NBYTES = 8192
_PAGE_NBYTES = 4096
#: Least automatic block of the engine (csrc/steps.c).
_AUTOMATIC_NBYTES = 1 << 20
# Interpreter, MPI and tables of one process beside its staging memory; measured at about 60 MiB, rounded up.
_PROCESS_NBYTES = 128 << 20


class Job(NamedTuple):
    """A file of a logical rank: where it lies, its size, and the pattern of its bytes (None: not compared)."""

    path: str
    nbytes: int
    pattern: Any


class ObjectHow(NamedTuple):
    """How the objects of a process go to a store and come from it.

    Attributes
    ----------
    workers, in_flight : int
        Threads, and requests that each has under way.
    part_nbytes : int or None
        Every object in parts of so many bytes; None: by the store's own rule.
    serial : bool
        A rank's objects one after the other, not all at once.
    checksum : bool
        One is sent with what is written, where the store takes it.
    """

    workers: int
    in_flight: int
    part_nbytes: int | None
    serial: bool
    checksum: bool


#: Operations of one rank: those of a stage run together, and the next stage begins when all are done.
Stages = list[list[WriteFile | ReadFile]]


class Profile(ABC):
    """A way to write and read the files of a rank."""

    name: str
    #: Durability steps of a written file.
    steps: Step
    #: Seconds of sleep before each phase, outside the clock.
    pause_s: float
    verify: bool
    #: O_DIRECT unless the user says otherwise; None: the setting.
    direct: str | None
    #: Names of the settings that the profile fixes.
    fixed: frozenset[str]

    @abstractmethod
    def engine_settings(self, settings: Settings, op: str, nranks: int, largest_nbytes: int) -> Settings:
        """Settings of the engine for a phase of `op` by `nranks` logical ranks of this process."""

    @abstractmethod
    def block_nbytes(self, settings: Settings, preferred_nbytes: int) -> int:
        """Bytes of one write where `settings` hold and the file system prefers so many (st_blksize)."""

    @abstractmethod
    def writes(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        """Operations that write one rank's files; `settings` are those of its target."""

    @abstractmethod
    def reads(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        """Operations that read one rank's files; `settings` are those of its target."""

    @abstractmethod
    def objects(self, settings: Settings, op: str, nranks: int, run_nranks: int) -> ObjectHow:
        """The same for object stores: of a phase by `nranks` logical ranks of this process, out of `run_nranks`."""

    def process_nbytes(self, settings: Settings, nranks: int, largest_nbytes: int) -> int:
        """Memory of one process of `nranks` logical ranks, bytes: itself, and its engine's staging memory, the larger
        of writing and reading files of up to `largest_nbytes`.
        """
        return _PROCESS_NBYTES + max(
            made.worker_count() * made.depth_count() * (made.slot_nbytes() + _SLOT_MARGIN_NBYTES)
            for made in (self.engine_settings(settings, op, nranks, largest_nbytes) for op in ("write", "read"))
        )


@dataclass(frozen=True)
class Native(Profile):
    """All files of all ranks at once, in blocks, direct where that works, durable by rename."""

    name: str = "native"
    steps: Step = DURABLE
    pause_s: float = 0.0
    verify: bool = True
    direct: str | None = None
    fixed: frozenset[str] = frozenset()

    def engine_settings(self, settings: Settings, op: str, nranks: int, largest_nbytes: int) -> Settings:
        return settings

    def objects(self, settings: Settings, op: str, nranks: int, run_nranks: int) -> ObjectHow:
        return ObjectHow(settings.worker_count(), settings.depth_count(), None, serial=False, checksum=True)

    def block_nbytes(self, settings: Settings, preferred_nbytes: int) -> int:
        # the engine's own rule for an automatic block (csrc/steps.c, automatic_block)
        return settings.block_bytes or min(max(preferred_nbytes, _AUTOMATIC_NBYTES), settings.slot_nbytes())

    def writes(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        block, direct = settings.block_bytes, settings.direct
        return [
            [
                WriteFile(
                    job.path,
                    [Extent(0, job.nbytes, job.pattern)],
                    self.steps,
                    block_bytes=block,
                    direct=direct,
                )
                for job in jobs
            ]
        ]

    def reads(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        block, direct = settings.block_bytes, settings.direct
        return [
            [ReadFile(job.path, [Extent(0, job.nbytes, job.pattern)], block_bytes=block, direct=direct) for job in jobs]
        ]


@dataclass(frozen=True)
class Mlperf(Profile):
    """One file at a time per rank: 32 MiB writes in sequence, each followed by fadvise(DONTNEED), one fsync; reads by
    four readers of contiguous quarters in preads of up to 128 MiB. No preallocation, no rename.

    On object stores one object at a time per rank: multipart uploads of 32 MiB parts, of which as many are under way as
    make 16 of all ranks, at least 2; reads in ranges of 128 MiB, 4 at once.

    Source: mlcommons/storage 3.0.26, ``storage_writers/file_writer.py`` and ``storage_readers/file_reader.py``; for
    objects DLIO's ``checkpointing/pytorch_obj_store_checkpointing.py`` and its ``storage_writers``.
    """

    name: str = "mlperf"
    steps: Step = Step.FSYNC | Step.DONTNEED
    pause_s: float = 5.0
    verify: bool = False
    direct: str | None = "off"
    fixed: frozenset[str] = frozenset({"backend", "block_bytes", "depth", "workers"})
    write_nbytes: int = 32 << 20
    read_nbytes: int = 128 << 20
    readers: int = 4
    parts_of_all: int = 16
    least_parts: int = 2

    def engine_settings(self, settings: Settings, op: str, nranks: int, largest_nbytes: int) -> Settings:
        block = self.write_nbytes if op == "write" else min(self.read_nbytes, self._quarter(largest_nbytes))
        block = max(_PAGE_NBYTES, (block + _PAGE_NBYTES - 1) // _PAGE_NBYTES * _PAGE_NBYTES)
        threads = max(1, nranks) * (1 if op == "write" else self.readers)
        # without the stored profile's values by target: they would come before these
        return replace(settings, backend="threads", workers=threads, depth=1, block_bytes=block, _targets={})

    def block_nbytes(self, settings: Settings, preferred_nbytes: int) -> int:
        return self.write_nbytes

    def objects(self, settings: Settings, op: str, nranks: int, run_nranks: int) -> ObjectHow:
        in_flight = max(self.least_parts, -(-self.parts_of_all // run_nranks)) if op == "write" else self.readers
        part = self.write_nbytes if op == "write" else self.read_nbytes
        # a worker for each rank, so that this many requests of each are under way
        return ObjectHow(max(1, nranks), in_flight, part, serial=True, checksum=False)

    def _quarter(self, nbytes: int) -> int:
        return -(-nbytes // self.readers)

    def writes(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        return [
            [
                WriteFile(
                    job.path,
                    [Extent(0, job.nbytes, job.pattern)],
                    self.steps,
                    direct=settings.direct,
                    serial=True,
                )
            ]
            for job in jobs
        ]

    def reads(self, jobs: Sequence[Job], settings: Settings) -> Stages:
        return [self._quarters(job, settings.direct) for job in jobs]

    def _quarters(self, job: Job, direct: str) -> list[WriteFile | ReadFile]:
        quarter = self._quarter(job.nbytes)
        return [
            ReadFile(
                job.path,
                [Extent(offset, min(quarter, job.nbytes - offset), job.pattern)],
                Step.RANDOM | Step.DONTNEED,
                direct=direct,
                serial=True,
            )
            for offset in range(0, job.nbytes, max(1, quarter))
        ]


PROFILES: dict[str, Profile] = {"native": Native(), "mlperf": Mlperf()}


def step_names(steps: Step) -> list[str]:
    """The steps of a write in their order, by the words that the record uses."""
    words = {
        Step.PREALLOCATE: "preallocate",
        Step.DONTNEED: "fadvise_dontneed",
        Step.FDATASYNC: "fdatasync",
        Step.FSYNC: "fsync",
        Step.RENAME: "rename",
        Step.FSYNC_DIR: "fsync_dir",
    }
    named = [word for step, word in words.items() if step & steps]
    named.insert(1 if steps & Step.PREALLOCATE else 0, "write")
    return named
