"""One phase on one process: the operations of its logical ranks, from the barrier to the last durable end."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from mlstor import traffic
from mlstor.checkpoint.profiles import Stages
from mlstor.results import phase as report
from mlstor.results.phase import PhaseReport, RankFigures

if TYPE_CHECKING:
    from mlstor._io import Engine, Request
    from mlstor.operations import Result

#: Width of the intervals of the series, ns; also how often progress is looked at.
INTERVAL_NS = 250_000_000


class Chain:
    """The operations of one logical rank, stage after stage."""

    def __init__(self, rank: int, nfiles: int, stages: Stages) -> None:
        self.rank = rank
        self.nfiles = nfiles
        self.waiting = list(reversed(stages))
        self.pending = 0
        self.results: list[Result] = []

    def advance(self, engine: Engine, owner: dict[Request, Chain]) -> None:
        """Submit the next stage, once nothing of the last one is under way."""
        while not self.pending and self.waiting:
            stage = self.waiting.pop()
            requests = engine.submit(stage)
            self.pending = len(requests)
            owner.update(dict.fromkeys(requests, self))

    def figures(self, start_ns: int) -> RankFigures:
        """What the rank did, relative to `start_ns`."""
        if not self.results:
            return RankFigures(self.rank, 0, 0, 0, 0, 0)
        ends: dict[str, int] = {}
        for result in self.results:  # a file that several operations read is done when the last of them is
            ends[result.path] = max(ends.get(result.path, 0), result.end_ns)
        return RankFigures(
            self.rank,
            max(0, min(result.start_ns for result in self.results) - start_ns),
            max(0, min(ends.values()) - start_ns),
            max(0, max(ends.values()) - start_ns),
            sum(result.nbytes for result in self.results),
            self.nfiles,
        )


class Series:
    """Bytes per interval, sampled from the engine's counters."""

    def __init__(self, engine: Engine, start_ns: int) -> None:
        self._engine = engine
        self._start_ns = start_ns
        self._first = self._last = self._done(engine)
        self.nbytes: list[int] = []

    @staticmethod
    def _done(engine: Engine) -> int:
        counters = engine.counters()
        return counters.read_bytes + counters.written_bytes

    def sample(self) -> int:
        """Add what was done since the last sample to the present interval; bytes since the start."""
        done = self._done(self._engine)
        interval = (time.monotonic_ns() - self._start_ns) // INTERVAL_NS
        self.nbytes += [0] * (interval + 1 - len(self.nbytes))
        self.nbytes[interval] += done - self._last
        self._last = done
        return done - self._first


class Meter:
    """CPU time and worker time of this process between two moments, and with `of_host` the host's traffic."""

    def __init__(self, engine: Engine, of_host: bool) -> None:
        self._engine = engine
        self._memory = traffic.memory_bytes() if of_host else None
        self._nic = traffic.nic_bytes() if of_host else None
        self._before = resource.getrusage(resource.RUSAGE_SELF)
        self._counters = engine.counters()

    def read(self, into: PhaseReport) -> None:
        """Write the differences since the start into a report."""
        usage, counters = resource.getrusage(resource.RUSAGE_SELF), self._engine.counters()
        into.cpu_user_ns = int((usage.ru_utime - self._before.ru_utime) * 1e9)
        into.cpu_system_ns = int((usage.ru_stime - self._before.ru_stime) * 1e9)
        into.peak_rss_bytes = usage.ru_maxrss * 1024
        into.worker_busy_ns = counters.busy_ns - self._counters.busy_ns
        into.worker_wait_ns = counters.wait_ns - self._counters.wait_ns
        into.memory_traffic_bytes = _since(self._memory, traffic.memory_bytes)
        into.nic_bytes = _since(self._nic, traffic.nic_bytes)
        into.workers = self._engine.workers
        into.cores_allowed = len(os.sched_getaffinity(0))


def _since(before: int | None, counter: Callable[[], int | None]) -> int | None:
    """What a counter has grown by; None where there is none, or where it has wrapped."""
    after = None if before is None else counter()
    return None if before is None or after is None or after < before else after - before


def run_phase(
    engine: Engine,
    chains: Sequence[Chain],
    report_to: PhaseReport,
    of_host: bool,
    begin: Callable[[], None],
    tick: Callable[[int, int], None],
) -> PhaseReport:
    """Run the chains and fill in `report_to`; called right behind the phase's barrier.

    Parameters
    ----------
    of_host
        Whether this process looks at its host's traffic; one of each host does.
    begin
        What belongs to the phase but is no transfer: making its directories.
    tick
        Called every quarter of a second at least with ns since the barrier and bytes done.

    Raises
    ------
    OSError
        The first failure of the storage; nothing more is submitted then.
    """
    engine.reset_histograms()
    meter = Meter(engine, of_host)
    start_ns = time.monotonic_ns()
    report_to.barrier_unix_ns = time.time_ns()
    series = Series(engine, start_ns)
    owner: dict[Request, Chain] = {}
    begin()
    for chain in chains:
        chain.advance(engine, owner)
    while owner:
        for request in engine.reap(1, INTERVAL_NS / 1e9):
            chain = owner.pop(request)
            try:
                chain.results.append(request.result())
            except OSError:
                engine.cancel()
                raise
            chain.pending -= 1
            chain.advance(engine, owner)
        tick(time.monotonic_ns() - start_ns, series.sample())
    meter.read(report_to)
    report_to.interval_ns = INTERVAL_NS
    report_to.series = series.nbytes
    report_to.ranks = [chain.figures(start_ns) for chain in chains]
    report_to.paths = paths_taken([result for chain in chains for result in chain.results])
    report_to.histograms = {
        name: report.Histogram(
            count=one.count,
            sum_ns=one.sum_ns,
            min_ns=one.min_ns,
            max_ns=one.max_ns,
            buckets=sorted(one.buckets.items()),
        )
        for name, one in engine.histograms().items()
        if one.count
    }
    return report_to


def paths_taken(results: Sequence[Result]) -> list[report.PathTaken]:
    """How the files were reached, added up by way."""
    ways: dict[tuple[str, str, str, str], report.PathTaken] = {}
    files: dict[tuple[str, str, str, str], set[str]] = {}
    for result in results:
        reason = "" if result.direct == "yes" else result.reason
        key = (result.backend, result.direct, reason, result.fs_type)
        way = ways.setdefault(
            key, report.PathTaken(backend=key[0], direct=result.direct, reason=reason, fs_type=key[3])
        )
        way.nbytes += result.nbytes
        files.setdefault(key, set()).add(result.path)
    for taken, way in ways.items():
        way.nfiles = len(files[taken])
    return list(ways.values())
