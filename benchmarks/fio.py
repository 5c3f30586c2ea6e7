"""fio as the yardstick: a sweep picks its best cell, which then runs again in every round.

It gets its strongest settings: with io_uring registered buffers and files, a buffer that is not scrambled,
a file laid out by fallocate before the clock starts, its own clock (it ends after fsync) and its own count
of CPU (its start is left out).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Sample, median
from mlstor.errors import UsageError

MIB = 1 << 20
BLOCKS_BYTES = (1 * MIB, 4 * MIB, 16 * MIB)
DEPTHS = (4, 8, 16)
ENGINES = ("io_uring", "psync")
GRAIN_BYTES = 256 * MIB  # 16 blocks of 16 MiB: what the coarsest cell of the sweep divides
FINALISTS = 3  # run twice more: the best of one look would be the luckiest one
REGISTERED = ["--fixedbufs=1", "--registerfiles=1"]


@dataclass(frozen=True)
class Cell:
    """One set of fio's parameters.

    Attributes
    ----------
    engine : str
        ``"io_uring"`` or ``"psync"``.
    block_bytes : int
        Bytes per operation.
    depth : int
        Operations in flight: fio's iodepth with io_uring, with psync its number of processes.
    batch : int
        Operations submitted and reaped together; 1 is fio's default.
    registered : bool
        Buffers and files registered with the ring.
    """

    engine: str
    block_bytes: int
    depth: int
    batch: int = 1
    registered: bool = True

    def __str__(self) -> str:
        size = f"{self.block_bytes // MIB} MiB" if self.block_bytes >= MIB else f"{self.block_bytes // 1024} KiB"
        batch = f", batches of {self.batch}" if self.batch > 1 else ""
        plain = "" if self.registered or self.engine != "io_uring" else ", unregistered"
        return f"{self.engine}, {size} x {self.depth}{batch}{plain}"


SEQUENTIAL = [Cell(engine, block, depth) for engine in ENGINES for block in BLOCKS_BYTES for depth in DEPTHS]
RANDOM = [Cell("io_uring", 4096, 64, batch, registered) for batch in (1, 16) for registered in (False, True)]


def require_fio() -> str:
    """fio's version.

    Raises
    ------
    UsageError
        If there is no fio.
    """
    if shutil.which("fio") is None:
        raise UsageError("there is no fio; install it with apt-get install fio")
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def command(cell: Cell, mode: str, path: Path, nbytes: int, seconds: float = 0.0) -> list[str]:
    """fio's command line: `mode` is ``"write"``, ``"read"`` or ``"randread"``, which lasts `seconds`."""
    words = [
        "fio",
        "--name=cell",
        f"--filename={path}",
        f"--rw={mode}",
        f"--bs={cell.block_bytes}",
        f"--ioengine={cell.engine}",
        "--direct=1",
        "--group_reporting",
        "--output-format=json",
    ]
    jobs = cell.depth if cell.engine == "psync" else 1
    words.append(f"--size={nbytes // jobs}")
    if jobs > 1:
        words += [f"--numjobs={jobs}", f"--offset_increment={nbytes // jobs}"]
    if cell.engine == "io_uring":
        words += [f"--iodepth={cell.depth}", *(REGISTERED if cell.registered else [])]
        if cell.batch > 1:
            words += [f"--iodepth_batch_submit={cell.batch}", f"--iodepth_batch_complete_max={cell.batch}"]
    if mode == "write":
        words += ["--fallocate=native", "--end_fsync=1", "--scramble_buffers=0"]
    elif mode == "randread":
        words += ["--time_based", f"--runtime={seconds:g}", "--norandommap", "--randrepeat=0"]
    return words


def parse(text: str, direction: str) -> Sample:
    """The sample in fio's JSON; `direction` is ``"write"`` or ``"read"``.

    Raises
    ------
    BenchmarkError
        If fio reports an error, short I/O or no I/O at all.
    """
    # fio prints notes on standard output before the object.
    report: dict[str, Any] = json.loads(text[text.index("{") :])
    if len(report["jobs"]) != 1:
        raise BenchmarkError(f"fio reports {len(report['jobs'])} jobs where one group was asked for")
    job = report["jobs"][0]
    io = job[direction]
    if job["error"] or io["short_ios"] or io["runtime"] == 0:
        raise BenchmarkError(f"fio: error {job['error']}, {io['short_ios']} short operations, {io['runtime']} ms long")
    # usr_cpu and sys_cpu are percentages of job_runtime, which is summed over the processes of the group.
    cpu_s = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    return Sample(io["runtime"] / 1000, cpu_s, io["io_bytes"])


def run(cell: Cell, mode: str, path: Path, nbytes: int, seconds: float = 0.0) -> Sample:
    """Run one cell once, from a new file if it writes."""
    words = command(cell, mode, path, nbytes, seconds)
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(words)} failed with status {done.returncode}:\n{done.stderr[-2000:].strip()}")
    sample = parse(done.stdout, "write" if mode == "write" else "read")
    if mode != "randread" and sample.nbytes != nbytes:
        raise BenchmarkError(f"fio moved {sample.nbytes} bytes where {nbytes} were asked for")
    operations = sample.nbytes // cell.block_bytes if mode == "randread" else 0
    return Sample(sample.elapsed_s, sample.cpu_s, sample.nbytes, operations, detail={"path": f"{cell.engine}, direct"})


def sweep(
    cells: Sequence[Cell], measure: Callable[[Cell], Sample], progress: Callable[[str], None]
) -> tuple[Cell, dict[Cell, list[float]]]:
    """The best cell, and all rates: each cell runs once, the best three twice more; the best median wins."""
    rates = {cell: [measure(cell).rate] for cell in cells}
    finalists = sorted(cells, key=lambda cell: rates[cell][0], reverse=True)[:FINALISTS]
    for _ in range(2):
        for cell in finalists:
            rates[cell].append(measure(cell).rate)
    best = max(finalists, key=lambda cell: median(rates[cell]))
    progress(f"fio's best of {len(cells)} cells: {best}")
    return best, rates
