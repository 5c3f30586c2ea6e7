"""What merging has in common for phases of any kind: columns, series, paths and verdicts of the processes' reports,
whatever the order they come in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlstor.errors import WorldError
from mlstor.results.phase import (
    MAX_DAMAGE,
    Cached,
    Histogram,
    PathTaken,
    ProcessColumns,
    ProcessReport,
    RankColumns,
    RankFigures,
    Reached,
    Series,
    Unfinished,
    Verification,
)

MAX_INTERVALS = 512
"""Intervals of a phase's series at most; longer ones are summed in pairs, which doubles interval_ns."""
MAX_SERIES_CELLS = 32_768
"""Hosts x intervals of a phase's series at most, as long as that leaves `MIN_INTERVALS`."""
MIN_INTERVALS = 16


def add_histograms(histograms: Iterable[Histogram]) -> Histogram:
    """Their sum; associative and commutative. An empty one adds nothing."""
    total = Histogram()
    buckets: dict[int, int] = {}
    for one in histograms:
        if one.count == 0:
            continue
        total.min_ns = one.min_ns if total.count == 0 else min(total.min_ns, one.min_ns)
        total.max_ns = max(total.max_ns, one.max_ns)
        total.count += one.count
        total.sum_ns += one.sum_ns
        for bucket, count in one.buckets:
            buckets[bucket] = buckets.get(bucket, 0) + count
    total.buckets = sorted(buckets.items())
    return total


def common(
    reports: Sequence[ProcessReport], progress: Sequence[Reached], processes: int | None, what: Callable[[Any], str]
) -> dict[str, Any]:
    """The fields of `AnyPhase` but `client`.

    Parameters
    ----------
    reports, progress
        Both in the order of `process`. A process may be in both if its report is not complete: then its progress is
        the later word.
    processes
        Processes of the run; None: those in `reports` and `progress`.
    what
        Names the phase that a report or a progress is of.

    Raises
    ------
    WorldError
        If they are of different phases, two are of one process, two tell of one rank, or there are none.
    """
    _check_one_phase(reports, progress, what)
    everyone: list[ProcessReport | Reached] = [*reports, *progress]
    first = min(everyone, key=lambda one: one.process)
    later = {one.process for one in progress}
    ranks = _rank_columns(reports)
    unfinished = [(one.process, one.host, one.elapsed_ns, one.nbytes) for one in progress]
    unfinished += [
        (one.process, one.host, max((r.end_ns for r in one.ranks), default=0), sum(r.nbytes for r in one.ranks))
        for one in reports
        if not one.complete and one.process not in later
    ]
    unfinished.sort()
    finished = [one for one in reports if one.complete]
    return {
        "number": first.number,
        "complete": len(finished) == (len({one.process for one in everyone}) if processes is None else processes),
        "barrier_unix_ns": first.barrier_unix_ns,
        "nbytes": sum(rank.nbytes for one in finished for rank in one.ranks) + sum(row[3] for row in unfinished),
        "ranks": ranks,
        "processes": _process_columns(reports, first.barrier_unix_ns),
        "unfinished": Unfinished(
            process=[row[0] for row in unfinished],
            host=[row[1] for row in unfinished],
            elapsed_ns=[row[2] for row in unfinished],
            nbytes=[row[3] for row in unfinished],
        ),
        "series": merge_series(reports),
        "paths": _paths(reports),
        "cached": _cached(reports),
        "verification": _verification(reports),
    }


def _check_one_phase(reports: Sequence[ProcessReport], progress: Sequence[Reached], what: Callable[[Any], str]) -> None:
    everyone: list[ProcessReport | Reached] = [*reports, *progress]
    if not everyone:
        raise WorldError("no process reported on the phase")
    phases = {(one.number, what(one)) for one in everyone}
    if len(phases) > 1:
        names = ", ".join(f"{name} (phase {number})" for number, name in sorted(phases))
        raise WorldError(f"the processes reported on different phases: {names}")
    final: list[ProcessReport | Reached] = [one for one in reports if one.complete]
    groups: list[Sequence[ProcessReport | Reached]] = [reports, progress, [*final, *progress]]
    for group in groups:
        for before, after in itertools.pairwise(sorted(group, key=lambda one: one.process)):
            if before.process == after.process:
                raise WorldError(f"process {after.process} reported twice on {what(after)}")


