"""What is derived from a record when it is shown. GB is 10^9 bytes, GiB 2^30; rates are per second."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from mlstor.results.phase import AnyPhase, Op, Phase
from mlstor.results.record import Record

GB = 10**9
GIB = 2**30


class Spread(msgspec.Struct, frozen=True):
    """Smallest, middle and largest of some figures."""

    min: int
    median: int
    max: int


def spread(values: Sequence[int]) -> Spread | None:
    """Smallest, lower median and largest; None of nothing."""
    ordered = sorted(values)
    return Spread(ordered[0], ordered[(len(ordered) - 1) // 2], ordered[-1]) if ordered else None


def wall_ns(phase: AnyPhase) -> int:
    """From the barrier to the slowest rank's end; of an unfinished phase, as far as it is known."""
    return max([*phase.ranks.end_ns, *phase.unfinished.elapsed_ns], default=0)


def measured_ns(phase: AnyPhase) -> int:
    """What counts of `wall_ns`: from the first rank's start, which in a stream is the end of the warm-up."""
    return wall_ns(phase) - min(phase.ranks.start_ns, default=0)


def covered_ns(phase: AnyPhase) -> int:
    """`measured_ns` as far as the reports of the phase go: in a phase that was killed, progress may go further."""
    return max(phase.ranks.end_ns, default=0) - min(phase.ranks.start_ns, default=0)


def per_s(count: int, duration_ns: int) -> float | None:
    """Operations per second; None if no time passed."""
    return count / (duration_ns / 1e9) if duration_ns > 0 else None


def rate(nbytes: int, duration_ns: int, unit: int = GB) -> float | None:
    """`unit` bytes (GB by default) per second; None if no time passed."""
    return nbytes / unit / (duration_ns / 1e9) if duration_ns > 0 else None


def cpu_ns(phase: AnyPhase) -> int:
    """CPU time, user and system, of all processes."""
    return sum(phase.processes.cpu_user_ns) + sum(phase.processes.cpu_system_ns)


def cpu_s_per_gb(phase: AnyPhase) -> float | None:
    """CPU seconds of all processes per GB (10^9 bytes) moved; None if no finished process moved any."""
    nbytes = sum(phase.ranks.nbytes)
    return cpu_ns(phase) / 1e9 / (nbytes / GB) if nbytes else None


def phases(record: Record, op: Op, *, complete: bool = True) -> list[Phase]:
    """The record's phases of one kind, without unfinished ones unless asked for."""
    return [phase for phase in record.phases if phase.op == op and (phase.complete or not complete)]


def slowest_rank_rates(record: Record, op: Op, unit: int = GB) -> list[float]:
    """Per complete phase: bytes / time to the slowest rank's durable end, in `unit` bytes per second."""
    rates = [rate(phase.nbytes, wall_ns(phase), unit) for phase in phases(record, op)]
    return [one for one in rates if one is not None]


def total_rate(record: Record, op: Op, unit: int = GB) -> float | None:
    """All bytes of the complete phases / the sum of their times, in `unit` bytes per second."""
    done = phases(record, op)
    return rate(sum(p.nbytes for p in done), sum(wall_ns(p) for p in done), unit)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def population_stdev(values: Sequence[float]) -> float:
    """Standard deviation with N, not N - 1, below the line: what MLPerf's fields hold."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / len(values))
