"""Synthetic reports and records of object streams for the tests of the results package; every figure follows from its
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from record_factory import START_UNIX_NS, host

from mlstor.results import record as r
from mlstor.results.percentiles import of_values
from mlstor.results.phase import Cached, RankFigures
from mlstor.results.stream import (
    SIZE_CLASSES_FROM,
    Epoch,
    OpFigures,
    SizeClass,
    Slice,
    StreamPhase,
    StreamProgress,
    StreamReport,
    TargetSlice,
    size_class,
)
from mlstor.results.stream_merge import merge_stream
from mlstor.results.stream_verdicts import server_cache
from mlstor.results.stream_workload import CopyWorkload, StoreUsed, StreamWorkload

NBYTES = 65_536
COUNT = 100


def part(times_ns: Sequence[int], nbytes: int = NBYTES) -> dict[str, Any]:
    """The fields of a `Slice` of transfers of `nbytes` bytes each."""
    return {"count": len(times_ns), "nbytes": nbytes * len(times_ns), "total": of_values(times_ns)}


def times(process: int = 0, count: int = COUNT) -> list[int]:
    return [1_000_000 + 10_000 * i + 100 * process for i in range(count)]


def op(times_ns: Sequence[int] = tuple(times()), nbytes: int = NBYTES, **over: Any) -> OpFigures:
    from_bytes = SIZE_CLASSES_FROM[size_class(nbytes)]
    values: dict[str, Any] = {
        **part(times_ns, nbytes),
        "connections": 4,
        "ttfb": of_values([one // 2 for one in times_ns]),
        "sizes": [SizeClass(from_bytes=from_bytes, **part(times_ns, nbytes))],
    }
    return OpFigures(**(values | over))


def report(process: int = 0, *, per_host: int = 2, end_ns: int = 2 * 10**9, **over: Any) -> StreamReport:
    ops = over["ops"] if "ops" in over else {"get": op(times(process))}
    count, nbytes = sum(one.count for one in ops.values()), sum(one.nbytes for one in ops.values())
    values: dict[str, Any] = {
        "number": 0,
        "name": "stream",
        "ops": ops,
        "process": process,
        "host": process // per_host,
        "barrier_unix_ns": START_UNIX_NS + 1000 * process,
        "ranks": [RankFigures(process, 0, 1_000_000, end_ns, nbytes, count)],
        "cpu_user_ns": 40_000_000,
        "cpu_system_ns": 10_000_000,
        "peak_rss_bytes": 100 * 2**20 + process,
        "worker_busy_ns": 10**9,
        "worker_wait_ns": 3 * 10**9,
        "workers": 2,
        "cores_allowed": 2,
        "interval_ns": 10**9,
        "series": [nbytes // 2, nbytes - nbytes // 2],
        "cached": Cached(verdict="no", how="objects come over the network"),
        "epochs": [Epoch(epoch=0, temperature="cold", start_ns=0, end_ns=end_ns, count=count, nbytes=nbytes)],
        "server_cache": server_cache(100 * 10**9, 30 * 10**9, "AIStore's sysinfo"),
    }
    return StreamReport(**(values | over))


def progress(process: int = 0, **over: Any) -> StreamProgress:
    values: dict[str, Any] = {
        "number": 0,
        "name": "stream",
        "process": process,
        "host": process // 2,
        "barrier_unix_ns": START_UNIX_NS + 1000 * process,
        "elapsed_ns": 3 * 10**9,
        "nbytes": 10**9,
        "count": 1000,
    }
    return StreamProgress(**(values | over))


def phase(processes: int = 2, **over: Any) -> StreamPhase:
    return merge_stream([report(process, **over) for process in range(processes)], host_cores=[8] * processes)


def rich_op(process: int = 0) -> OpFigures:
    """An operation of which everything is told: two size classes and targets, cold and warm, retries and a proxy."""
    mine = times(process)
    small, large = mine[:40], mine[40:]
    whole = op(
        mine,
        failed=3,
        cancelled=1,
        errors={"HTTP 404": 2, "reset": 1},
        retries=5,
        retried_by={"HTTP 503": 4},
        redirect=of_values([200_000] * len(mine)),
        from_intended=of_values([one + 5_000 for one in mine]),
        retried=of_values(mine[-4:]),
        cold=Slice(**part(small)),
        warm=Slice(**part(large)),
        sizes=[SizeClass(from_bytes=4096, **part(small, 8192)), SizeClass(from_bytes=16384, **part(large, 20000))],
        targets=[
            TargetSlice(name="t[one]", failed=3, **part(small)),
            TargetSlice(name="t[two]", **part(large)),
        ],
    )
    whole.nbytes = 40 * 8192 + 60 * 20000
    return whole


def workload(**over: Any) -> StreamWorkload:
    values: dict[str, Any] = {
        "urls": ["s3://bucket/train"],
        "ranks": 2,
        "seed": 7,
        "catalog_count": 200,
        "catalog_nbytes": 200 * NBYTES,
        "catalog_source": "listing",
        "epochs": 1,
        "mix_ppm": {"get": 1_000_000},
        "workers": 2,
        "in_flight": 8,
    }
    return StreamWorkload(**(values | over))


def copy_workload(**over: Any) -> CopyWorkload:
    values: dict[str, Any] = {
        "source": "s3://bucket/train",
        "destination": "/mnt/nvme/train",
        "ranks": 1,
        "count": 100,
        "nbytes": 100 * NBYTES,
        "workers": 2,
        "in_flight": 8,
    }
    return CopyWorkload(**(values | over))


def record(processes: int = 2, **over: Any) -> r.StreamRecord:
    hosts = -(-processes // 2)
    values: dict[str, Any] = {
        "run_id": "20261122-060822-1f3a",
        "status": "complete",
        "start_unix_ns": START_UNIX_NS,
        "end_unix_ns": START_UNIX_NS + 10**10,
        "command": ["python", "-m", "mlstor.stream", "s3://bucket/train"],
        "version": "0.1.0",
        "settings": {},
        "workload": workload(),
        "world": r.World(ranks=processes, processes=processes, hosts=hosts),
        "hosts": [host(index) for index in range(hosts)],
        "targets": [],
        "stores": [StoreUsed(url="s3://bucket/train", facts={"endpoint": "http://localhost:8333", "signed": True})],
        "preflight": r.Preflight(),
        "phases": [phase(processes)],
    }
    return r.StreamRecord(**(values | over))
