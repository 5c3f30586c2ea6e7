"""Objects of a bucket through a DataLoader: an epoch with workers that are up, each object once.

What comes back of an object is its length: what a DataLoader adds by moving samples between processes is the same for
all, and hides what they differ in.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.child import measure
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.torch.job import REGION, TorchJob
from benchmarks.torch.objects import connector_config, options_of

JOB = TorchJob
WORKERS, BATCH, PREFETCH = 2, 32, 4


def length_of_reader(reader: Any) -> int:
    """Reads all of an object; the transform of s3torchconnector's data sets."""
    return len(reader.read())


def length_of_sample(sample: Any) -> int:
    """The transform of mlstor's."""
    return len(sample.data)


def fill(job: TorchJob) -> Sample:
    """Write the objects: `count` of them, `nbytes` in all."""
    from concurrent.futures import ThreadPoolExecutor

    from benchmarks.torch.objects import checkpoint

    store, data = checkpoint(job), os.urandom(job.each_bytes)

    def one(number: int) -> None:
        with store.writer(f"{job.path}/{number:06d}") as writer:
            writer.write(data)

    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(one, range(job.count)):
            pass
    return Sample(0.0, 0.0, 0)


def connector_map(job: TorchJob) -> Sample:
    """S3MapDataset, listed once, in random order."""
    from s3torchconnector import S3MapDataset

    dataset = S3MapDataset.from_prefix(
        f"{job.path}/", region=REGION, endpoint=job.endpoint, transform=length_of_reader,
        s3client_config=connector_config(),
    )  # fmt: skip
    return epoch(job, dataset, shuffle=True)


def connector_iterable(job: TorchJob) -> Sample:
    """S3IterableDataset, dealt to the workers; it knows no random order."""
    from s3torchconnector import S3IterableDataset

    dataset = S3IterableDataset.from_prefix(
        f"{job.path}/", region=REGION, endpoint=job.endpoint, transform=length_of_reader,
        s3client_config=connector_config(), enable_sharding=True,
    )  # fmt: skip
    return epoch(job, dataset)


def our_map(job: TorchJob) -> Sample:
    """ObjectDataset in random order."""
    from mlstor.torch import ObjectDataset

    return epoch(job, ObjectDataset(job.path, transform=length_of_sample, options=options_of(job)), shuffle=True)


def our_iterable(job: TorchJob) -> Sample:
    """ObjectIterableDataset, dealt to the workers, in random order."""
    from mlstor.torch import ObjectIterableDataset

    dataset = ObjectIterableDataset(job.path, transform=length_of_sample, options=options_of(job), seed=job.seed)
    return epoch(job, dataset)


def epoch(job: TorchJob, dataset: Any, shuffle: bool = False) -> Sample:
    """The second epoch: workers, connections and lists are there. CPU is the process's and its workers'."""
    import torch
    from torch.utils.data import DataLoader

    generator = torch.Generator().manual_seed(job.seed)
    order: dict[str, Any] = {"shuffle": True, "generator": generator} if shuffle else {}
    loader: Any = DataLoader(
        dataset, batch_size=BATCH, num_workers=WORKERS, prefetch_factor=PREFETCH, persistent_workers=True, **order
    )
    total(loader)
    before_s = children_cpu_s()
    sample, (count, nbytes) = measure(job, lambda: total(loader))
    theirs_s = children_cpu_s() - before_s
    if (count, nbytes) != (job.count, job.count * job.each_bytes):
        raise BenchmarkError(f"an epoch gave {count} objects of {nbytes} bytes, not {job.count} of {job.nbytes}")
    return dataclasses.replace(sample, cpu_s=sample.cpu_s + theirs_s, operations=count, nbytes=nbytes)


def total(batches: Iterable[Any]) -> tuple[int, int]:
    """Samples and bytes of an epoch."""
    count = nbytes = 0
    for batch in batches:
        count += len(batch)
        nbytes += int(sum(int(length) for length in batch))
    return count, nbytes


def children_cpu_s() -> float:
    """User and system time of the children that live, s."""
    ticks = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile, and was none of ours
            continue
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])  # proc(5): utime, stime
    return ticks / os.sysconf("SC_CLK_TCK")
