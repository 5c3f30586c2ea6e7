"""A catalog of 10^8 objects on disk: how long it takes to open, and what it costs in memory."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.child import measure, run_child, status_bytes
from benchmarks.goals import Goal
from benchmarks.harness import BenchmarkError, Contender, Sample, median
from benchmarks.report import table
from benchmarks.streams.job import StreamJob, counted
from benchmarks.streams.parts import Part, Place, Samples, group_of, key_of
from benchmarks.streams.ratios import judged
from mlstor.errors import UsageError
from mlstor.units import format_gb

JOB = StreamJob
NOBJECTS = 10**8
PER_PREFIX = 10**6
NAME_BYTES = 15  # 0000000/0000000
OBJECT_BYTES = 4096
LOOKED_UP, LOOKS = 1000, 100
OPEN_S = 1.0
HEAP_BYTES = 1.0  # of an object; 64 are too much, and none is what is promised
LABEL = "Catalog.open"


def build(path: Path, n: int, per_prefix: int = PER_PREFIX) -> None:
    """Write the catalog that `mlstor.stream.catalog.Catalog.build` would write of `n` names, column by column.

    Its own way makes a Python object of each name, which takes minutes for 10^8 of them.
    """
    import numpy

    from mlstor.stream import catalog_file

    digits = numpy.arange(per_prefix)[:, None] // 10 ** numpy.arange(6, -1, -1) % 10 + ord("0")
    names = numpy.empty((per_prefix, NAME_BYTES), numpy.uint8)
    names[:, 8:] = digits
    names[:, 7] = ord("/")
    header = catalog_file.Header(n, n * NAME_BYTES, n * OBJECT_BYTES, b"")
    digest = catalog_file.Digest()
    with path.open("xb") as file:
        fd = file.fileno()
        put(fd, bytes(8), header.starts_at)
        for first in range(0, n, per_prefix):
            count = min(per_prefix, n - first)
            names[:, :7] = numpy.frombuffer(b"%07d" % (first // per_prefix), numpy.uint8)
            sizes = numpy.full(count, OBJECT_BYTES, "<u8").tobytes()
            ends = (numpy.arange(first + 1, first + count + 1, dtype="<u8") * NAME_BYTES).astype("<u8").tobytes()
            blob = names[:count].tobytes()
            digest.sizes.update(sizes)
            digest.ends.update(ends)
            digest.names.update(blob)
            put(fd, sizes, catalog_file.HEADER_BYTES + 8 * first)
            put(fd, ends, header.starts_at + 8 * (first + 1))
            put(fd, blob, header.names_at + NAME_BYTES * first)
        totals = (n, header.names_nbytes, header.total_bytes, digest.value(n))
        fields = catalog_file._FIELDS.pack(catalog_file.MAGIC, catalog_file.VERSION, 0, *totals)
        head = fields + catalog_file._check(fields)
        put(fd, head + bytes(catalog_file.HEADER_BYTES - len(head)), 0)


def put(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data`."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def name_of(index: int) -> str:
    """The name of an object."""
    return f"{index // PER_PREFIX:07d}/{index % PER_PREFIX:07d}"


def opened(job: StreamJob) -> Sample:
    """Open the catalog and take the first names of a random order; then its heap after 10^5 more.

    ``extra_rss_bytes`` is anonymous memory: pages of the file itself are the kernel's, and it takes them back.
    """
    import numpy

    from mlstor.stream.catalog import Catalog
    from mlstor.stream.order import Order

    draws = random.Random(job.seed)
    before_bytes = status_bytes("RssAnon")

    def work() -> tuple[Catalog, str]:
        catalog = Catalog.open(job.path)
        return catalog, catalog.name(len(catalog) - 1)

    sample, (catalog, last) = measure(job, work)
    if len(catalog) != job.nobjects or last != name_of(job.nobjects - 1):
        raise BenchmarkError(f"the catalog of {job.nobjects} objects has {len(catalog)}, the last one {last}")
    order = Order(len(catalog), job.seed, "permutation")
    held = []
    for look in range(LOOKS):
        indices = order.indices(0, look * LOOKED_UP, 1, LOOKED_UP)
        packed = catalog.pack(numpy.asarray(indices))
        at = draws.randrange(LOOKED_UP)
        start = int(packed.key_start[at])
        name = bytes(packed.names[start : start + int(packed.key_nbytes[at])]).decode()
        if name != name_of(int(indices[at])) or packed.sizes[at] != OBJECT_BYTES:
            raise BenchmarkError(f"object {indices[at]} is called {name}")
        held.append(packed)
    heap_bytes = status_bytes("RssAnon") - before_bytes
    sample = counted(sample, 1, os.path.getsize(job.path), objects=f"{len(catalog):,}")
    return dataclasses.replace(sample, extra_rss_bytes=max(heap_bytes, 0))


def keys(server: str) -> list[str]:
    """One, where files are measured."""
    return [key_of(server, "catalog", "10^8", LABEL)] if server == "files" else []


def bind(place: Place) -> list[Contender]:
    """Write the catalog.

    Raises
    ------
    UsageError
        If there is no room for it.
    """
    room = os.statvfs(place.directory)
    need_bytes, free_bytes = NOBJECTS * (16 + NAME_BYTES), room.f_bavail * room.f_frsize
    if free_bytes < 1.1 * need_bytes:
        raise UsageError(
            f"the catalog of 10^8 objects takes {format_gb(need_bytes)}, and {format_gb(free_bytes)} are free; "
            "name another directory with --dir, or leave it out with --only"
        )
    place.progress("writing a catalog of 10^8 objects")
    path = place.directory / "catalog"
    build(path, NOBJECTS)
    job = StreamJob(str(path), 0, place.touch_bytes, seed=place.seed, nobjects=NOBJECTS)
    (key,) = keys(place.server)
    return [
        Contender(
            key, group_of(place.server, "catalog", "10^8"), LABEL, partial(run_child, "streams.catalogs:opened", job)
        )
    ]


def goals(samples: Samples, server: str) -> list[Goal]:
    """Median time, and greatest heap of all rounds."""
    rows = []
    for key in keys(server):
        whats = ("catalog of 10^8 objects, cold: open and one name", "catalog of 10^8 objects: heap per object")
        targets = (f"<= {OPEN_S:g} s", f"< {HEAP_BYTES:g} B")
        if key not in samples:
            rows += [Goal(what, "not measured", target, None) for what, target in zip(whats, targets, strict=True)]
            continue
        open_s = median(sample.elapsed_s for sample in samples[key])
        heap = max(sample.extra_rss_bytes for sample in samples[key]) / NOBJECTS
        rows.append(judged(whats[0], f"{open_s:.4f} s", targets[0], open_s <= OPEN_S, len(samples[key])))
        rows.append(Goal(whats[1], f"{heap:.3f} B", targets[1], heap < HEAP_BYTES))
    return rows


def section(contenders: Sequence[Contender], samples: Samples) -> str:
    """Time and memory of opening."""
    rows = []
    for contender in contenders:
        if contender.label != LABEL:
            continue
        ours = samples[contender.key]
        times = [sample.elapsed_s * 1e3 for sample in ours]
        rows.append(
            [
                f"{ours[0].detail['objects']} objects, {ours[0].nbytes / 1e9:.1f} GB",
                f"{median(times):.1f}",
                f"{min(times):.1f}-{max(times):.1f}",
                f"{max(sample.extra_rss_bytes for sample in ours) / (1 << 20):.1f}",
            ]
        )
    head = ["catalog", "open and one name, ms", "least-most", "heap, 10^5 objects looked up, MiB"]
    return table(head, rows) if rows else ""


PART = Part(keys, bind, goals, section)
