"""Histograms of many durations at once, in the buckets of csrc/histogram.h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlstor.results.percentiles import NBUCKETS, SUB_BITS, SUB_BUCKETS
from mlstor.results.phase import Histogram
from mlstor.stream.draws import U64

Buckets = npt.NDArray[np.int64]
_FRACTION_BITS = 52  # IEEE 754, binary64
_EXPONENT_BIAS = 1023
# What is left of the double 2^SUB_BITS when its exponent stands at SUB_BITS, less the bucket of that duration.
_FIRST_LOGARITHMIC = ((_EXPONENT_BIAS + SUB_BITS) << SUB_BITS) - SUB_BUCKETS


def of(durations_ns: U64) -> Buckets:
    """The bucket of each duration: `results.percentiles.index` for arrays. Durations are below 2^53 ns (104 days)."""
    # A double is exponent and fraction one after the other, and a bucket the exponent and the fraction's first bits.
    found = durations_ns.astype(np.float64).view(np.int64)
    found >>= _FRACTION_BITS - SUB_BITS
    found -= _FIRST_LOGARITHMIC
    small = durations_ns < SUB_BUCKETS  # linear
    if small.any():
        found[small] = durations_ns[small]
    return np.minimum(found, NBUCKETS - 1, out=found)


class Durations:
    """A histogram that grows by arrays."""

    def __init__(self) -> None:
        self.counts = np.zeros(NBUCKETS, np.int64)
        self.count = self.sum_ns = self.max_ns = 0
        self.min_ns = 0

    def add(self, durations_ns: U64, buckets: Buckets) -> None:
        """Add durations, whose buckets are known."""
        if not len(durations_ns):
            return
        self.counts += np.bincount(buckets, minlength=NBUCKETS)
        least = int(durations_ns.min())
        self.min_ns = least if not self.count else min(self.min_ns, least)
        self.max_ns = max(self.max_ns, int(durations_ns.max()))
        self.count += len(durations_ns)
        self.sum_ns += int(durations_ns.sum())

    def merge(self, other: Durations) -> None:
        """Add all durations of another one."""
        if not other.count:
            return
        self.counts += other.counts
        self.min_ns = min(self.min_ns, other.min_ns) if self.count else other.min_ns
        self.max_ns = max(self.max_ns, other.max_ns)
        self.count += other.count
        self.sum_ns += other.sum_ns

    def histogram(self) -> Histogram:
        """As the record keeps it."""
        at = np.flatnonzero(self.counts)
        return Histogram(
            count=self.count,
            sum_ns=self.sum_ns,
            min_ns=self.min_ns,
            max_ns=self.max_ns,
            buckets=list(zip(at.tolist(), self.counts[at].tolist(), strict=True)),
        )
