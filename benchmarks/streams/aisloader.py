"""The real aisloader against the same cluster, as a process of its own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.child import touch_memory
from benchmarks.harness import BenchmarkError, Sample
from benchmarks.streams.job import StreamJob

JOB = StreamJob
PROGRAM = "BENCHMARK_AISLOADER"  # the path of the program; set by the benchmark
PATIENCE_S = 120.0


def get(job: StreamJob) -> Sample:
    """All objects in its random order for the job's seconds."""
    return run(job, "get", ["-pctput=0"])


def put(job: StreamJob) -> Sample:
    """Objects of names of its own for the job's seconds; it makes their bytes while its clock runs."""
    return run(job, "put", ["-pctput=100", "-skiplist", f"-minsize={job.nbytes}", f"-maxsize={job.nbytes}"])


def run(job: StreamJob, op: str, words: list[str]) -> Sample:
    """One run: the count, bytes and time that it tells, and its process's CPU from start to end."""
    touch_memory(job.touch_bytes)
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory, "stats.json")
        command = [
            os.environ[PROGRAM],
            f"-bucket={job.path}",
            f"-subdir={job.prefix}",
            "-cleanup=false",
            *words,
            f"-numworkers={job.in_flight}",
            f"-duration={job.seconds:g}s",
            "-statsinterval=0",
            "-json",
            f"-stats-output={output}",
            f"-seed={job.seed or 1}",
            "-quiet",
        ]
        environment = {**os.environ, "AIS_ENDPOINT": job.endpoint}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=job.seconds + PATIENCE_S, check=False
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise BenchmarkError(f"aisloader ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
        said: dict[str, Any] = json.loads(output.read_text())[-1][op]
    operations, nbytes, duration_ns = int(said["count"]), int(said["bytes"]), int(said["duration"])
    if said["errors"] or nbytes != operations * job.nbytes or not operations:
        raise BenchmarkError(f"aisloader: {said}")
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(duration_ns / 1e9, cpu_s, nbytes, operations)
