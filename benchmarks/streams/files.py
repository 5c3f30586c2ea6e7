"""Small files in random order: a torch DataLoader, and fio over the same files."""

from __future__ import annotations

import json
import subprocess
from typing import Any

from benchmarks.child import measure, touch_memory
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.streams.job import StreamJob, counted

JOB = StreamJob
BATCH = 64


def dataloader(job: StreamJob) -> Sample:
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
        prefetch_factor=4 if job.threads else None,
    )
    sample, nbytes = measure(job, lambda: sum(loader))
    if nbytes != job.nobjects * job.nbytes:
        raise BenchmarkError(f"{job.nobjects} files gave {nbytes} bytes")
    return counted(sample, job.nobjects, nbytes, path="buffered")


def fio(job: StreamJob) -> Sample:
    """fio over the same files: each read whole by one block, a file drawn at random for each."""
    touch_memory(job.touch_bytes)
    command = [
        "fio",
        "--name=files",
        f"--opendir={job.path}/{job.prefix}",
        "--rw=read",
        f"--bs={job.nbytes}",
        "--direct=1",
        "--ioengine=io_uring",
        f"--iodepth={job.in_flight}",
        "--file_service_type=random:1",
        f"--openfiles={2 * job.in_flight}",
        f"--io_size={job.nobjects * job.nbytes}",
        "--thread",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise BenchmarkError(f"fio ended with {done.returncode}: {done.stderr[-1500:]}")
    report = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    read = report["read"]
    cpu_s = (report["usr_cpu"] + report["sys_cpu"]) / 100 * report["job_runtime"] / 1000
    return Sample(
        read["runtime"] / 1000, cpu_s, read["io_bytes"], read["total_ios"], detail={"path": "io_uring, direct"}
    )
