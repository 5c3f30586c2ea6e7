"""Figures in the shape of ``aisloader -json``: an array of elements, one per interval and a last one for the whole run.

An element has `get`, `put` and `get_batch`, each with counts and bytes as strings, errors and times in ns as numbers.
Intervals and the whole have the same shape; those who read it take the last element. What aisloader has no name for is
left out: HEAD and DELETE, percentiles, retries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec

from mlstor.results.figures import covered_ns
from mlstor.results.percentiles import NBUCKETS, lower, upper
from mlstor.results.phase import Histogram
from mlstor.results.record import StreamRecord
from mlstor.results.stream import OpFigures, StreamPhase
from mlstor.results.stream_merge import add_ops

NAMES: dict[str, tuple[str, ...]] = {
    "get": ("get", "get-range", "get-parallel", "get-archived"),
    "put": ("put", "put-parts", "put-shard"),
    "get_batch": ("batch",),
}
"""aisloader's names, and the operations that each stands for. Its own JSON leaves out PUTs in parts and parallel GETs,
which its table has: here they are counted.
"""


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """What one kind of operation did in `duration_ns` from start_unix_ns on. Latencies are from start to end."""

    start_unix_ns: int
    duration_ns: int
    count: int = 0
    nbytes: int = 0
    failed: int = 0
    sum_ns: int = 0
    min_ns: int = 0
    max_ns: int = 0

    def stats(self) -> dict[str, Any]:
        """As aisloader writes it: throughput and the mean latency are rounded down."""
        per_s = self.nbytes * 10**9 // self.duration_ns if self.duration_ns else 0
        return {
            "start_time": _rfc3339(self.start_unix_ns),
            "count": str(self.count),
            "bytes": str(self.nbytes),
            "errors": self.failed,
            "latency": self.sum_ns // self.count if self.count else 0,
            "duration": self.duration_ns,
            "min_latency": self.min_ns,
            "max_latency": self.max_ns,
            "throughput": str(per_s),
        }


def _rfc3339(unix_ns: int) -> str:
    """With nanoseconds, in UTC."""
    seconds, rest = divmod(unix_ns, 10**9)
    return f"{datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def interval(
    ops: Mapping[str, OpFigures],
    start_unix_ns: int,
    duration_ns: int,
    before: Mapping[str, OpFigures] | None = None,
) -> dict[str, Interval]:
    """What was done in an interval, under aisloader's names.

    Parameters
    ----------
    ops
        All since the phase began, as in `StreamPhase.ops`.
    start_unix_ns, duration_ns
        Of the interval.
    before
        What `ops` were when the interval began; None: nothing had been done. The smallest and largest latency are then
        bounds of buckets, by at most 1/64 off: histograms keep exact ones of the whole only.
    """
    made: dict[str, Interval] = {}
    for name, of_name in NAMES.items():
        now = add_ops([ops[one] for one in of_name if one in ops])
        then = add_ops([before[one] for one in of_name if one in before]) if before is not None else OpFigures()
        total = _since(now.total, then.total)
        made[name] = Interval(
            start_unix_ns=start_unix_ns,
            duration_ns=duration_ns,
            count=now.count - then.count,
            nbytes=now.nbytes - then.nbytes,
            failed=now.failed - then.failed,
            sum_ns=total.sum_ns,
            min_ns=total.min_ns,
            max_ns=total.max_ns,
        )
    return made


def _since(now: Histogram, then: Histogram) -> Histogram:
    """What `now` has beyond `then`, which is an earlier state of it."""
    if not then.count:
        return now
    former = dict(then.buckets)
    new = [(bucket, count - former.get(bucket, 0)) for bucket, count in now.buckets if count > former.get(bucket, 0)]
    if not new:
        return Histogram()
    last = new[-1][0]
    return Histogram(
        count=now.count - then.count,
        sum_ns=now.sum_ns - then.sum_ns,
        min_ns=max(now.min_ns, lower(new[0][0])),
        max_ns=now.max_ns if last == NBUCKETS - 1 else min(now.max_ns, upper(last)),
        buckets=new,
    )


def of_phases(phases: Sequence[StreamPhase]) -> dict[str, Interval]:
    """All of several phases together, from the first one's barrier on; duration_ns is the sum of theirs."""
    if not phases:
        return interval({}, 0, 0)
    names = {name for phase in phases for name in phase.ops}
    ops = {name: add_ops([phase.ops[name] for phase in phases if name in phase.ops]) for name in names}
    return interval(ops, phases[0].barrier_unix_ns, sum(map(covered_ns, phases)))


def of_record(record: StreamRecord) -> list[dict[str, Interval]]:
    """One element for the whole run: a record has no counts per interval."""
    return [of_phases([phase for phase in record.phases if phase.name != "warm-up"])]


def encode(elements: Sequence[Mapping[str, Interval]]) -> str:
    """The elements as aisloader's JSON array, a line each."""
    lines = [json.dumps({name: one.stats() for name, one in element.items()}) for element in elements]
    return "[\n" + ",\n".join(lines) + "\n]\n"
