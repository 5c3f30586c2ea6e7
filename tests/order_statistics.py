"""Statistics by which a walk through [0, n) is told from a random one: each gives a number of standard deviations.

A random order is within about 4 of 0. One that is too even (a constant stride) is as far off as one that is not even
enough, so both signs count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
BINS = 64


def binned(values: U64, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The bin of each value of [0, n), and each bin's probability."""
    width = -(-n // BINS)
    edges = [min(width * at, n) for at in range(BINS + 1)]
    return (values // np.uint64(width)).astype(np.int64), np.diff(np.array(edges, dtype=object)).astype(float) / n


def chi_square_z(counts: npt.NDArray[np.int64], expected: npt.NDArray[np.float64], freedom: int) -> float:
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def serial_correlation(walk: U64, n: int) -> float:
    """Of neighbours."""
    values = walk.astype(float) / n
    return float(np.corrcoef(values[:-1], values[1:])[0, 1] * math.sqrt(len(walk) - 1))


def differences(walk: U64, n: int) -> float:
    """Of neighbours, modulo n: each is as likely as any other."""
    before, after = walk[:-1], walk[1:]
    steps = np.where(after >= before, after - before, np.uint64(n) - (before - after))
    places, chances = binned(steps, n)
    return chi_square_z(np.bincount(places, minlength=BINS), chances * len(steps), BINS - 1)


def runs(walk: U64, n: int) -> float:
    """How often it goes from rising to falling and back (Bienayme: mean (2m - 1) / 3, variance (16m - 29) / 90)."""
    del n
    rising = walk[1:] > walk[:-1]
    found = 1 + int((rising[1:] != rising[:-1]).sum())
    m = len(walk)
    return (found - (2 * m - 1) / 3) / math.sqrt((16 * m - 29) / 90)


def blocks(walk: U64, n: int) -> float:
    """Each stretch of the walk visits all parts of [0, n) alike."""
    places, chances = binned(walk, n)
    stretch = np.arange(len(walk)) * BINS // len(walk)
    table = np.bincount(stretch * BINS + places, minlength=BINS * BINS).reshape(BINS, BINS)
    expected = np.bincount(stretch)[:, None] * chances[None, :]
    # A whole permutation visits each part as often as it is large; a stretch of a larger one need not.
    freedom = (BINS - 1) ** 2 if len(walk) == n else BINS * (BINS - 1)
    return chi_square_z(table, expected, freedom)


STATISTICS: dict[str, Callable[[U64, int], float]] = {
    "serial correlation": serial_correlation,
    "differences": differences,
    "runs": runs,
    "blocks": blocks,
}
