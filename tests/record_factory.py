"""Synthetic reports and records for the tests of the results package; every figure follows from its
arguments.
"""

from __future__ import annotations

import functools
from typing import Any

from mlstor.results import record as r
from mlstor.results.merge import merge_phase
from mlstor.results.percentiles import of_values
from mlstor.results.phase import (
    Cached,
    Histogram,
    Op,
    PathTaken,
    Phase,
    PhaseReport,
    Progress,
    RankFigures,
    Verification,
)

START_UNIX_NS = 1_790_000_000_123_456_789
FILE_NBYTES = 7 * 2**30


@functools.cache
def latencies(step_ns: int) -> Histogram:
    return of_values([900_000 + step_ns * i for i in range(200)])


def histograms(op: Op, kind: int) -> dict[str, Histogram]:
    made = {op: latencies(13_337 * (kind + 1)), "open": of_values([250_000])}
    return made if op == "read" else made | {"sync": of_values([31_000_000, 45_000_000])}


def number(op: Op, checkpoint: int) -> int:
    """Phases of the synthetic runs: up to 100 writes, then the reads."""
    return checkpoint - 1 + (100 if op == "read" else 0)


def report(
    process: int = 0, *, op: Op = "write", checkpoint: int = 1, per_host: int = 2, ranks: int = 1, **over: Any
) -> PhaseReport:
    """Process `process`'s report: rank p*ranks+i ends at 2 s + 100 ms per rank."""
    figures = [
        RankFigures(
            rank=rank,
            start_ns=1_000 * rank,
            first_done_ns=500_000_000 + 1_000_000 * rank,
            end_ns=2_000_000_000 + 100_000_000 * rank,
            nbytes=2 * FILE_NBYTES,
            nfiles=2,
        )
        for rank in range(process * ranks, (process + 1) * ranks)
    ]
    values: dict[str, Any] = {
        "number": number(op, checkpoint),
        "op": op,
        "checkpoint": checkpoint,
        "process": process,
        "host": process // per_host,
        "barrier_unix_ns": START_UNIX_NS + checkpoint * 10**10 + (0 if op == "write" else 10**12) + 1000 * process,
        "ranks": figures,
        "cpu_user_ns": 400_000_000,
        "cpu_system_ns": 300_000_000,
        "peak_rss_bytes": 200 * 2**20 + process,
        "worker_busy_ns": 1_000_000_000,
        "worker_wait_ns": 3_000_000_000,
        "workers": 2,
        "cores_allowed": 2,
        "histograms": histograms(op, process % 8),
        "interval_ns": 1_000_000_000,
        "series": [FILE_NBYTES, FILE_NBYTES - 5, 5],
        "paths": [
            PathTaken(
                backend="io_uring",
                direct="yes",
                fs_type="xfs",
                nfiles=2 * ranks,
                nbytes=2 * ranks * FILE_NBYTES,
            )
        ],
        "cached": Cached(verdict="no", how="O_DIRECT confirmed"),
        "verification": Verification(verified_nbytes=2 * ranks * FILE_NBYTES) if op == "read" else Verification(),
    }
    return PhaseReport(**(values | over))


def progress(process: int = 0, *, op: Op = "write", checkpoint: int = 1, per_host: int = 2, **over: Any) -> Progress:
    values: dict[str, Any] = {
        "number": number(op, checkpoint),
        "op": op,
        "checkpoint": checkpoint,
        "process": process,
        "host": process // per_host,
        "barrier_unix_ns": START_UNIX_NS + checkpoint * 10**10 + 1000 * process,
        "elapsed_ns": 1_500_000_000,
        "nbytes": FILE_NBYTES // 2,
    }
    return Progress(**(values | over))


def phase(processes: int = 4, **over: Any) -> Phase:
    return merge_phase([report(process, **over) for process in range(processes)], host_cores=[8] * processes)


def host(index: int = 0, **over: Any) -> r.Host:
    values: dict[str, Any] = {
        "hostname": f"node{index:04d}",
        "kernel": "6.8.0-40-generic",
        "cpu_model": "AMD EPYC 9654 96-Core Processor",
        "cores_online": 8,
        "affinity": "0-7",
        "affinity_narrow": False,
        "memory_bytes": 64 * 2**30,
        "cgroup": r.Cgroup(
            version=2, memory_limit_bytes=32 * 2**30, memory_used_bytes=10**9, cpu_limit_millicores=8000
        ),
        "numa": [r.NumaNode(node=n, cpus=f"{4 * n}-{4 * n + 3}", memory_bytes=32 * 2**30) for n in range(2)],
        "versions": {"python": "3.11.9", "numpy": "2.4.6", "mpi4py": "4.1.2", "liburing": "2.6"},
        "build": {"io_uring": True, "isal": True, "compiler": "gcc 13.2"},
        "boot_id": f"5c1f6a1e-0000-4000-8000-{index:012d}",
    }
    return r.Host(**(values | over))


def target(**over: Any) -> r.Target:
    values: dict[str, Any] = {
        "path": "/mnt/ckpt",
        "resolved_path": "/mnt/ckpt",
        "sharing": "shared",
        "sharing_how": "found",
        "fs_type": "xfs",
        "mount_options": "rw,noatime",
        "device": "/dev/nvme0n1",
        "memory_align_bytes": 4,
        "offset_align_bytes": 512,
    }
    return r.Target(**(values | over))


def record(processes: int = 4, *, per_host: int = 2, writes: int = 2, reads: int = 2, **over: Any) -> r.Record:
    hosts = -(-processes // per_host)
    nfiles = 2 * processes
    work = r.Workload(
        model="llama3-8b",
        ranks=processes,
        ranks_meaning=f"{processes} of {processes} ranks of llama3-8b",
        writes=writes,
        reads=reads,
        steps=["preallocate", "fdatasync", "rename", "fsync_dir"],
        block_bytes=4 * 2**20,
        depth=8,
        workers=2,
        nbytes=nfiles * FILE_NBYTES,
        nfiles=nfiles,
    )
    phases = [phase(processes, per_host=per_host, op="write", checkpoint=k) for k in range(1, writes + 1)]
    phases += [phase(processes, per_host=per_host, op="read", checkpoint=k) for k in range(1, reads + 1)]
    values: dict[str, Any] = {
        "run_id": "20261122-060822-1f3a",
        "status": "complete",
        "start_unix_ns": START_UNIX_NS,
        "end_unix_ns": START_UNIX_NS + 2 * 10**12,
        "command": ["python", "-m", "mlstor.checkpoint", "--model", "llama3-8b", "/mnt/ckpt"],
        "version": "0.1.0",
        "settings": {
            "block_bytes": r.setting(4 * 2**20, "default"),
            "timeout_s": r.setting(0.5, "environment"),
        },
        "workload": work,
        "world": r.World(
            ranks=processes,
            processes=processes,
            hosts=hosts,
            launcher="Open MPI",
            mpi_library="Open MPI v5.0.11",
            process_host=[process // per_host for process in range(processes)],
        ),
        "hosts": [host(index) for index in range(hosts)],
        "targets": [target()],
        "preflight": r.Preflight(
            checks=[
                r.Check(
                    name="room",
                    verdict="ok",
                    unit="bytes",
                    needed=2 * work.nbytes,
                    available=10**13,
                    limited_by="statvfs",
                )
            ],
            mlperf_memory_rule=r.MemoryRule(
                verdict="not met",
                nbytes_per_client=2 * work.nbytes // hosts,
                client_memory_bytes=32 * 2**30,
                memory_source="cgroup",
            ),
        ),
        "phases": phases,
    }
    return r.Record(**(values | over))
