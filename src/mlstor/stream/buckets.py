"""Histograms of many durations at once, in the buckets of csrc/histogram.h."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlstor.results.percentiles import NBUCKETS, SUB_BITS
from mlstor.results.phase import Histogram
from mlstor.stream.draws import U64

Buckets = npt.NDArray[np.int64]


def of(durations_ns: U64) -> Buckets:
    """The bucket of each duration: `results.percentiles.index` for arrays. Durations are below 2^53 ns (104 days)."""
    _, exponent = np.frexp(durations_ns.astype(np.float64))
    shift = np.maximum(exponent.astype(np.int64) - 1 - SUB_BITS, 0)
    found = (shift << SUB_BITS) + (durations_ns.astype(np.int64) >> shift)
    return np.minimum(found, NBUCKETS - 1)


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
