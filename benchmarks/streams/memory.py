"""The memory of a rank that streams large objects, and what comes in while its consumer stalls."""

from __future__ import annotations

import dataclasses
import inspect
import os
import socket
import struct
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.child import measure, run_child
from benchmarks.goals import Goal
from benchmarks.harness import BenchmarkError, Contender, Sample, median
from benchmarks.report import table
from benchmarks.streams.job import StreamJob, counted
from benchmarks.streams.parts import Part, Place, Samples, group_of, key_of

if TYPE_CHECKING:
    from mlstor import ObjectStream

MIB = 1 << 20
SIZE, OBJECT_BYTES, STORED = "256MiB", 256 * MIB, 3
NOBJECTS = 6  # delivered in a run
STALL_S = 2.0
AHEAD_BYTES = 2 * OBJECT_BYTES  # in flight in the run that stalls: with less than two objects nothing is read ahead
BESIDE_BYTES = 64 * MIB  # a rank's memory beside objects: threads, connections, the catalog
HEADERS_BYTES = MIB  # what a server sends beside objects: the listing, headers
STREAMED, STALLED = "ObjectStream", "ObjectStream, stalled"
# tcp_info of linux/tcp.h: tcpi_bytes_received, a u64 behind tcpi_bytes_acked
TCP_BYTES_RECEIVED = struct.Struct("=128xQ")


@dataclasses.dataclass(frozen=True)
class MemoryJob(StreamJob):
    """A `StreamJob` whose `seconds` are those of the stall.

    Attributes
    ----------
    in_flight_bytes : int
        The stream's setting; 0: its default.
    """

    in_flight_bytes: int = 0


JOB = MemoryJob


def default_in_flight_bytes() -> int:
    """The stream's own default."""
    from mlstor import ObjectStream

    return int(inspect.signature(ObjectStream.__init__).parameters["in_flight_bytes"].default)


def open_stream(job: MemoryJob) -> ObjectStream:
    """An endless stream with default settings but for `job.in_flight_bytes`."""
    from mlstor import ObjectStream

    options: dict[str, Any] = {"endpoint": job.endpoint}
    if job.path.startswith("s3://"):
        options["anonymous"] = True
    if job.in_flight_bytes:
        options["in_flight_bytes"] = job.in_flight_bytes
    return ObjectStream(job.path, prefix=f"{job.prefix}/", seed=job.seed, epochs=None, **options)


def streamed(job: MemoryJob) -> Sample:
    """Objects one after the other, each held until the next has come, as by ``for obj in stream``."""
    open_stream(job).close()  # what is imported late is no memory of the stream

    def work() -> int:
        nbytes = 0
        with open_stream(job) as stream:
            for number, obj in enumerate(stream, 1):
                nbytes += checked(job, obj.data)
                if number == job.nobjects:
                    break
        return nbytes

    sample, nbytes = measure(job, work)
    return counted(sample, job.nobjects, nbytes, setting=setting(job))


def stalled(job: MemoryJob) -> Sample:
    """The same with a stall behind the first object; ``nbytes`` is what came in by its end beyond that object."""
    open_stream(job).close()

    def work() -> int:
        with open_stream(job) as stream:
            held = next(stream)
            delivered_bytes = checked(job, held.data)
            time.sleep(job.seconds)
            ahead_bytes = received_bytes() - delivered_bytes
            for _ in range(job.nobjects - 1):  # and it goes on
                held = next(stream)
                checked(job, held.data)
        return ahead_bytes

    sample, ahead_bytes = measure(job, work)
    if ahead_bytes < 0:
        raise BenchmarkError("connections were closed while the consumer stalled: what they brought is not known")
    return counted(sample, job.nobjects, ahead_bytes, setting=setting(job))


def checked(job: MemoryJob, data: memoryview) -> int:
    """Bytes of an object, after a look at its length and both of its ends."""
    if len(data) != job.nbytes or not (any(data[:4096]) and any(data[-4096:])):
        raise BenchmarkError(f"an object of {len(data)} bytes where {job.nbytes} were written")
    return len(data)


