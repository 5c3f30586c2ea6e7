"""What a contender of the stream benchmark is to do, and what all of them share."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from benchmarks.child import Job, measure
from benchmarks.harness import BenchmarkError, Sample

WARM_OPERATIONS = 2  # per transfer in flight, before the clock: connections are there, as in a run of hours
LARGE_BYTES = 64 << 20  # beside an object of this size a connection is nothing: no warm-up


@dataclasses.dataclass(frozen=True)
class StreamJob(Job):
    """A `Job` on objects.

    Attributes
    ----------
    path : str
        ``s3://BUCKET``, ``ais://BUCKET`` or a directory.
    nbytes : int
        Of one object.
    seconds : float
        How long objects are read; 0: each once.
    endpoint : str
        URL of the server; empty for a directory.
    prefix : str
        Of the keys, which are ``<prefix>/<number>``.
    nobjects : int
        How many there are to read, or are written.
    in_flight : int
        Operations at a time, whatever the client calls them.
    via_proxy : bool
        AIStore: by way of the proxy.
    directories : int
        Into how many the keys are dealt; 0: all lie under the prefix itself.
    """

    endpoint: str = ""
    prefix: str = ""
    nobjects: int = 0
    in_flight: int = 8
    via_proxy: bool = False
    directories: int = 0

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return self.path.partition("://")[2]

    def key(self, number: int) -> str:
        """Key of an object."""
        below = f"{number % self.directories:02d}/" if self.directories else ""
        return f"{self.prefix}/{below}{number:06d}"

    @property
    def warm_operations(self) -> int:
        """Operations before the clock starts."""
        return self.in_flight * (0 if self.nbytes >= LARGE_BYTES else WARM_OPERATIONS)

    def order(self) -> list[int]:
        """All objects in a random order, the same for all contenders of a round."""
        return random.Random(self.seed).sample(range(self.nobjects), self.nobjects)


def counted(sample: Sample, operations: int, nbytes: int, **detail: str) -> Sample:
    """`sample` with what was really done."""
    return dataclasses.replace(sample, operations=operations, nbytes=nbytes, detail=detail)


def by_threads(job: StreamJob, one: Callable[[int], int]) -> Sample:
    """Run ``one(number)``, which returns bytes, in ``job.in_flight`` threads: for ``job.seconds``, or each once."""
    order = job.order()
    with ThreadPoolExecutor(job.in_flight) as pool:
        list(pool.map(one, itertools.islice(itertools.cycle(order), job.warm_operations)))
        lock, counter = threading.Lock(), itertools.count()
        totals = [0, 0]

        def loop(end_s: float) -> None:
            operations = nbytes = 0
            while True:
                number = next(counter)  # atomic: one call of C
                if time.monotonic() >= end_s if job.seconds else number >= len(order):
                    break
                nbytes += one(order[number % len(order)])
                operations += 1
            with lock:
                totals[0] += operations
                totals[1] += nbytes

        def work() -> None:
            end_s = time.monotonic() + job.seconds
            list(pool.map(loop, [end_s] * job.in_flight))

        sample, _ = measure(job, work)
    if totals[1] != totals[0] * job.nbytes:
        raise BenchmarkError(f"{totals[0]} objects of {job.nbytes} bytes gave {totals[1]} bytes")
    return counted(sample, *totals)
