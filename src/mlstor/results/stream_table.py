"""The record of an object stream, or of a copy, as tables for people. All derived figures are computed here and now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlstor.results import figures, stream_notes
from mlstor.results.figures import GIB
from mlstor.results.notes import line, paths, plural, preflight, rate_text
from mlstor.results.percentiles import percentile
from mlstor.results.stream import SIZE_CLASSES_FROM, OpFigures, Slice, StreamPhase, size_class
from mlstor.results.stream_merge import add_ops
from mlstor.results.stream_notes import per_s_text
from mlstor.results.tables import Column, Row, print_table, seconds
from mlstor.units import format_ns

if TYPE_CHECKING:
    from rich.console import Console

    from mlstor.results.phase import Histogram
    from mlstor.results.record import StreamRecord

PERCENTS = (50, 90, 99, 99.9, 99.99)
MAX_ROWS = 16
"""Rows of the tables of epochs and of targets; the record has them all."""
TARGET_WIDTH = 24
"""Characters of a target's name that are shown, the last ones: those of an endpoint's URL tell it apart."""


def print_stream(out: Console, record: StreamRecord) -> None:
    """Print `record` to `out`: a section per phase."""
    stream_notes.heading(out, record)
    for phase in record.phases:
        out.print()
        out.print(stream_notes.headline(phase), style="bold" if phase.complete else "bold yellow", soft_wrap=True)
        _throughput(out, phase)
        _times(out, phase)
        _epochs(out, phase)
        _sizes(out, phase)
        _targets(out, phase)
        stream_notes.phase_lines(out, record, phase)
    if record.phases:
        out.print()
        paths(out, record)
        preflight(out, record)
        stream_notes.verified(out, record)
    else:
        out.print("no phase was begun", style="bold")


def _right(*names: str) -> list[Column]:
    return [(name, "right") for name in names]


def _rates(nbytes: int, duration_ns: int) -> Row:
    return rate_text(figures.rate(nbytes, duration_ns)), rate_text(figures.rate(nbytes, duration_ns, GIB))


def _throughput(out: Console, phase: StreamPhase) -> None:
    wall_ns = figures.covered_ns(phase)

    def row(name: str, op: OpFigures) -> Row:
        return (
            name,
            f"{op.count:,}",
            per_s_text(figures.per_s(op.count, wall_ns)),
            *_rates(op.nbytes, wall_ns),
            f"{op.failed:,}",
            f"{op.retries:,}",
            f"{op.connections:,}",
        )

    shown = list(phase.ops.items())
    if len(shown) > 1 and phase.name != "copy":  # a copy's two sides move the same bytes
        shown.append(("all", add_ops([op for _, op in shown])))
    columns: list[Column] = [("op", "left")]
    columns += _right("count", "objects/s", "GB/s", "GiB/s", "errors", "retries", "connections")
    print_table(
        out,
        "Throughput: what ended well / time to the slowest rank's end",
        columns,
        ((row(name, op), "red" if op.failed else "") for name, op in shown),
    )


def _percentiles(histogram: Histogram, percents: tuple[float, ...]) -> list[str]:
    return [format_ns(percentile(histogram, percent) or 0) for percent in percents]


def _times(out: Console, phase: StreamPhase) -> None:
    columns: list[Column] = [("\nop", "left")]
    columns += _right(*(f"\n{name}" for name in ("count", "mean", "p50", "p90", "p99", "p99.9", "p99.99", "max")))
    columns += _right("TTFB\np50", "TTFB\np99")
    rows = [(row, "") for name, op in phase.ops.items() for row in _times_of(name, op)]
    print_table(out, "Times: from the first attempt to the end, on all ranks, merged", columns, rows, tight=True)


def _times_of(name: str, op: OpFigures) -> Iterator[Row]:
    """A row of all that ended well, and below it rows of its parts."""
    parts = {
        "  retried": op.retried,
        "  redirect": op.redirect,
        "  intended": op.from_intended,
    }
    if op.cold.count and op.warm.count:
        parts |= {"  cold": op.cold.total, "  warm": op.warm.total}
    for label, histogram in {name: op.total, **parts}.items():
        if not histogram.count:
            continue
        mean, longest = format_ns(histogram.sum_ns / histogram.count), format_ns(histogram.max_ns)
        ttfb = _percentiles(op.ttfb, (50, 99)) if label == name and op.ttfb.count else ["-", "-"]
        yield (label, f"{histogram.count:,}", mean, *_percentiles(histogram, PERCENTS), longest, *ttfb)


def _epochs(out: Console, phase: StreamPhase) -> None:
    columns: list[Column] = [
        ("epoch", "left"),
        ("", "left"),
        *_right("objects", "s", "objects/s", "GB", "GB/s", "errors"),
    ]
    rows: list[tuple[Row, str]] = []
    for one in phase.epochs[:MAX_ROWS]:
        took_ns = one.end_ns - one.start_ns
        row = (
            f"{one.epoch}" if one.epochs == 1 else f"{one.epoch} to {one.epoch + one.epochs - 1}",
            one.temperature,
            f"{one.count:,}",
            seconds(took_ns),
            per_s_text(figures.per_s(one.count, took_ns)),
            f"{one.nbytes / figures.GB:.2f}",
            rate_text(figures.rate(one.nbytes, took_ns)),
            f"{one.failed:,}",
        )
        rows.append((row, "red" if one.failed else ""))
    print_table(out, "Epochs: from the first start to the last end on any rank", columns, rows)
    _more(out, len(phase.epochs) - MAX_ROWS, "epoch")


def _more(out: Console, count: int, word: str) -> None:
    if count > 0:
        line(out, "", f"and {plural(count, word)} more in the record")


def binary(nbytes: int) -> str:
    """A power of two of bytes in words: ``"64 KiB"``."""
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes >> 10 * power} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def class_text(from_bytes: int) -> str:
    """A size class in words: ``"64 KiB - 256 KiB"``, which is without the latter."""
    above = SIZE_CLASSES_FROM[size_class(from_bytes) + 1 :]
    if not from_bytes:
        return f"< {binary(above[0])}"
    return f"{binary(from_bytes)} - {binary(above[0])}" if above else f">= {binary(from_bytes)}"


def _slice(part: Slice, wall_ns: int) -> Row:
    return (
        f"{part.count:,}",
        per_s_text(figures.per_s(part.count, wall_ns)),
        rate_text(figures.rate(part.nbytes, wall_ns)),
        *_percentiles(part.total, (50, 99, 99.9)),
        format_ns(part.total.max_ns),
    )


_SLICE = _right("count", "objects/s", "GB/s", "p50", "p99", "p99.9", "max")


def _sizes(out: Console, phase: StreamPhase) -> None:
    wall_ns = figures.covered_ns(phase)
    for name, op in phase.ops.items():
        if len(op.sizes) > 1:
            rows = [((class_text(one.from_bytes), *_slice(one, wall_ns)), "") for one in op.sizes]
            print_table(out, f"Sizes of {name}", [("bytes", "left"), *_SLICE], rows)


def _targets(out: Console, phase: StreamPhase) -> None:
    wall_ns = figures.covered_ns(phase)
    for name, op in phase.ops.items():
        if len(op.targets) < 2:
            continue
        rows: list[tuple[Row, str]] = []
        slow_first = sorted(op.targets, key=lambda one: (-(percentile(one.total, 99) or 0), one.name))
        for one in slow_first[:MAX_ROWS]:
            cells = (one.name[-TARGET_WIDTH:], *_slice(one, wall_ns), f"{one.failed:,}")
            rows.append((cells, "red" if one.failed else ""))
        columns: list[Column] = [("target", "left"), *_SLICE, ("errors", "right")]
        print_table(out, f"Targets of {name}, slowest p99 first", columns, rows, tight=True)
        _more(out, len(slow_first) - MAX_ROWS, "target")
