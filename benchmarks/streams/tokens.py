"""Token reads: 4096-byte records of several large files in random order, against the best fio of a sweep."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import fio as yardstick
from benchmarks.child import ROOT, run_child
from benchmarks.goals import Goal
from benchmarks.harness import BenchmarkError, Contender, Sample, drop_caches, require_uncached
from benchmarks.streams.job import StreamJob
from benchmarks.streams.parts import Part, Place, Samples, group_of, key_of, sweep, twin
from benchmarks.streams.ratios import rate

RECORD_BYTES = 4096
NFILES, FILE_BYTES = 16, 64 << 20
IN_FLIGHT = 64
SIZE, PREFIX = "4KiB-records", "tokens"
OURS, FIO = "mlstor", "fio"
LEAST_RATIO = 0.9
PATIENCE_S = 60.0


def key(client: str) -> str:
    """Of a contender on the files."""
    return key_of("files", "get", SIZE, client)


def keys(server: str) -> list[str]:
    """Of both contenders."""
    return [key(OURS), key(FIO)] if server == "files" else []


def bind(place: Place) -> list[Contender]:
    """Write the files, sweep, and return ours and the best cell of fio."""
    place.progress(f"writing {NFILES} files of records")
    job = StreamJob(str(place.directory), FILE_BYTES, 0, prefix=PREFIX, nobjects=NFILES, in_flight=2, seed=place.seed)
    run_child("streams.ours:fill", job)
    files = [place.directory / job.key(number) for number in range(NFILES)]
    drop_caches(files)

    def uncached(read: Callable[[], Sample]) -> Sample:
        sample = read()
        require_uncached(files)  # or the reads came through the page cache, and are no figure
        return sample

    def fio(cell: yardstick.Cell) -> Sample:
        together = Path(":".join(map(str, files)))  # fio's list; it takes them in turn, which costs it the least
        return yardstick.run(cell, "randread", together, NFILES * FILE_BYTES, place.seconds)

    cells = {str(cell): partial(uncached, partial(fio, cell)) for cell in yardstick.RANDOM}
    best = sweep(f"{FIO} over records", cells, place)
    group = group_of("files", "get", SIZE)
    ours = Contender(key(OURS), group, OURS, partial(uncached, partial(stream, files[0].parent, place)))
    return [ours, Contender(key(FIO), group, f"fio, {best}", cells[best]), twin(ours)]


def stream(directory: Path, place: Place) -> Sample:
    """``mlstor stream --pattern tokens`` as a user runs it: the figures of its record, from its barrier to its end."""
    with tempfile.TemporaryDirectory(prefix="mlstor-bench-") as results:
        command = [
            *(sys.executable, "-m", "mlstor.stream", str(directory), "--pattern", "tokens"),
            *("--duration", f"{place.seconds:g}s", "--workers", "1", "--in-flight", str(IN_FLIGHT)),
            *("--seed", str(place.seed), "--no-live", "--results", results),
        ]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, timeout=place.seconds + PATIENCE_S, check=False
        )
        if done.returncode:
            raise BenchmarkError(f"mlstor stream ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        (record,) = Path(results).glob("*/record.json")
        phase = json.loads(record.read_text())["phases"][-1]
    reads, processes, (path,) = phase["ops"]["get-range"], phase["processes"], phase["paths"]
    if reads["failed"] or reads["nbytes"] != reads["count"] * RECORD_BYTES or path["direct"] != "yes":
        raise BenchmarkError(f"mlstor stream: {reads['failed']} reads failed, direct {path['direct']}")
    cpu_ns = processes["cpu_user_ns"][0] + processes["cpu_system_ns"][0]
    elapsed_s = max(phase["ranks"]["end_ns"]) / 1e9
    detail = {"path": f"{path['backend']}, direct {path['direct']}"}
    return Sample(elapsed_s, cpu_ns / 1e9, reads["nbytes"], reads["count"], detail=detail)


def goals(samples: Samples, server: str) -> list[Goal]:
    """Against fio."""
    if server != "files":
        return []
    what = f"4 KiB records of {NFILES} files, depth {IN_FLIGHT}: rate / best fio"
    return [rate(samples, what, key(OURS), [key(FIO)], LEAST_RATIO)]


PART = Part(keys, bind, goals)
