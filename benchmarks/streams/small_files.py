"""64 KiB files from disk, cold, in random order: against the best DataLoader and the best fio of a sweep."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.child import run_child
from benchmarks.goals import Goal
from benchmarks.harness import Contender, Sample, drop_caches, require_uncached
from benchmarks.streams.files import FilesJob
from benchmarks.streams.job import StreamJob
from benchmarks.streams.parts import Part, Place, Samples, group_of, key_of, sweep_for, twin
from benchmarks.streams.ratios import rate

SIZE, FILE_BYTES, NFILES = "64KiB", 64 << 10, 20_000
DIRECTORIES = 16  # so that fio's jobs get some each
IN_FLIGHT = 64
TOUCHED_PAYLOADS = 2  # of memory: the page cache takes one, which a virtual machine's host may have yet to supply
LOADER_WORKERS = (0, 1, 2, 3, 4)
LOOKED_AT = 100  # files that may not be in the page cache
OURS, FIO, LOADER = "mlstor", "fio", "DataLoader"
# Of a sweep the best two take part: which of them is the better one, the rounds tell.
PLACES = ("1st", "2nd")


@dataclass(frozen=True)
class Cell:
    """Settings of fio.

    Attributes
    ----------
    engine : str
        ``"io_uring"`` or ``"psync"``.
    jobs : int
        Threads, which open files and wait for that; they share the depth, and with psync they are it.
    open_files : int
        That each job has open; no more transfers than that are in flight.
    """

    engine: str
    jobs: int
    open_files: int

    def __str__(self) -> str:
        return f"{self.engine}, {self.jobs} jobs, {self.open_files} open files each"


CELLS = (
    *(Cell("io_uring", jobs, 128) for jobs in (1, 2, 4)),
    Cell("io_uring", 1, 1024),
    Cell("io_uring", 16, 16),
    *(Cell("psync", jobs, 16) for jobs in (2, 4, 16)),
)


def key(client: str) -> str:
    """Of a contender on the files."""
    return key_of("files", "get", SIZE, client)


def peers(client: str) -> list[str]:
    """The keys of the best two settings of fio or the DataLoader."""
    return [key(f"{client} {place}") for place in PLACES]


def keys(server: str) -> list[str]:
    """Of all contenders."""
    return [key(OURS), *peers(FIO), *peers(LOADER)] if server == "files" else []


def job_of(place: Place) -> StreamJob:
    """Each file once."""
    return StreamJob(
        place.url,
        FILE_BYTES,
        min(place.touch_bytes, 1) * TOUCHED_PAYLOADS * NFILES * FILE_BYTES,
        seed=place.seed,
        prefix=f"get-{SIZE}",
        nobjects=NFILES,
        in_flight=IN_FLIGHT,
        directories=DIRECTORIES,
    )


def make_cold(place: Place) -> None:
    """Empty the page cache, and look at some files whether it is empty."""
    directory = Path(place.url)
    drop_caches([directory])
    job = job_of(place)
    numbers = random.Random(place.seed).sample(range(NFILES), LOOKED_AT)
    require_uncached(directory / job.key(number) for number in numbers)


def bind(place: Place) -> list[Contender]:
    """Sweep, and return ours, the best cell of fio and the best number of workers."""
    job = job_of(place)

    def loader(workers: int) -> Sample:
        return run_child("streams.files:dataloader", FilesJob(**vars(replace(job, threads=workers))))

    def fio(cell: Cell) -> Sample:
        chosen = replace(job, threads=cell.jobs)
        return run_child("streams.files:fio", FilesJob(**vars(chosen), engine=cell.engine, open_files=cell.open_files))

    def cold(run: partial[Sample]) -> Sample:
        make_cold(place)
        return run()

    loaders = {f"{workers} workers": partial(loader, workers) for workers in LOADER_WORKERS}
    cells = {str(cell): partial(fio, cell) for cell in CELLS}
    group = group_of("files", "get", SIZE)
    ours = Contender(key(OURS), group, OURS, partial(run_child, "streams.ours:get", job))
    place.progress(f"all files once, not counted: {cold(partial(run_child, 'streams.ours:get', job)).rate:,.0f}/s")
    bound = [ours]
    for client, settings in ((FIO, cells), (LOADER, loaders)):
        best = sweep_for(len(PLACES), client, {name: partial(cold, run) for name, run in settings.items()}, place)
        bound += [
            Contender(one, group, f"{client}, {name}", settings[name])
            for one, name in zip(peers(client), best, strict=True)
        ]
    return [*bound, twin(ours)]


def goals(samples: Samples, server: str) -> list[Goal]:
    """Against both."""
    if server != "files":
        return []
    what = "64 KiB files, cold, random order: rate /"
    return [
        rate(samples, f"{what} best DataLoader", key(OURS), peers(LOADER), 2.0),
        rate(samples, f"{what} best fio", key(OURS), peers(FIO), 0.9),
    ]


PART = Part(keys, bind, goals, sizes=(SIZE,))
