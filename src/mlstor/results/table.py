"""A record as tables for people; ``mlstor show RECORD`` prints a stored one. All derived figures are computed
here and now.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console

from mlstor.errors import UsageError
from mlstor.results import aisloader, figures, mlperf
from mlstor.results.figures import GIB
from mlstor.results.merge_parts import add_histograms
from mlstor.results.notes import (
    heading,
    paths,
    phase_name,
    plural,
    rate_text,
    requests,
    totals,
    verdicts,
    verification,
)
from mlstor.results.percentiles import percentile
from mlstor.results.phase import Histogram, Op, Phase
from mlstor.results.record import Record, StreamRecord, load_any
from mlstor.results.stream_table import print_stream
from mlstor.results.tables import PLAIN_WIDTH, Column, Row, number, print_table, seconds
from mlstor.units import format_ns

MAX_OPERATION_PHASES = 6
"""Phases whose operations get rows of their own; those of a longer run are merged per direction."""
OPS: tuple[Op, ...] = ("write", "read")


def print_record(record: Record | StreamRecord, console: Console | None = None) -> None:
    """Print `record` to `console`, by default standard output (100 columns wide if that is no terminal)."""
    out = console or Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)
    if isinstance(record, StreamRecord):
        print_stream(out, record)
        return
    heading(out, record)
    if record.phases:
        _throughput(out, record)
        totals(out, record)
        paths(out, record)
        requests(out, record)
        verdicts(out, record)
        _operations(out, record)
        verification(out, [phase for phase in record.phases if phase.op == "read"])
        _mlperf(out, record)
    else:
        out.print("no phase was begun", style="bold")


def _throughput(out: Console, record: Record) -> None:
    columns: list[Column] = [
        ("\nphase", "left"), ("\nGB", "right"), ("\nGB/s", "right"), ("first\ndone s", "right"),
        ("ranks'\nmin s", "right"), ("end\nmedian s", "right"), ("\nmax s", "right"), ("CPU\ns/GB", "right"),
        ("peak\nRSS MiB", "right"), ("\ncached", "left"), ("\nclient", "left"),
    ]  # fmt: skip
    print_table(
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
        number(phase.nbytes / figures.GB),
        rate_text(figures.rate(phase.nbytes, figures.wall_ns(phase))),
        "-" if first is None else seconds(first),
        *(("-", "-", "-") if ends is None else map(seconds, (ends.min, ends.median, ends.max))),
        number(figures.cpu_s_per_gb(phase), 3),
        "-" if rss is None else f"{rss / 2**20:.0f}",
        phase.cached.verdict,
        {"yes": "LIMIT", "no": "ok", "unknown": "unknown"}[phase.client.limited],
    )
    return row, "" if phase.complete else "yellow"


def _operations(out: Console, record: Record) -> None:
    columns: list[Column] = [("phase", "left"), ("op", "left")]
    columns += [(name, "right") for name in ("count", "min", "mean", "p50", "p90", "p99", "p99.9", "max")]
    rows: list[tuple[Row, str]] = []
    for label, of_label in _phases_shown(record):
        first = True
        for name in sorted({name for phase in of_label for name in phase.histograms}):
            histogram = add_histograms(p.histograms[name] for p in of_label if name in p.histograms)
            if histogram.count:
                rows.append(((label if first else "", name, *_durations(histogram)), ""))
                first = False
    print_table(out, "Operations: durations on all ranks, merged", columns, rows)


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
    print_table(out, mlperf.LABEL, [("field", "left"), ("value", "right")], rows)
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
    summary.json, or with ``--aisloader`` as aisloader's JSON.

    Raises
    ------
    UsageError
        If there is no record at RECORD, or it is not of the kind that is asked for.
    """
    parser = argparse.ArgumentParser(prog="mlstor show", description="Print the record of a run.")
    parser.add_argument("record", metavar="RECORD", help="a record.json, or the directory of a run under --results")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument(
        "--mlperf", action="store_true", help="print a checkpoint run as MLPerf's summary.json fields instead"
    )
    shape.add_argument(
        "--aisloader", action="store_true", help="print an object stream as aisloader -json does instead"
    )
    options = parser.parse_args(argv)
    record = load_any(options.record)
    if options.mlperf:
        if not isinstance(record, Record):
            raise UsageError(f"{options.record} is no checkpoint run, of which MLPerf's fields are: leave --mlperf out")
        print(json.dumps(mlperf.summary_json(record), indent=2))
    elif options.aisloader:
        if not isinstance(record, StreamRecord):
            raise UsageError(f"{options.record} is no object stream, as aisloader's are: leave --aisloader out")
        print(aisloader.encode(aisloader.of_record(record)), end="")
    else:
        print_record(record)
    return 0