def _rank_columns(reports: Sequence[ProcessReport]) -> RankColumns:
    rows = sorted(((f.rank, r.process, r.host, f) for r in reports for f in r.ranks), key=lambda row: row[:3])
    for before, after in itertools.pairwise(rows):
        if before[0] == after[0]:
            raise WorldError(f"processes {before[1]} and {after[1]} both report on rank {after[0]}")

    def column(get: Callable[[RankFigures], int]) -> list[int]:
        return [get(row[3]) for row in rows]

    return RankColumns(
        rank=[row[0] for row in rows],
        process=[row[1] for row in rows],
        host=[row[2] for row in rows],
        start_ns=column(lambda f: f.start_ns),
        first_done_ns=column(lambda f: f.first_done_ns),
        end_ns=column(lambda f: f.end_ns),
        nbytes=column(lambda f: f.nbytes),
        nfiles=column(lambda f: f.nfiles),
    )


def _process_columns(reports: Sequence[ProcessReport], barrier_unix_ns: int) -> ProcessColumns:
    return ProcessColumns(
        process=[r.process for r in reports],
        cpu_user_ns=[r.cpu_user_ns for r in reports],
        cpu_system_ns=[r.cpu_system_ns for r in reports],
        peak_rss_bytes=[r.peak_rss_bytes for r in reports],
        worker_busy_ns=[r.worker_busy_ns for r in reports],
        worker_wait_ns=[r.worker_wait_ns for r in reports],
        workers=[r.workers for r in reports],
        cores_allowed=[r.cores_allowed for r in reports],
        barrier_skew_ns=[r.barrier_unix_ns - barrier_unix_ns for r in reports],
    )


def _coarser(row: Sequence[int], times: int) -> list[int]:
    return [sum(row[at : at + times]) for at in range(0, len(row), times)]


def merge_series(reports: Sequence[ProcessReport]) -> Series:
    """Bytes per interval, summed per host; short rows end in zeros.

    Processes may have coarsened their series by themselves: all are brought to the longest interval, which
    must be a multiple of the others, and then in pairs below `MAX_INTERVALS` and `MAX_SERIES_CELLS`.

    Raises
    ------
    WorldError
        If the intervals are not multiples of one another.
    """
    with_series = [report for report in reports if report.interval_ns and report.series]
    if not with_series:
        return Series()
    interval_ns = max(report.interval_ns for report in with_series)
    of_host: dict[int, list[int]] = {}
    for report in with_series:
        times, rest = divmod(interval_ns, report.interval_ns)
        if rest:
            mine_ns = report.interval_ns
            raise WorldError(f"process {report.process} counts bytes per {mine_ns} ns, another per {interval_ns} ns")
        row = of_host.setdefault(report.host, [])
        mine = _coarser(report.series, times)
        row.extend([0] * (len(mine) - len(row)))
        for at, nbytes in enumerate(mine):
            row[at] += nbytes
    length = max(len(row) for row in of_host.values())
    limit = min(MAX_INTERVALS, max(MIN_INTERVALS, MAX_SERIES_CELLS // len(of_host)))
    times = 1
    while -(-length // times) > limit:
        times *= 2
    hosts = sorted(of_host)
    rows = [_coarser(of_host[host] + [0] * (length - len(of_host[host])), times) for host in hosts]
    return Series(interval_ns=interval_ns * times, host=hosts, nbytes=rows)


def _paths(reports: Sequence[ProcessReport]) -> list[PathTaken]:
    total: dict[tuple[str, str, str, str], PathTaken] = {}
    for path in (path for report in reports for path in report.paths):
        key = (path.backend, path.direct, path.reason, path.fs_type)
        if key not in total:
            total[key] = PathTaken(backend=path.backend, direct=path.direct, reason=path.reason, fs_type=path.fs_type)
        total[key].nfiles += path.nfiles
        total[key].nbytes += path.nbytes
    return [total[key] for key in sorted(total)]


def _cached(reports: Sequence[ProcessReport]) -> Cached:
    """The worst verdict wins, and only those who gave it say how it is known."""
    for verdict in ("yes", "unknown", "no"):
        ways = sorted({r.cached.how for r in reports if r.cached.verdict == verdict})
        if ways:
            return Cached(
                verdict=verdict,
                how="; ".join(way for way in ways if way),
                resident_bytes=sum(r.cached.resident_bytes for r in reports),
                looked_at_bytes=sum(r.cached.looked_at_bytes for r in reports),
            )
    return Cached()


def _verification(reports: Sequence[ProcessReport]) -> Verification:
    damage = [damage for report in reports for damage in report.verification.damage]
    damage.sort(key=lambda d: (d.rank, d.file, d.offset))
    return Verification(
        verified_nbytes=sum(r.verification.verified_nbytes for r in reports),
        damaged_blocks=sum(r.verification.damaged_blocks for r in reports),
        damage=damage[:MAX_DAMAGE],
        damage_dropped=sum(r.verification.damage_dropped for r in reports) + max(0, len(damage) - MAX_DAMAGE),
    )
