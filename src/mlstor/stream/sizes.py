"""How large objects are: a pure function of their index, so that a reader knows what a writer made without asking."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from functools import cached_property
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np

from mlstor.errors import UsageError
from mlstor.stream.draws import U64, Purpose, of_index
from mlstor.units import format_gib, parse_size

# Quantiles of the log-normal distribution that are tabulated. The table holds whole bytes, so that two machines whose
# logarithms differ in the last bit make objects of one size.
_QUANTILES = 1 << 16
_CHUNK = 1 << 20


class SizeSpec(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True):
    """What was asked for, as a manifest keeps it. `table` holds [bytes, weight] of a histogram."""

    kind: Literal["fixed", "uniform", "lognormal", "histogram"]
    least_nbytes: int
    most_nbytes: int
    median_nbytes: int = 0
    sigma_milli: int = 0
    table: list[tuple[int, int]] = []


class Sizes:
    """Sizes by index.

    Parameters
    ----------
    spec
        The distribution.
    seed
        Of the run that writes the objects.
    """

    def __init__(self, spec: SizeSpec, seed: int) -> None:
        self.spec, self.seed = spec, seed

    def __call__(self, indices: U64) -> U64:
        """Bytes of each object."""
        spec = self.spec
        if spec.least_nbytes == spec.most_nbytes:
            return np.full(len(indices), spec.least_nbytes, np.uint64)
        bits = of_index(indices, self.seed, Purpose.SIZE)
        if spec.kind == "uniform":
            span = spec.most_nbytes - spec.least_nbytes + 1
            found: U64 = np.uint64(spec.least_nbytes) + bits % np.uint64(span)
        elif spec.kind == "histogram":
            values, ends = self._histogram
            found = values[np.searchsorted(ends, bits % ends[-1], side="right")]
        else:
            found = self._quantiles[bits >> np.uint64(48)]
        return found

    def total(self, count: int) -> int:
        """Bytes of the objects 0 to `count` - 1."""
        if self.spec.least_nbytes == self.spec.most_nbytes:
            return count * self.spec.least_nbytes
        return sum(int(self(_span(at, count)).sum()) for at in range(0, count, _CHUNK))

    def count_of(self, nbytes: int) -> int:
        """The least number of objects, from index 0 on, that have `nbytes` bytes or more together."""
        if self.spec.least_nbytes == self.spec.most_nbytes:
            return -(-nbytes // max(1, self.spec.least_nbytes))
        count = 0
        while nbytes > 0:
            sums = np.cumsum(self(_span(count, count + _CHUNK)))
            if sums[-1] >= nbytes:
                return count + int(np.searchsorted(sums, nbytes)) + 1
            count, nbytes = count + _CHUNK, nbytes - int(sums[-1])
        return count

    @cached_property
    def _histogram(self) -> tuple[U64, U64]:
        values = np.array([nbytes for nbytes, _ in self.spec.table], np.uint64)
        return values, np.cumsum(np.array([weight for _, weight in self.spec.table], np.uint64))

    @cached_property
    def _quantiles(self) -> U64:
        spec, normal = self.spec, NormalDist()
        mu, sigma = math.log(spec.median_nbytes), spec.sigma_milli / 1000
        found = (mu + sigma * normal.inv_cdf((at + 0.5) / _QUANTILES) for at in range(_QUANTILES))
        # a sigma beyond reason would overflow exp() before it is bounded
        most = math.log(spec.most_nbytes)
        rounded = (round(math.exp(min(value, most))) for value in found)
        return np.array([min(max(value, spec.least_nbytes), spec.most_nbytes) for value in rounded], np.uint64)

    def __str__(self) -> str:
        spec = self.spec
        low, high = format_gib(spec.least_nbytes), format_gib(spec.most_nbytes)
        if spec.kind == "lognormal":
            return f"log-normal, median {format_gib(spec.median_nbytes)}, sigma {spec.sigma_milli / 1000:g}"
        if spec.kind == "histogram":
            return f"a histogram of {len(spec.table)} sizes, {low} to {high}"
        return low if spec.kind == "fixed" else f"{low} to {high}"


def _span(start: int, end: int) -> U64:
    return np.arange(start, min(end, start + _CHUNK), dtype=np.uint64)


def parse_sizes(text: str | None, least_nbytes: int | None, most_nbytes: int | None) -> SizeSpec:
    """The distribution that ``--size``, ``--min-size`` and ``--max-size`` ask for.

    Parameters
    ----------
    text
        ``1MiB``; ``lognormal:MEDIAN:SIGMA``; ``@FILE``, a histogram of lines ``SIZE WEIGHT``; None: the bounds alone.
    least_nbytes, most_nbytes
        Bounds: of a uniform distribution without `text`, else of the log-normal one. One alone is both.

    Raises
    ------
    UsageError
        If the text is none of these, or the bounds exclude one another.
    """
    if least_nbytes is not None and most_nbytes is not None and least_nbytes > most_nbytes:
        raise UsageError(f"--min-size {least_nbytes} is above --max-size {most_nbytes}; exchange them")
    bounded = least_nbytes is not None or most_nbytes is not None
    if text is None:
        low = least_nbytes if least_nbytes is not None else most_nbytes
        high = most_nbytes if most_nbytes is not None else least_nbytes
        if low is None or high is None:
            low = high = 1 << 20
        return SizeSpec(kind="fixed" if low == high else "uniform", least_nbytes=low, most_nbytes=high)
    if text.startswith("lognormal:"):
        return _lognormal(text, least_nbytes, most_nbytes)
    if bounded:
        raise UsageError("--min-size and --max-size go with --size lognormal:MEDIAN:SIGMA or without --size")
    if text.startswith("@"):
        return _histogram_file(text[1:])
    nbytes = parse_size(text)
    return SizeSpec(kind="fixed", least_nbytes=nbytes, most_nbytes=nbytes)


def _lognormal(text: str, least_nbytes: int | None, most_nbytes: int | None) -> SizeSpec:
    words = text.split(":")
    try:
        _, median, sigma = words
        median_nbytes, sigma_milli = parse_size(median), round(float(sigma) * 1000)
    except ValueError:
        raise UsageError(f"--size {text!r} is not understood; write it as lognormal:1MiB:0.8 (median, sigma)") from None
    if median_nbytes < 1 or not 0 <= sigma_milli <= 10_000:
        raise UsageError(f"--size {text!r}: the median is at least 1 byte, and sigma from 0 to 10")
    # beyond four sigma there is one object in 30,000: without a bound it would be of any size
    most = most_nbytes or max(1, round(median_nbytes * math.exp(4 * sigma_milli / 1000)))
    return SizeSpec(
        kind="lognormal",
        least_nbytes=max(1, least_nbytes or 1),
        most_nbytes=most,
        median_nbytes=median_nbytes,
        sigma_milli=sigma_milli,
    )


def _histogram_file(path: str) -> SizeSpec:
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--size @{path} can't be read: {error}") from None
    try:
        table = _table(lines)
    except ValueError as error:
        raise UsageError(f"--size @{path}: {error}; write a line as `64KiB 30`, size and weight") from None
    if not table:
        raise UsageError(f"--size @{path} holds no sizes; write lines as `64KiB 30`, size and weight")
    values = [nbytes for nbytes, _ in table]
    return SizeSpec(kind="histogram", least_nbytes=min(values), most_nbytes=max(values), table=table)


def _table(lines: Iterable[str]) -> list[tuple[int, int]]:
    rows: list[tuple[int, Fraction]] = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) != 2:
            raise ValueError(f"line {number} has {len(words)} words")
        try:
            rows.append((parse_size(words[0]), Fraction(words[1])))
        except (UsageError, ValueError, ZeroDivisionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        if rows[-1][1] < 0:
            raise ValueError(f"line {number}: a weight is not negative")
    rows = [row for row in rows if row[1]]
    common = math.lcm(*(weight.denominator for _, weight in rows)) if rows else 1
    return [(nbytes, int(weight * common)) for nbytes, weight in rows]
