"""A record as tables for people; ``mlstor show RECORD`` prints a stored one. All derived figures are computed
here and now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from mlstor.results import figures, mlperf
from mlstor.results.figures import GIB
from mlstor.results.merge import add_histograms
from mlstor.results.notes import heading, paths, phase_name, plural, rate_text, totals, verdicts, verification
from mlstor.results.percentiles import percentile
from mlstor.results.phase import Histogram, Op, Phase
from mlstor.results.record import Record, load
from mlstor.units import format_ns

PLAIN_WIDTH = 100
"""Columns when the output is no terminal."""
MAX_OPERATION_PHASES = 6
"""Phases whose operations get rows of their own; those of a longer run are merged per direction."""
Justify = Literal["left", "right"]
Row = tuple[str, ...]
OPS: tuple[Op, ...] = ("write", "read")


def print_record(record: Record, console: Console | None = None) -> None:
    """Print `record` to `console`, by default standard output (100 columns wide if that is no terminal)."""
    out = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    heading(out, record)
    if record.phases:
        _throughput(out, record)
        totals(out, record)
        paths(out, record)
        verdicts(out, record)
        _operations(out, record)
        verification(out, record)
        _mlperf(out, record)
    else:
        out.print("no phase was begun", style="bold")


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(value_ns: int) -> str:
    return f"{value_ns / 1e9:.2f}" if value_ns >= 10**9 else f"{value_ns / 1e9:.3f}"


def _table(out: Console, title: str, columns: Sequence[tuple[str, Justify]], rows: Iterable[tuple[Row, str]]) -> None:
    """A title over a table without vertical lines; nothing where there are no rows. The title is not the
    table's own, which rich would wrap at the table's width.
    """
    padding = (0, 1, 0, 0) if out.width >= PLAIN_WIDTH else 0  # an ellipsis in a figure would be no figure
    table = Table(box=box.SIMPLE_HEAD, padding=padding, pad_edge=False, show_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=True)
    for cells, style in rows:
        table.add_row(*cells, style=style)
    if table.row_count:
        out.print()
        out.print(title, style="bold")
        out.print(table)
        out.print()


def _throughput(out: Console, record: Record) -> None:
    columns: list[tuple[str, Justify]] = [
        ("\nphase", "left"), ("\nGB", "right"), ("\nGB/s", "right"), ("first\ndone s", "right"),
        ("ranks'\nmin s", "right"), ("end\nmedian s", "right"), ("\nmax s", "right"), ("CPU\ns/GB", "right"),
        ("peak\nRSS MiB", "right"), ("\ncached", "left"), ("\nclient", "left"),
    ]  # fmt: skip
    _table(
        out,
        "Throughput: bytes / time to the slowest rank's durable end",
        columns,
        map(_throughput_row, record.phases),
    )


def _throughput_row(phase: Phase) -> tuple[Row, str]:
    ends = figures.spread(phase.ranks.end_ns)
    first = min(phase.ranks.first_done_ns, default=None)
    rss = max(phase.processes.peak_rss_bytes, default=None)
    row = (
        phase_name(phase),
        _number(phase.nbytes / figures.GB),
        rate_text(figures.rate(phase.nbytes, figures.wall_ns(phase))),
        "-" if first is None else _seconds(first),
        *(("-", "-", "-") if ends is None else map(_seconds, (ends.min, ends.median, ends.max))),
        _number(figures.cpu_s_per_gb(phase), 3),
        "-" if rss is None else f"{rss / 2**20:.0f}",
        phase.cached.verdict,
        {"yes": "LIMIT", "no": "ok", "unknown": "unknown"}[phase.client.limited],
    )
    return row, "" if phase.complete else "yellow"


def _operations(out: Console, record: Record) -> None:
    columns: list[tuple[str, Justify]] = [("phase", "left"), ("op", "left")]
    columns += [(name, "right") for name in ("count", "min", "mean", "p50", "p90", "p99", "p99.9", "max")]
    rows: list[tuple[Row, str]] = []
    for label, of_label in _phases_shown(record):
        first = True
        for name in sorted({name for phase in of_label for name in phase.histograms}):
            histogram = add_histograms(p.histograms[name] for p in of_label if name in p.histograms)
            if histogram.count:
                rows.append(((label if first else "", name, *_durations(histogram)), ""))
                first = False
    _table(out, "Operations: durations on all ranks, merged", columns, rows)


def _phases_shown(record: Record) -> list[tuple[str, list[Phase]]]:
    """Each phase by itself, or of a long run all writes and all reads: histograms add up."""
    if len(record.phases) <= MAX_OPERATION_PHASES:
        return [(phase_name(phase), [phase]) for phase in record.phases]
    both = [(op, [phase for phase in record.phases if phase.op == op]) for op in ("write", "read")]
    return [(f"{plural(len(phases), op)}", phases) for op, phases in both if phases]


def _durations(histogram: Histogram) -> Row:
    shown = [percentile(histogram, percent) or 0 for percent in (50, 90, 99, 99.9)]
    times = (histogram.min_ns, histogram.sum_ns / histogram.count, *shown, histogram.max_ns)
    return (f"{histogram.count:,}", *map(format_ns, times))


def _mlperf(out: Console, record: Record) -> None:
    metric = mlperf.metric(record)
    if not metric:
        out.print("MLPerf's fields: none, since rank 0 finished no phase of this run")
        return
    rows: list[tuple[Row, str]] = [((name, f"{value:,.4f}"), "") for name, value in metric.items()]
    _table(out, mlperf.LABEL, [("field", "left"), ("value", "right")], rows)
    for op in OPS:
        rates = figures.slowest_rank_rates(record, op, GIB)
        if rates:
            total = figures.total_rate(record, op, GIB)
            out.print(
                f"beside it, {op}: slowest rank, mean {rate_text(figures.mean(rates))} GiB/s; "
                f"total bytes / total time {rate_text(total)} GiB/s"
            )
    out.print(f"Files as in {mlperf.LAYOUT}.")


def main(argv: Sequence[str] | None = None) -> int:
    """``mlstor show RECORD``: print a stored record, or with ``--mlperf`` its figures as MLPerf's
    summary.json.

    Raises
    ------
    UsageError
        If there is no record at RECORD.
    """
    parser = argparse.ArgumentParser(prog="mlstor show", description="Print the record of a run.")
    parser.add_argument("record", metavar="RECORD", help="a record.json, or the directory of a run under --results")
    parser.add_argument("--mlperf", action="store_true", help="print MLPerf's summary.json fields as JSON instead")
    options = parser.parse_args(argv)
    record = load(options.record)
    if options.mlperf:
        print(json.dumps(mlperf.summary_json(record), indent=2))
    else:
        print_record(record)
    return 0
