"""What a phase costs this process, and how it goes on: CPU time, workers' time, bytes per interval."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from mlstor import traffic
from mlstor.results.stream import StreamReport

if TYPE_CHECKING:
    from mlstor.results.phase import ProcessReport

#: Width of the intervals of the series, ns; also how often progress is looked at.
INTERVAL_NS = 250_000_000


class Counted(Protocol):
    """What an engine has counted since it was made."""

    @property
    def busy_ns(self) -> int:
        """Of all workers: on the CPU."""

    @property
    def wait_ns(self) -> int:
        """Of all workers: waiting for the storage."""


class Series:
    """Bytes per interval.

    Parameters
    ----------
    moved
        Bytes moved so far, from any beginning.
    start_ns
        Of the first interval, CLOCK_MONOTONIC.
    """

    def __init__(self, moved: Callable[[], int], start_ns: int) -> None:
        self._moved = moved
        self._start_ns = start_ns
        self._first = self._last = moved()
        self.nbytes: list[int] = []

    def sample(self) -> int:
        """Add what was done since the last sample to the present interval; bytes since the start."""
        done = self._moved()
        interval = (time.monotonic_ns() - self._start_ns) // INTERVAL_NS
        self.nbytes += [0] * (interval + 1 - len(self.nbytes))
        self.nbytes[interval] += done - self._last
        self._last = done
        return done - self._first


class Meter:
    """CPU time and worker time of this process between two moments, and with `of_host` the host's traffic.

    Parameters
    ----------
    counters
        Of the engine.
    workers
        Its threads.
    of_host
        Whether this process looks at its host's traffic; one of each host does.
    """

    def __init__(self, counters: Callable[[], Counted], workers: int, of_host: bool) -> None:
        self._read, self._workers = counters, workers
        self._memory = traffic.memory_bytes() if of_host else None
        self._nic = traffic.nic_bytes() if of_host else None
        self._network = traffic.Network(of_host)
        self._before = resource.getrusage(resource.RUSAGE_SELF)
        self._counters = counters()

    def read(self, into: ProcessReport) -> None:
        """Write the differences since the start into a report."""
        usage, counters = resource.getrusage(resource.RUSAGE_SELF), self._read()
        into.cpu_user_ns = int((usage.ru_utime - self._before.ru_utime) * 1e9)
        into.cpu_system_ns = int((usage.ru_stime - self._before.ru_stime) * 1e9)
        into.peak_rss_bytes = usage.ru_maxrss * 1024
        into.worker_busy_ns = counters.busy_ns - self._counters.busy_ns
        into.worker_wait_ns = counters.wait_ns - self._counters.wait_ns
        into.memory_traffic_bytes = _since(self._memory, traffic.memory_bytes)
        into.nic_bytes = _since(self._nic, traffic.nic_bytes)
        if isinstance(into, StreamReport):
            self._network.read(into)
        into.workers = self._workers
        into.cores_allowed = len(os.sched_getaffinity(0))


def _since(before: int | None, counter: Callable[[], int | None]) -> int | None:
    """What a counter has grown by; None where there is none, or where it has wrapped."""
    after = None if before is None else counter()
    return None if before is None or after is None or after < before else after - before
