"""One contender in a fresh process: ``python -m benchmarks.child KEY JOB``, a JSON object each way.

The clock and the CPU are taken here, round the I/O alone. A fresh process per contender gives each the same
heap, and keeps the memory of one out of the figures of the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import mmap
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.harness import BenchmarkError, Sample

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
PATIENCE_S = 900.0  # a contender that takes longer hangs


@dataclasses.dataclass(frozen=True)
class Job:
    """What a contender is to do.

    Attributes
    ----------
    path : str
        File or directory to write or read.
    nbytes : int
        Payload in bytes.
    touch_bytes : int
        Memory that is touched and released just before the clock starts.
    threads : int
        Threads of DCP's writer.
    seconds : float
        Length of a run of random reads.
    seed : int
        Of the offsets of random reads.
    """

    path: str
    nbytes: int
    touch_bytes: int
    threads: int = 1
    seconds: float = 0.0
    seed: int = 0


def run_child(function: str, job: Job) -> Sample:
    """Run ``benchmarks.<module>:<function>`` on `job` in a fresh process.

    Raises
    ------
    BenchmarkError
        If the process fails or takes longer than 15 minutes.
    """
    command = [sys.executable, "-m", "benchmarks.child", function, json.dumps(dataclasses.asdict(job))]
    environment = dict(os.environ)
    given = environment.get("PYTHONPATH", "")
    # The child starts in the repository; relative entries of the caller's path keep their meaning.
    entries = [str(Path(entry).resolve()) for entry in given.split(os.pathsep) if entry]
    environment["PYTHONPATH"] = os.pathsep.join([*entries, str(ROOT)])
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{function} did not end within {PATIENCE_S:.0f} s") from None
    if done.returncode != 0:
        raise BenchmarkError(f"{function} failed with status {done.returncode}:\n{done.stderr[-2000:].strip()}")
    return Sample(**json.loads(done.stdout.splitlines()[-1]))


def touch_memory(nbytes: int) -> None:
    """Touch and release `nbytes` of memory, so that whoever allocates next finds it backed by the host.

    In huge pages: pieces of 4 KiB come back scattered, and what is made of them then costs the next owner two to five
    times as much, another amount each time.
    """
    if nbytes == 0:
        return
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:: mmap.PAGESIZE] = bytes(-(-nbytes // mmap.PAGESIZE))


def measure(job: Job, work: Callable[[], T]) -> tuple[Sample, T]:
    """Run `work` between two looks at the clock and at this process's CPU; ``job.nbytes`` is the payload."""
    touch_memory(job.touch_bytes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the peak of resident memory
    held_bytes = status_bytes("VmRSS")
    cpu_s, start_ns = process_cpu_s(), time.monotonic_ns()
    value = work()
    end_ns, end_cpu_s = time.monotonic_ns(), process_cpu_s()
    extra_bytes = max(0, status_bytes("VmHWM") - held_bytes)
    return Sample((end_ns - start_ns) / 1e9, end_cpu_s - cpu_s, job.nbytes, extra_rss_bytes=extra_bytes), value


def process_cpu_s() -> float:
    """User and system time of this process, all threads, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def status_bytes(name: str) -> int:
    """A field of /proc/self/status that is given in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/self/status has no {name}")


def touch_only(job: Job) -> Sample:
    """Only touch memory: what a contender that is no Python program gets before it starts."""
    touch_memory(job.touch_bytes)
    return Sample(0.0, 0.0, 0)


def main() -> None:
    """Run one function and print its sample as the last line of standard output."""
    name, function = sys.argv[1].split(":")
    module = importlib.import_module(f"benchmarks.{name}")
    sample = getattr(module, function)(getattr(module, "JOB", Job)(**json.loads(sys.argv[2])))
    print(json.dumps(dataclasses.asdict(sample)), flush=True)
    os._exit(0)  # a client's threads may abort in an interpreter that ends around them (obstore 0.12 with asyncio)


if __name__ == "__main__":
    main()
