"""aisloader's table and its JSON, line by line while the run goes on."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

from mlstor.errors import UsageError
from mlstor.results.aisloader import Interval, interval

if TYPE_CHECKING:
    from mlstor.results.stream import OpFigures
    from mlstor.stream.tally import Tally

#: Rows of the table, and the operations in each.
ROWS = {
    "PUT": ("put", "put-shard"),
    "MPU": ("put-parts",),
    "GET": ("get", "get-range", "get-archived"),
    "GET-MPDSTREAM": ("get-parallel",),
    "GBT": ("batch",),
}
_COLUMNS = "%-10s%-6s%-22s\t%-22s\t%-36s\t%-22s\t%-10s\n"
_TITLES = ("Time", "OP", "Count", "Size (Total)", "Latency (min, avg, max)", "Throughput (Avg)", "Errors (Total)")

Ops = Mapping[str, "OpFigures"]


class Report:
    """Writes elements or rows.

    Parameters
    ----------
    path
        File, "" for standard output.
    as_json
        Elements instead of rows.
    every_s
        Seconds of an interval; 0: only the whole run.
    """

    def __init__(self, path: str, as_json: bool, every_s: int) -> None:
        self._json, self._every_ns = as_json, every_s * 10**9
        self._close = bool(path)
        self._out: TextIO = sys.stdout
        if path:
            try:
                self._out = open(path, "w", encoding="utf-8")  # noqa: SIM115  # closed by `close`
            except OSError as error:
                raise UsageError(f"-stats-output={path} can't be written: {error.strerror}") from None
        self._elements = 0
        self._before: Ops = {}
        self._before_ns = 0
        self._began_unix_ns = 0

    def begin(self) -> None:
        """The run begins now."""
        self._began_unix_ns = time.time_ns()
        if not self._json and self._every_ns:
            self._head()

    def tick(self, tally: Tally, elapsed_ns: int) -> None:
        """Write an interval if one is over."""
        if self._every_ns and elapsed_ns - self._before_ns >= self._every_ns:
            self.interval(tally.figures(()), elapsed_ns)

    def interval(self, ops: Ops, elapsed_ns: int) -> None:
        """Write what was done since the last time; `ops` are all since the beginning."""
        start_ns, taken_ns = self._began_unix_ns + self._before_ns, elapsed_ns - self._before_ns
        if self._json:
            self._element(interval(ops, start_ns, taken_ns, self._before))
        else:
            for label, names in ROWS.items():
                one = _of(ops, names, start_ns, taken_ns, self._before)
                if one.count or one.failed:
                    self._row(label, one, _of(ops, names, self._began_unix_ns, elapsed_ns))
        self._before, self._before_ns = dict(ops), elapsed_ns

    def whole(self, ops: Ops, start_unix_ns: int, duration_ns: int) -> None:
        """Write the whole run."""
        if self._json:
            self._element(interval(ops, start_unix_ns, duration_ns))
            return
        self._head()
        for label, names in ROWS.items():
            one = _of(ops, names, start_unix_ns, duration_ns)
            if one.count or one.failed:
                self._row(label, one, None)

    def close(self) -> None:
        """End the array of elements, and the file."""
        if self._json:
            self._out.write("\n]\n" if self._elements else "[\n]\n")
        self._out.flush()
        if self._close:
            self._out.close()

    def _element(self, element: Mapping[str, Interval]) -> None:
        self._out.write(",\n" if self._elements else "[\n")
        self._out.write(json.dumps({name: one.stats() for name, one in element.items()}, indent=2))
        self._out.flush()
        self._elements += 1

    def _head(self) -> None:
        self._out.write("\n" + _COLUMNS % _TITLES)
        self._out.flush()

    def _row(self, label: str, one: Interval, total: Interval | None) -> None:
        rate, mean_ns = _rate(one), one.sum_ns // one.count if one.count else 0
        latency = "".join(f"{go_duration(part):<11}" for part in (one.min_ns, mean_ns, one.max_ns))
        errors = f"{one.failed:,}" if one.failed or total is None else "-"
        columns = [f"{one.count:,}", iec(one.nbytes, 1), latency, rate, errors]
        if total is not None:
            columns[0] += f" ({total.count:,})"
            columns[1] += f" ({iec(total.nbytes, 1)})"
            columns[3] += f" ({_rate(total)})"
            columns[4] = f"{one.failed:,} ({total.failed:,})" if total.failed else "-"
        self._out.write(_COLUMNS % (time.strftime("%H:%M:%S"), label, *columns))
        self._out.flush()


def _of(ops: Ops, names: tuple[str, ...], start_ns: int, taken_ns: int, before: Ops | None = None) -> Interval:
    """One row: operations that the JSON would put together, apart."""
    then = None if before is None else {name: before[name] for name in names if name in before}
    found = interval({name: ops[name] for name in names if name in ops}, start_ns, taken_ns, then)
    return next((one for one in found.values() if one.count or one.failed), found["get"])


def _rate(one: Interval) -> str:
    per_s = one.nbytes * 10**9 // one.duration_ns if one.duration_ns else 0
    return f"{iec(per_s, 2)}/s" if per_s else "-"


def iec(nbytes: int, digits: int) -> str:
    """Bytes as aisloader shows them: ``19.7MiB``; ``-`` for none."""
    if nbytes <= 0:
        return "-"
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.{digits}f}{unit}"
    return f"{nbytes}B"


def go_duration(ns: int) -> str:
    """A duration as Go writes it, cut to three decimals: ``755.308µs``, ``1m2.5s``."""
    if ns < 1000:
        return f"{ns}ns" if ns else "0s"
    for unit_ns, unit in ((10**6, "µs"), (10**9, "ms")):
        if ns < unit_ns:
            return _cut(ns, unit_ns // 1000) + unit
    minutes, rest = divmod(ns, 60 * 10**9)
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + _cut(rest, 10**9) + "s"


def _cut(ns: int, unit_ns: int) -> str:
    whole, rest = divmod(ns, unit_ns)
    # Go leaves out zeros at the end of all digits, and aisloader then all behind the third
    decimals = f"{rest:0{len(str(unit_ns)) - 1}d}".rstrip("0")[:3]
    return f"{whole}.{decimals}" if decimals else str(whole)
