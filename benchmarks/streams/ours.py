"""mlstor's side: arrays of transfers, one worker, the same number in flight as the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.child import measure
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.streams.job import StreamJob, counted

if TYPE_CHECKING:
    from mlstor.storage.store import Store
    from mlstor.storage.transfers import Transfers

JOB = StreamJob
AHEAD_BYTES = 32 << 20  # handed over beyond what is in flight, so that no transfer waits for Python
AHEAD = 64  # objects, at most
PATIENCE_S = 60.0


def store_of(job: StreamJob) -> Store:
    """The store of a job; the servers of the benchmark ask for no credentials."""
    from mlstor.storage.store import open_store

    options: dict[str, Any] = {}
    if job.endpoint:
        options["endpoint"] = job.endpoint
    if job.path.startswith("s3://"):
        options["anonymous"] = True
    if job.path.startswith("ais://") and job.via_proxy:
        options["via_proxy"] = True
    return open_store(job.path, **options)


def fill(job: StreamJob) -> Sample:
    """Write the objects that are read, each once."""
    return put(job)


def get(job: StreamJob) -> Sample:
    """Read whole objects into memory, which is where the other clients deliver them."""
    return transfer(job, "READ", "BUFFER")


def get_dropped(job: StreamJob) -> Sample:
    """Read whole objects and drop the bytes: what aisloader does."""
    return transfer(job, "READ", "DROP")


def put(job: StreamJob) -> Sample:
    """Write objects from memory that is there."""
    return transfer(job, "WRITE", "BUFFER")


def transfer(job: StreamJob, op: str, memory: str) -> Sample:
    """One kind of transfer over all objects in the job's order, for its seconds or each once."""
    store = store_of(job)
    transfers = store.transfers(workers=1 if job.endpoint else 0, in_flight=job.in_flight)
    loop = _Loop(job, transfers, op, memory)
    loop.run(job.warm_operations, lambda: False)
    sample, operations = measure(job, loop.timed)
    before = transfers.counters()
    transfers.close()
    store.close()
    return counted(sample, operations, operations * job.nbytes, path=f"{before.connections} connections")


class _Loop:
    def __init__(self, job: StreamJob, transfers: Transfers, op: str, memory: str) -> None:
        import numpy

        from mlstor import AlignedBuffer
        from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Memory, Op

        self.job, self.transfers = job, transfers
        self.window = job.in_flight + max(1, min(AHEAD, AHEAD_BYTES // job.nbytes))
        self.batch = max(1, min(32, self.window // 2))
        self.order = numpy.array(job.order())
        keys = [job.key(number).encode() for number in range(job.nobjects)]
        self.names, width = b"".join(keys), len(keys[0])
        slots = self.window if memory == "BUFFER" else 0
        self.buffer = AlignedBuffer(slots * job.nbytes) if slots else None
        if self.buffer is not None:
            noise = numpy.random.default_rng(job.seed).bytes(1 << 20)
            view = memoryview(self.buffer)
            for at in range(0, len(view), len(noise)):  # touched, and incompressible where it is sent
                view[at : at + len(noise)] = noise[: len(view) - at]
        self.rows = numpy.zeros(self.window, TRANSFER_DTYPE)
        self.rows["key_nbytes"] = width
        self.rows["op"], self.rows["memory"] = Op[op], Memory[memory]
        self.rows["nbytes"] = job.nbytes if op == "WRITE" else WHOLE
        self.rows["object_nbytes"] = job.nbytes
        self.rows["room"] = job.nbytes
        self.rows["tag"] = self.rows["place"] = numpy.arange(self.window)
        self.rows["place"] *= job.nbytes
        self.width = width
        self.done = numpy.zeros(self.window, COMPLETION_DTYPE)
        self.free = self.numbers = numpy.arange(self.window)
        self.concatenate = numpy.concatenate
        self.position = 0

    def timed(self) -> int:
        """The run that counts; how many objects."""
        if not self.job.seconds:
            return self.run(self.job.nobjects, lambda: False)
        end_s = time.monotonic() + self.job.seconds
        return self.run(1 << 62, lambda: time.monotonic() >= end_s)

    def run(self, most: int, over: Callable[[], bool]) -> int:
        """Up to `most` objects until ``over()``; what was begun is ended."""
        begun = finished = 0
        while True:
            if begun < most and self.free.size and not over():
                taken = self.free[: most - begun]
                self.free = self.free[taken.size :]
                wanted = (self.position + begun + self.numbers[: taken.size]) % self.order.size
                rows = self.rows[taken]
                rows["key_start"] = self.order[wanted] * self.width
                begun += self.transfers.submit(rows, self.names, self.buffer)
            elif not self.transfers.outstanding:
                break
            count = self.transfers.reap(self.done, min(self.batch, self.transfers.outstanding), PATIENCE_S)
            if count == 0 or (self.done["kind"][:count] != 0).any():
                raise BenchmarkError(f"{count} came back; {self.transfers.failures()[:1]}")
            if (self.done["result"][:count] != self.job.nbytes).any():
                raise BenchmarkError(f"an object has not {self.job.nbytes} bytes")
            self.free = self.concatenate([self.free, self.done["tag"][:count].astype("i8")])
            finished += count
        self.position += begun
        return finished
