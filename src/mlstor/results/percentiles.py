"""Log-linear buckets of ns, and percentiles of histograms that add up.
 The scheme is fio's layout (``stat.h``: 64 linear buckets per power of two, 29 groups), restated: below 128
ns every value has its own bucket; above, a power of two is cut into 64 equal buckets, so that a bucket is
narrower than 1/64 of its lower bound. ``csrc/histogram.h`` uses the same formula, so that every rank's counts
can be added.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from mlstor.results.phase import SCHEME, Histogram

SUB_BITS = 6
SUB_BUCKETS = 1 << SUB_BITS
GROUPS = 29
NBUCKETS = GROUPS * SUB_BUCKETS
"""1856. The last one, from 2^34 - 2^27 ns (17.05 s) on, also takes all that is longer; `Histogram.max_ns`
says how long.
"""


def index(value_ns: int) -> int:
    """Bucket of a duration of `value_ns` ns (>= 0)."""
    if value_ns < SUB_BUCKETS:
        return value_ns
    shift = value_ns.bit_length() - 1 - SUB_BITS
    return min((shift << SUB_BITS) + (value_ns >> shift), NBUCKETS - 1)


def lower(bucket: int) -> int:
    """Smallest duration of a bucket, ns."""
    if bucket < 2 * SUB_BUCKETS:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    return (bucket - (shift << SUB_BITS)) << shift


def upper(bucket: int) -> int:
    """Largest duration of a bucket, ns; nominal for the last bucket, which is open-ended."""
    return lower(bucket + 1) - 1


def from_counts(counts: Sequence[int], *, sum_ns: int, min_ns: int, max_ns: int) -> Histogram:
    """The sparse histogram of a full array of at most `NBUCKETS` counts.

    Parameters
    ----------
    counts
        Operations per bucket.
    sum_ns, min_ns, max_ns
        Sum, smallest and largest duration, ns; 0 when nothing was counted.
    """
    if len(counts) > NBUCKETS:
        raise ValueError(f"{len(counts)} buckets; {SCHEME} has {NBUCKETS}")
    buckets = [(i, int(n)) for i, n in enumerate(counts) if n]
    return Histogram(
        count=sum(n for _, n in buckets),
        sum_ns=int(sum_ns),
        min_ns=int(min_ns),
        max_ns=int(max_ns),
        buckets=buckets,
    )


def of_values(values_ns: Sequence[int]) -> Histogram:
    """The histogram of durations in ns, for what Python itself timed."""
    counts: dict[int, int] = {}
    for value in values_ns:
        counts[index(value)] = counts.get(index(value), 0) + 1
    return Histogram(
        count=len(values_ns),
        sum_ns=sum(values_ns),
        min_ns=min(values_ns, default=0),
        max_ns=max(values_ns, default=0),
        buckets=sorted(counts.items()),
    )


def percentile(histogram: Histogram, percent: float) -> int | None:
    """Duration in ns that `percent` % of the operations did not exceed; None when there were none.

    The answer is the upper bound of the bucket that holds the operation of that rank (nearest-rank
    definition), never beyond the largest duration seen: at most 1/64 above the true value, and never below
    it.

    Raises
    ------
    ValueError
        If `percent` is not in 0..100, or the histogram's buckets hold fewer operations than it counts.
    """
    if not 0 <= percent <= 100:
        raise ValueError(f"{percent} is not a percentage")
    if histogram.count == 0:
        return None
    # Through str, so that 99.9 is 999/10 and not its binary neighbour.
    wanted = max(1, -(-Fraction(str(percent)) * histogram.count // 100))
    seen = 0
    for bucket, count in histogram.buckets:
        seen += count
        if seen >= wanted:
            bound = histogram.max_ns if bucket == NBUCKETS - 1 else upper(bucket)
            return max(histogram.min_ns, min(bound, histogram.max_ns))
    raise ValueError(f"histogram counts {histogram.count} operations but its buckets hold {seen}")
