"""Small files in random order: a torch DataLoader, and fio over the same files."""

from __future__ import annotations

import dataclasses
import resource
import subprocess
from typing import Any

from benchmarks import fio as yardstick
from benchmarks.child import measure, touch_memory
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.streams.job import StreamJob, counted

BATCH = 64
PREFETCH = 4  # batches that each worker of a DataLoader has ahead
PATIENCE_S = 600.0


@dataclasses.dataclass(frozen=True)
class FilesJob(StreamJob):
    """A `StreamJob` on files, each read once; ``threads`` are a DataLoader's workers or fio's jobs.

    Attributes
    ----------
    engine : str
        Of fio.
    open_files : int
        Files that each of fio's jobs has open; the first ones before its clock starts.
    """

    engine: str = ""
    open_files: int = 0


JOB = FilesJob


def dataloader(job: FilesJob) -> Sample:
    """A DataLoader with ``job.threads`` worker processes (0: none) over a map-style dataset that reads files."""
    from torch.utils.data import DataLoader, Dataset

    class Files(Dataset[int]):
        def __getitem__(self, number: int) -> int:
            with open(f"{job.path}/{job.key(number)}", "rb") as file:
                return len(file.read())

    # Lengths come back, not bytes: what a DataLoader adds by moving samples between processes is not counted.
    loader: Any = DataLoader(
        Files(),
        batch_size=BATCH,
        sampler=job.order(),
        num_workers=job.threads,
        collate_fn=sum,
        persistent_workers=False,
        prefetch_factor=PREFETCH if job.threads else None,
    )
    before_s = children_cpu_s()
    sample, nbytes = measure(job, lambda: sum(loader))  # its workers end with the epoch
    if nbytes != job.nobjects * job.nbytes:
        raise BenchmarkError(f"{job.nobjects} files gave {nbytes} bytes")
    workers_s = children_cpu_s() - before_s
    if job.threads and not workers_s:
        raise BenchmarkError("the workers of the DataLoader have not ended: their CPU is not known")
    sample = dataclasses.replace(sample, cpu_s=sample.cpu_s + workers_s)
    return counted(sample, job.nobjects, nbytes, path="buffered")


def children_cpu_s() -> float:
    """User and system time of child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def fio(job: FilesJob) -> Sample:
    """fio over the same files: each read whole by one block, a file drawn at random for each.

    Each of its jobs has directories of its own, so that every file is read once.
    """
    touch_memory(job.touch_bytes)
    done = subprocess.run(command(job), capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    if done.returncode:
        raise BenchmarkError(f"fio ended with {done.returncode}: {done.stderr[-1500:]}")
    sample = yardstick.parse(done.stdout, "read")
    if sample.nbytes != job.nobjects * job.nbytes:
        raise BenchmarkError(f"fio read {sample.nbytes} bytes of {job.nobjects} files")
    return counted(sample, job.nobjects, sample.nbytes, path=f"{job.engine}, direct")


def command(job: FilesJob) -> list[str]:
    """fio's command line, with what makes it fast: no time stamps of its own, no look at the page cache per file."""
    words = [
        "fio",
        "--output-format=json",
        "--group_reporting",
        "--thread",
        "--rw=read",
        f"--bs={job.nbytes}",
        "--direct=1",
        "--invalidate=0",
        "--gtod_reduce=1",
        f"--ioengine={job.engine}",
        f"--iodepth={max(1, job.in_flight // job.threads) if job.engine == 'io_uring' else 1}",
        "--file_service_type=random:1",
        f"--openfiles={job.open_files}",
    ]
    for number in range(job.threads):
        words.append(f"--name=files{number}")
        words += [
            f"--opendir={job.path}/{job.prefix}/{directory:02d}"
            for directory in range(number, job.directories, job.threads)
        ]
    return words
