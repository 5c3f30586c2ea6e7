"""Making a record's `StreamPhase` of the processes' reports: sums, columns and histograms, whatever the order they come
in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mlstor.results.client import judge
from mlstor.results.merge_parts import add_histograms, common
from mlstor.results.stream import (
    MAX_FAILURES,
    MAX_TARGETS,
    OPS,
    Epoch,
    OpFigures,
    ServerCache,
    SizeClass,
    Slice,
    StreamPhase,
    StreamProgress,
    StreamReport,
    TargetSlice,
)
from mlstor.results.stream_verdicts import judge_network

OTHERS = "others"
"""Name of what the targets beyond `MAX_TARGETS` are merged as."""
_CACHE_ORDER = ("possible", "unknown", "exceeded")


def merge_stream(
    reports: Sequence[StreamReport],
    *,
    progress: Sequence[StreamProgress] = (),
    host_cores: Sequence[int] = (),
    processes: int | None = None,
) -> StreamPhase:
    """The phase that `reports` are of.

    Parameters
    ----------
    reports
        One per process, in any order; those that are not complete are marked so.
    progress
        The last word of processes that did not finish it, for a partial record. A process may have a report that is
        not complete as well: `ops` are then as far as that, and the phase's bytes as far as the later word.
    host_cores
        Cores usable on each host, for the client's verdict (see `client.judge`).
    processes
        Processes of the run; by default those in `reports` and `progress`. With fewer complete reports than that the
        phase is not complete.

    Raises
    ------
    WorldError
        If the reports are of different phases, two are of one process, two tell of one rank, or there are none.
    """
    reports = sorted(reports, key=lambda report: report.process)
    progress = sorted(progress, key=lambda one: one.process)
    fields = common(reports, progress, processes, lambda one: str(one.name))
    everyone: list[StreamReport | StreamProgress] = [*reports, *progress]
    failures = sorted((one for r in reports for one in r.failures), key=lambda one: one.rank)
    fetched = [report.fetched_bytes for report in reports]
    return StreamPhase(
        **fields,
        name=everyone[0].name,
        ops=_by_name(reports),
        epochs=_epochs(epoch for report in reports for epoch in report.epochs),
        failures=failures[:MAX_FAILURES],
        failures_dropped=sum(r.failures_dropped for r in reports) + len(failures[MAX_FAILURES:]),
        skipped_count=sum(report.skipped_count for report in reports),
        skipped_nbytes=sum(report.skipped_nbytes for report in reports),
        opens=sum(report.opens for report in reports),
        fetched_bytes=None if not fetched or None in fetched else sum(one for one in fetched if one is not None),
        server_cache=_server_cache(reports),
        client=judge(reports, host_cores, stream=True),
        network=judge_network(reports),
    )


def op_order(name: str) -> tuple[int, str]:
    """Sorts names of operations as they are shown."""
    return (OPS.index(name) if name in OPS else len(OPS), name)


def _by_name(reports: Sequence[StreamReport]) -> dict[str, OpFigures]:
    names = sorted({name for report in reports for name in report.ops}, key=op_order)
    return {name: add_ops([report.ops[name] for report in reports if name in report.ops]) for name in names}


def add_ops(several: Sequence[OpFigures]) -> OpFigures:
    """Their sum, of one operation's figures or of several operations'."""
    return OpFigures(
        count=sum(one.count for one in several),
        nbytes=sum(one.nbytes for one in several),
        failed=sum(one.failed for one in several),
        cancelled=sum(one.cancelled for one in several),
        errors=_add_words(one.errors for one in several),
        retries=sum(one.retries for one in several),
        retried_by=_add_words(one.retried_by for one in several),
        connections=sum(one.connections for one in several),
        compared=sum(one.compared for one in several),
        total=add_histograms(one.total for one in several),
        ttfb=add_histograms(one.ttfb for one in several),
        redirect=add_histograms(one.redirect for one in several),
        from_intended=add_histograms(one.from_intended for one in several),
        retried=add_histograms(one.retried for one in several),
        cold=Slice(**_add_slices([one.cold for one in several])),
        warm=Slice(**_add_slices([one.warm for one in several])),
        sizes=[
            SizeClass(from_bytes=at, **_add_slices(slices))
            for at, slices in sorted(
                _grouped((s for one in several for s in one.sizes), lambda s: s.from_bytes).items()
            )
        ],
        targets=_targets([target for one in several for target in one.targets]),
    )


def _add_words(several: Iterable[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in several:
        for word, count in one.items():
            total[word] = total.get(word, 0) + count
    return dict(sorted(total.items()))


def _add_slices(slices: Sequence[Slice]) -> dict[str, Any]:
    """The fields of `Slice`, added."""
    return {
        "count": sum(one.count for one in slices),
        "nbytes": sum(one.nbytes for one in slices),
        "total": add_histograms(one.total for one in slices),
    }


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _targets(targets: Sequence[TargetSlice]) -> list[TargetSlice]:
    """One per name. Of a cluster with more than `MAX_TARGETS` those with the highest mean time stay, for they are what
    one looks for, and the rest is one.
    """

    def added(name: str, several: Sequence[TargetSlice]) -> TargetSlice:
        return TargetSlice(name=name, failed=sum(one.failed for one in several), **_add_slices(several))

    of_name = _grouped(targets, lambda one: one.name)
    former = of_name.pop(OTHERS, [])
    found = [added(name, several) for name, several in sorted(of_name.items())]
    if len(found) + bool(former) <= MAX_TARGETS:
        return found + ([added(OTHERS, former)] if former else [])
    slow_first = sorted(found, key=lambda one: (-(one.total.sum_ns // max(1, one.count)), one.name))
    kept = sorted(slow_first[: MAX_TARGETS - 1], key=lambda one: one.name)
    return [*kept, added(OTHERS, [*slow_first[MAX_TARGETS - 1 :], *former])]


def _epochs(epochs: Iterable[Epoch]) -> list[Epoch]:
    merged = []
    for number, several in sorted(_grouped(epochs, lambda one: one.epoch).items()):
        temperatures = {one.temperature for one in several}
        merged.append(
            Epoch(
                epoch=number,
                epochs=max(one.epochs for one in several),
                temperature=temperatures.pop() if len(temperatures) == 1 else "unknown",
                start_ns=min(one.start_ns for one in several),
                end_ns=max(one.end_ns for one in several),
                count=sum(one.count for one in several),
                nbytes=sum(one.nbytes for one in several),
                failed=sum(one.failed for one in several),
            )
        )
    return merged


def _server_cache(reports: Sequence[StreamReport]) -> ServerCache | None:
    """The worst verdict of those who gave one; process 0's where all say the same."""
    given = [report.server_cache for report in reports if report.server_cache is not None]
    return min(given, key=lambda one: _CACHE_ORDER.index(one.verdict), default=None)
