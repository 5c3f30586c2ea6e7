"""MLPerf Storage's checkpoint fields, computed MLPerf's way, so that figures can be laid beside published
ones.
 MLPerf divides the checkpoint's size by rank 0's duration, whatever the other ranks do, takes the mean of
those rates, and writes "GB" where it means GiB (2^30). The phase's own rate, to the slowest rank's end, can
be much lower: both are given.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import msgspec

from mlstor.results import figures
from mlstor.results.figures import GIB
from mlstor.results.phase import Op, Phase
from mlstor.results.record import Record

LABEL = "MLPerf's way (rank 0, mean of rates, GiB/s)"
LAYOUT = "the MLPerf Storage v3.0 checkpoint file layout"
_PREFIX: dict[Op, str] = {"write": "save", "read": "load"}


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """MLPerf's four fields of one direction: rates in GiB/s (MLPerf writes GB), durations in s."""

    io_mean: float
    io_stdev: float
    duration_mean_s: float
    duration_stdev_s: float


def rank0_duration_ns(phase: Phase) -> int | None:
    """Duration of MLPerf's rank 0: from the barrier to the end of the process that ran logical rank 0.

    MLPerf gives each rank a process. Where a process runs several, its clock stops after the last of them:
    logical rank 0 alone would be an eighth of the work in a process that runs eight. None where rank 0 did
    not run.
    """
    columns = phase.ranks
    if 0 not in columns.rank:
        return None
    process = columns.process[columns.rank.index(0)]
    return max(end for end, owner in zip(columns.end_ns, columns.process, strict=True) if owner == process)


def fields(record: Record, op: Op) -> Fields | None:
    """MLPerf's four fields of `op` over the complete phases; None without any, or if rank 0 did not run."""
    sizes_and_times = [(phase.nbytes, rank0_duration_ns(phase)) for phase in figures.phases(record, op)]
    timed = [(nbytes, ns) for nbytes, ns in sizes_and_times if ns]
    if not timed:
        return None
    rates = [nbytes / GIB / (ns / 1e9) for nbytes, ns in timed]
    durations = [ns / 1e9 for _, ns in timed]
    return Fields(
        io_mean=figures.mean(rates),
        io_stdev=figures.population_stdev(rates),
        duration_mean_s=figures.mean(durations),
        duration_stdev_s=figures.population_stdev(durations),
    )


def metric(record: Record) -> dict[str, float]:
    """The `metric` object under MLPerf's names; a run that only wrote or only read has only its own four and
    the size.
    """
    made: dict[str, float] = {}
    for op, prefix in _PREFIX.items():
        of_op = fields(record, op)
        if of_op is not None:
            made[f"{prefix}_checkpoint_io_mean_GB_per_second"] = of_op.io_mean
            made[f"{prefix}_checkpoint_io_stdev_GB_per_second"] = of_op.io_stdev
            made[f"{prefix}_checkpoint_duration_mean_seconds"] = of_op.duration_mean_s
            made[f"{prefix}_checkpoint_duration_stdev_seconds"] = of_op.duration_stdev_s
    if made:
        made["checkpoint_size_GB"] = record.workload.nbytes / GIB
    return made


def _iso(unix_ns: int) -> str:
    """As DLIO writes times, without a zone, but always UTC."""
    moment = datetime.fromtimestamp(unix_ns // 10**9, timezone.utc).replace(tzinfo=None)
    return f"{moment.isoformat()}.{unix_ns % 10**9 // 1000:06d}"


def summary_json(record: Record) -> dict[str, Any]:
    """What MLPerf's ``summary.json`` holds of a checkpoint run, under its names, and mlstor's own figures
    under ``mlstor``.

    Per-host lists have one element per host, in the record's order. Keys that only tell of training data are
    left out.
    """
    own: dict[str, Any] = {"label": LABEL, "layout": LAYOUT, "run_id": record.run_id, "status": record.status}
    for op, prefix in _PREFIX.items():
        rates = figures.slowest_rank_rates(record, op, GIB)
        if rates:
            own[f"{prefix}_slowest_rank_mean_GiB_per_second"] = figures.mean(rates)
            own[f"{prefix}_total_bytes_over_total_time_GiB_per_second"] = figures.total_rate(record, op, GIB)
    return {
        "start": _iso(record.start_unix_ns),
        "num_accelerators": record.world.ranks,
        "num_hosts": record.world.hosts,
        "hostname": record.hosts[0].hostname if record.hosts else "",
        "metric": metric(record),
        "host_cpu_count": [host.cores_online for host in record.hosts],
        "host_memory_GB": [host.memory_bytes / GIB for host in record.hosts],
        "end": _iso(record.end_unix_ns) if record.end_unix_ns is not None else None,
        "mlstor": own,
    }
