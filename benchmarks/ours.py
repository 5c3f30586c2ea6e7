"""mlstor's side, with its defaults. The engine is there before the clock starts, as in a training job."""

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.child import Job, measure
from benchmarks.harness import Sample, require_uncached

if TYPE_CHECKING:
    from mlstor import Result

MIB = 1 << 20
RUN_ID = 0x6D6C73746F72  # of the pattern that `write` makes and `read_verified` expects
RANDOM_BYTES = 4096
RANDOM_DEPTH = 64  # in flight at the device
RANDOM_WINDOW = 512  # 2 MiB of destination, so that it stays in the second-level cache
RANDOM_BATCH = 128
PATIENCE_S = 10.0  # a batch of reads that takes longer hangs


def write(job: Job) -> Sample:
    """Write a generated pattern: preallocate, write, fdatasync, rename, fsync of the directory."""
    from mlstor import Engine, Extent, Pattern

    engine = Engine()
    extents = [Extent(0, job.nbytes, Pattern(RUN_ID))]
    sample, result = measure(job, lambda: engine.write_file(job.path, extents))
    engine.close()
    return described(sample, result)


def write_aligned(job: Job) -> Sample:
    """Write aligned memory that is there: nothing is generated and nothing copied."""
    from mlstor import AlignedBuffer, Engine

    engine = Engine()
    buffer = AlignedBuffer(job.nbytes)
    view = memoryview(buffer).cast("B")
    block = random.randbytes(MIB)
    for offset in range(0, job.nbytes, MIB):
        view[offset : offset + MIB] = block
    sample, result = measure(job, lambda: engine.write_file(job.path, buffer))
    engine.close()
    return described(sample, result)


def read_verified(job: Job) -> Sample:
    """Read and compare every byte with the pattern that `write` made."""
    from mlstor import Engine, Extent, Pattern

    engine = Engine()
    extents = [Extent(0, job.nbytes, Pattern(RUN_ID))]
    sample, result = measure(job, lambda: engine.read_file(job.path, extents))
    engine.close()
    if result.damaged_blocks:
        raise ValueError(f"{result.damaged_blocks} blocks of {job.path} are not what was written: {result.damage[0]}")
    return described(sample, result)


def read_dropped(job: Job) -> Sample:
    """Read and drop the bytes: what fio does."""
    from mlstor import Engine, Extent

    engine = Engine()
    extents = [Extent(0, job.nbytes, None)]
    sample, result = measure(job, lambda: engine.read_file(job.path, extents))
    engine.close()
    return described(sample, result)


def read_aligned(job: Job) -> Sample:
    """Read into aligned memory that is there and touched, as a load into existing tensors."""
    from mlstor import AlignedBuffer, Engine, Pattern

    engine = Engine()
    buffer = AlignedBuffer(job.nbytes)
    view = memoryview(buffer).cast("B")
    zeros = bytes(MIB)
    for offset in range(0, job.nbytes, MIB):
        view[offset : offset + MIB] = zeros
    sample, result = measure(job, lambda: engine.read_file(job.path, buffer))
    engine.close()
    damage = Pattern(RUN_ID).check(buffer)
    if damage:
        raise ValueError(f"{job.path} was not read as it was written: {damage[0]}")
    return described(sample, result)


def random_reads(job: Job) -> Sample:
    """Random reads of 4 KiB for ``job.seconds``, 64 in flight, one worker; ranges go in and out as arrays."""
    import numpy

    from mlstor import AlignedBuffer, Engine
    from mlstor._io import open_ranges
    from mlstor.operations import DONE_DTYPE, RANGE_DTYPE

    engine = Engine(workers=1, depth=RANDOM_DEPTH, block_bytes=64 << 10)  # slots of what is read, not of checkpoints
    buffer = AlignedBuffer(RANDOM_WINDOW * RANDOM_BYTES)
    file = open_ranges(engine, job.path)
    done = numpy.zeros(RANDOM_WINDOW, DONE_DTYPE)
    blocks = numpy.random.default_rng(job.seed).integers(0, job.nbytes // RANDOM_BYTES, 1 << 20)

    def work() -> int:
        slots = numpy.arange(RANDOM_WINDOW)
        position = finished = 0
        end_ns = time.monotonic_ns() + int(job.seconds * 1e9)
        while True:
            if time.monotonic_ns() < end_ns:
                ranges = numpy.zeros(slots.size, RANGE_DTYPE)
                ranges["tag"] = slots
                ranges["offset"] = blocks[position : position + slots.size] * RANDOM_BYTES
                ranges["nbytes"] = RANDOM_BYTES
                ranges["dest"] = slots * RANDOM_BYTES
                file.submit(ranges, buffer)
                position = (position + slots.size) % (blocks.size - RANDOM_WINDOW)
            if file.outstanding == 0:
                return finished
            count = file.reap(done, RANDOM_BATCH, PATIENCE_S)
            if count == 0 or (done["result"][:count] != RANDOM_BYTES).any():
                raise OSError(f"random reads of {job.path}: {count} came back, with {set(done['result'][:count])}")
            slots = done["tag"][:count].astype(numpy.int64)
            finished += count

    sample, finished = measure(job, work)
    path = f"{engine.backend}, direct {file.direct}"
    engine.close()
    require_uncached([Path(job.path)])  # or the reads came through the page cache, and are no figure
    return dataclasses.replace(sample, nbytes=finished * RANDOM_BYTES, operations=finished, detail={"path": path})


def described(sample: Sample, result: Result) -> Sample:
    """The sample with the path that the engine says it took."""
    if result.nbytes != sample.nbytes:
        raise OSError(f"{result.path}: {result.nbytes} bytes went through where {sample.nbytes} were asked for")
    detail = {"path": f"{result.backend}, direct {result.direct}", "fs_type": result.fs_type}
    if result.reason:
        detail["reason"] = result.reason
    return dataclasses.replace(sample, detail=detail)
