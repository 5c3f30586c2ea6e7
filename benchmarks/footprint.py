"""What is measured against no contender: start-up time, and the memory of one rank of the largest model."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import BenchmarkError
from mlstor.errors import UsageError
from mlstor.units import format_gb

HELP_RUNS = 7
RANK = 600  # of llama3-1t: in the second data-parallel half, so its one file is the optimizer's
RANK_BYTES = 13_865_244_924


@dataclass(frozen=True)
class Footprint:
    """Peak memory of a process that writes, reads and verifies `nbytes`; `note` says why not measured."""

    peak_rss_bytes: int
    nbytes: int
    note: str = ""


def help_seconds() -> list[float]:
    """Wall times of ``python -m mlstor.checkpoint --help`` with its files in the page cache, in seconds."""
    command = [sys.executable, "-m", "mlstor.checkpoint", "--help"]
    times: list[float] = []
    for _ in range(HELP_RUNS + 1):
        start_ns = time.monotonic_ns()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        times.append((time.monotonic_ns() - start_ns) / 1e9)
        if done.returncode != 0 or "--model" not in done.stdout:
            raise BenchmarkError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return times[1:]  # the first brought the files in


def rank_footprint(directory: Path) -> Footprint:
    """Peak memory of one rank of llama3-1t below `directory`, which needs room for its 13.9 GB.

    ``ru_maxrss`` of a child begins at what its parent held; a parent that held more hides the child's figure.
    """
    free = os.statvfs(directory).f_bavail * os.statvfs(directory).f_frsize
    if free < RANK_BYTES * 1.05:
        return Footprint(
            0, RANK_BYTES, f"not measured: needs {format_gb(RANK_BYTES * 1.05)}, {format_gb(free)} are free"
        )
    with tempfile.TemporaryDirectory(prefix="rank-", dir=directory) as place:
        target, results = Path(place, "checkpoints"), Path(place, "results")
        target.mkdir()
        results.mkdir()
        words = ["--model", "llama3-1t", "--writes", "1", "--reads", "1", "--verify"]
        command = [sys.executable, "-m", "mlstor.checkpoint", *words, "--only-ranks", str(RANK)]
        with subprocess.Popen(
            [*command, "--results", str(results), str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            assert process.stdout is not None
            text = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)} failed with status {process.returncode}:\n{text[-2000:]}")
    own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak_bytes = usage.ru_maxrss * 1024
    if peak_bytes <= own_bytes:
        raise UsageError(f"the benchmark itself holds {format_gb(own_bytes)}: run --only rss by itself")
    return Footprint(peak_bytes, RANK_BYTES)
