"""Making a record's `Phase` of the processes' reports: sums, columns and histograms, whatever the order they
come in.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlstor.results.client import judge
from mlstor.results.merge_parts import add_histograms, common
from mlstor.results.phase import Histogram, Phase, PhaseReport, Progress, Requests


def merge_phase(
    reports: Sequence[PhaseReport],
    *,
    progress: Sequence[Progress] = (),
    host_cores: Sequence[int] = (),
    processes: int | None = None,
) -> Phase:
    """The phase that `reports` are of.

    Parameters
    ----------
    reports
        One per process that finished it, in any order.
    progress
        The last word of processes that did not finish it, for a partial record.
    host_cores
        Cores usable on each host, for the client's verdict (see `client.judge`).
    processes
        Processes of the run; by default those in `reports` and `progress`. With fewer reports than that the
        phase is not complete.

    Raises
    ------
    WorldError
        If the reports are of different phases, two are of one process, two tell of one rank, or there are
        none.
    """
    reports = sorted(reports, key=lambda report: report.process)
    progress = sorted(progress, key=lambda one: one.process)
    fields = common(reports, progress, processes, lambda one: f"{one.op} {one.checkpoint}")
    everyone: list[PhaseReport | Progress] = [*reports, *progress]
    first = everyone[0]
    return Phase(
        **fields,
        op=first.op,
        checkpoint=first.checkpoint,
        histograms=_histograms(reports),
        requests=_requests([report.requests for report in reports if report.requests is not None]),
        client=judge(reports, host_cores),
    )


def _requests(several: Sequence[Requests]) -> Requests | None:
    if not several:
        return None
    words = sorted({word for one in several for word in one.retried_by})
    return Requests(
        sent=sum(one.sent for one in several),
        retries=sum(one.retries for one in several),
        retried_by={word: sum(one.retried_by.get(word, 0) for one in several) for word in words},
        connections=sum(one.connections for one in several),
    )


def _histograms(reports: Sequence[PhaseReport]) -> dict[str, Histogram]:
    names = sorted({name for report in reports for name in report.histograms})
    return {name: add_histograms(r.histograms[name] for r in reports if name in r.histograms) for name in names}