def setting(job: MemoryJob) -> str:
    """The setting in words."""
    nbytes = job.in_flight_bytes or default_in_flight_bytes()
    return f"in_flight_bytes {nbytes // MIB} MiB" + ("" if job.in_flight_bytes else ", the default")


def received_bytes() -> int:
    """What the kernel has acknowledged on the TCP connections that this process has now; mlstor is not asked."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_BYTES_RECEIVED.size)
                    total += TCP_BYTES_RECEIVED.unpack(info)[0]
        except FileNotFoundError:
            continue  # the directory's own descriptor
    return total


def keys(server: str) -> list[str]:
    """Two on each server that has a network before it."""
    return [] if server == "files" else [key_of(server, "stream", SIZE, label) for label in (STREAMED, STALLED)]


def bind(place: Place) -> list[Contender]:
    """A stream with default settings, and one that stalls."""
    job = MemoryJob(
        place.url,
        OBJECT_BYTES,
        place.touch_bytes,
        seed=place.seed,
        endpoint=place.endpoint,
        prefix=f"get-{SIZE}",
        nobjects=NOBJECTS,
    )
    stall = dataclasses.replace(job, seconds=STALL_S, in_flight_bytes=AHEAD_BYTES)
    runs = {
        STREAMED: partial(run_child, "streams.memory:streamed", job),
        STALLED: partial(run_child, "streams.memory:stalled", stall),
    }
    group = group_of(place.server, "stream", SIZE)
    return [Contender(key_of(place.server, "stream", SIZE, label), group, label, run) for label, run in runs.items()]


def goals(samples: Samples, server: str) -> list[Goal]:
    """The greatest of all rounds: memory by default settings, and what was received ahead of a stalled consumer."""
    if not keys(server):
        return []
    streamed_key, stalled_key = keys(server)
    default_bytes = default_in_flight_bytes()
    most = max(default_bytes, OBJECT_BYTES) + OBJECT_BYTES + BESIDE_BYTES
    rows = []
    what = "memory of a rank that streams 256 MiB objects, by default"
    parts = f"in flight {default_bytes // MIB}, the consumer's object 256, beside {BESIDE_BYTES // MIB}"
    target = f"<= {most // MIB} MiB: {parts}"
    if streamed_key in samples:
        peak = max(sample.extra_rss_bytes for sample in samples[streamed_key])
        rows.append(Goal(what, f"{peak / MIB:.0f} MiB", target, peak <= most))
    else:
        rows.append(Goal(what, "not measured", target, None))
    what = f"received ahead of a consumer that stalls for {STALL_S:g} s"
    target = f"<= {AHEAD_BYTES // MIB} MiB, the setting, and not nothing"
    if stalled_key in samples:
        ahead = [sample.nbytes for sample in samples[stalled_key]]
        met = max(ahead) <= AHEAD_BYTES + HEADERS_BYTES and min(ahead) > HEADERS_BYTES
        rows.append(Goal(what, f"{max(ahead) / MIB:.1f} MiB", target, met))
    else:
        rows.append(Goal(what, "not measured", target, None))
    return rows


def section(contenders: Sequence[Contender], samples: Samples) -> str:
    """Memory above what the process held at the start, greatest of all rounds."""
    rows = []
    for contender in contenders:
        if contender.group.split(" ")[1:] != ["stream", SIZE]:
            continue
        ours = samples[contender.key]
        peak = max(sample.extra_rss_bytes for sample in ours) / MIB
        if contender.label == STREAMED:
            rate, ahead = f"{median(sample.nbytes / sample.elapsed_s for sample in ours) / 1e9:.2f}", "-"
        else:
            rate, ahead = "-", f"{max(sample.nbytes for sample in ours) / MIB:.1f}"
        rows.append([contender.label, ours[0].detail["setting"], rate, f"{peak:.0f}", ahead])
    if not rows:
        return ""
    head = ["256 MiB objects", "setting", "GB/s", "peak above the start, MiB", "received ahead, MiB"]
    return table(head, rows)


PART = Part(keys, bind, goals, section, sizes=(SIZE,))
