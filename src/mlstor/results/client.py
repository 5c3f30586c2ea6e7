"""Was the client the limit? One rule, stated once and written beside every verdict.

Streams have one more clause, since their processes may all end at the same moment, when a duration is over: then the
one that happened to be last tells less than all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mlstor.results.phase import Client, ProcessReport

BUSY_PERCENT = 75
"""Share of a worker's time on the CPU from which on more I/O can hardly be in flight; a choice, not a law."""
CPU_PERCENT = 90
"""Share of the allowed cores from which on there is no CPU left to submit more."""

RULE = (
    "The client is the limit if, in the process that ended last, workers were busy for "
    f">= {BUSY_PERCENT} % of busy + wait, or that process used >= {CPU_PERCENT} % of "
    "(phase time x cores it may run on), or all the run's processes on a host used "
    f">= {CPU_PERCENT} % of (phase time x cores usable on that host); unknown if neither of the first two "
    "was measured. Memory traffic and NIC load are no part of the rule."
)
STREAM_RULE = (
    "The client is the limit if, in the process that ended last or over all processes, workers were busy for "
    f">= {BUSY_PERCENT} % of busy + wait, or that process used >= {CPU_PERCENT} % of "
    "(measured time x cores it may run on), or all the run's processes on a host used "
    f">= {CPU_PERCENT} % of (measured time x cores usable on that host); unknown if neither workers nor CPU time "
    "were measured. Memory traffic is no part of the rule; the network has a verdict of its own."
)


def percent(part: int, whole: int) -> int:
    """Whole percent, rounded down."""
    return 100 * part // whole


def _cpu_ns(report: ProcessReport) -> int:
    return report.cpu_user_ns + report.cpu_system_ns


def whole_host(values: Sequence[tuple[int, int | None]], hosts: set[int]) -> int | None:
    """Sum over hosts of what one process of each gave; None unless every host gave it."""
    known = {host: value for host, value in values if value is not None}
    return sum(known.values()) if hosts and known.keys() == hosts else None


def measured_ns(report: ProcessReport) -> int:
    """What counts of a process's time in a phase, without a warm-up."""
    return max((r.end_ns for r in report.ranks), default=0) - min((r.start_ns for r in report.ranks), default=0)


def _verdict(
    reports: Sequence[ProcessReport], host_cores: Sequence[int], stream: bool
) -> tuple[Literal["yes", "no", "unknown"], str]:
    ends = [(max((r.end_ns for r in report.ranks), default=0), -report.process, report) for report in reports]
    wall_ns, _, slowest = max(ends, default=(0, 0, None))
    if slowest is None or wall_ns == 0:
        return "unknown", "no process finished the phase"
    if stream:
        wall_ns = max(1, measured_ns(slowest))
    found: list[str] = []
    seen: list[str] = []

    def look(share: int, limit: int, words: str) -> None:
        (found if share >= limit else seen).append(words)

    worker_ns = slowest.worker_busy_ns + slowest.worker_wait_ns
    if worker_ns:
        share = percent(slowest.worker_busy_ns, worker_ns)
        look(share, BUSY_PERCENT, f"workers of process {slowest.process} busy {share} % of their time")
    if stream and len(reports) > 1 and (all_ns := sum(r.worker_busy_ns + r.worker_wait_ns for r in reports)):
        share = percent(sum(report.worker_busy_ns for report in reports), all_ns)
        look(share, BUSY_PERCENT, f"those of all processes {share} %")
    if slowest.cores_allowed and _cpu_ns(slowest):
        share = percent(_cpu_ns(slowest), wall_ns * slowest.cores_allowed)
        look(
            share,
            CPU_PERCENT,
            f"process {slowest.process} used {share} % of its {slowest.cores_allowed} core(s)",
        )
    measured = bool(found or seen)
    cpu_of_host: dict[int, int] = {}
    for report in reports:
        cpu_of_host[report.host] = cpu_of_host.get(report.host, 0) + _cpu_ns(report)
    for host, cpu_ns in sorted(cpu_of_host.items()):
        cores = host_cores[host] if host < len(host_cores) else 0
        if cores and (share := percent(cpu_ns, wall_ns * cores)) >= CPU_PERCENT:
            found.append(f"the run's processes used {share} % of host {host}'s {cores} core(s)")
    if found:
        # Every host of a large run may be named; the first few tell it.
        more = f" and {len(found) - 4} more" if len(found) > 4 else ""
        return "yes", "; ".join(found[:4]) + more
    return ("no", "; ".join(seen)) if measured else ("unknown", "neither workers nor CPU time were measured")


def judge(reports: Sequence[ProcessReport], host_cores: Sequence[int] = (), *, stream: bool = False) -> Client:
    """The verdict on a phase by `RULE`, or on one of a stream by `STREAM_RULE`.

    Parameters
    ----------
    reports
        One per process that finished the phase.
    host_cores
        Cores usable on each host (index as in the record: the least of cores online, affinity of all its
        processes and cgroup quota); 0 or absent where it is not known, and then the host's part of the rule
        is left out.
    """
    hosts = {report.host for report in reports}
    memory = whole_host([(r.host, r.memory_traffic_bytes) for r in reports], hosts)
    nic = whole_host([(r.host, r.nic_bytes) for r in reports], hosts)
    limited, reason = _verdict(reports, host_cores, stream)
    return Client(
        limited=limited,
        reason=reason,
        rule=STREAM_RULE if stream else RULE,
        memory_traffic_bytes="unknown" if memory is None else memory,
        nic_bytes="unknown" if nic is None else nic,
    )
