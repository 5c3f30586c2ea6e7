"""Files of a phase, on the file engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mlstor.results import phase as report

if TYPE_CHECKING:
    from mlstor._io import Engine, Request
    from mlstor.checkpoint.phase import Chain, Outcome
    from mlstor.operations import Counters, ReadFile, Result, WriteFile


class FileCarrier:
    """See `phase.Carrier`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._owner: dict[Request, Chain] = {}

    @property
    def workers(self) -> int:
        return self.engine.workers

    @property
    def outstanding(self) -> int:
        return len(self._owner)

    def begin(self) -> None:
        self.engine.reset_histograms()

    def counters(self) -> Counters:
        return self.engine.counters()

    def moved_nbytes(self) -> int:
        counters = self.engine.counters()
        return counters.read_bytes + counters.written_bytes

    def submit(self, stage: Sequence[WriteFile | ReadFile], chain: Chain) -> int:
        requests = self.engine.submit(stage)
        self._owner.update(dict.fromkeys(requests, chain))
        return len(requests)

    def reap(self, timeout_s: float) -> Iterator[tuple[Chain, Outcome]]:
        for request in self.engine.reap(1, timeout_s):
            chain = self._owner.pop(request)
            yield chain, request.result()

    def cancel(self) -> None:
        self.engine.cancel()

    def figures(self, into: report.PhaseReport, outcomes: Sequence[Outcome]) -> None:
        into.paths = paths_taken(outcomes)  # type: ignore[arg-type]  # the engine's own
        into.histograms = {
            name: report.Histogram(
                count=one.count,
                sum_ns=one.sum_ns,
                min_ns=one.min_ns,
                max_ns=one.max_ns,
                buckets=sorted(one.buckets.items()),
            )
            for name, one in self.engine.histograms().items()
            if one.count
        }


def paths_taken(results: Sequence[Result]) -> list[report.PathTaken]:
    """How the files were reached, added up by way."""
    ways: dict[tuple[str, str, str, str], report.PathTaken] = {}
    files: dict[tuple[str, str, str, str], set[str]] = {}
    for result in results:
        reason = "" if result.direct == "yes" else result.reason
        key = (result.backend, result.direct, reason, result.fs_type)
        way = ways.setdefault(
            key, report.PathTaken(backend=key[0], direct=result.direct, reason=reason, fs_type=key[3])
        )
        way.nbytes += result.nbytes
        files.setdefault(key, set()).add(result.path)
    for taken, way in ways.items():
        way.nfiles = len(files[taken])
    return list(ways.values())
