"""One phase on one process: the operations of its logical ranks, from the barrier to the last durable end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from mlstor.meter import INTERVAL_NS, Meter, Series
from mlstor.results.phase import PhaseReport, RankFigures
from mlstor.signals import raise_lost

if TYPE_CHECKING:
    from mlstor.meter import Counted


class Outcome(Protocol):
    """What became of an operation. Times in ns on CLOCK_MONOTONIC; `path` is the file's, or the object's URL."""

    @property
    def path(self) -> str: ...
    @property
    def start_ns(self) -> int: ...
    @property
    def end_ns(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def damaged_blocks(self) -> int: ...


class Carrier(Protocol):
    """What carries operations out: the file engine, or a store's transfers."""

    @property
    def workers(self) -> int:
        """Threads."""

    @property
    def outstanding(self) -> int:
        """Operations that were submitted and not yet reaped."""

    def begin(self) -> None:
        """A phase begins: figures of earlier ones are none of its."""

    def counters(self) -> Counted: ...

    def moved_nbytes(self) -> int:
        """Bytes moved since it was made."""

    def submit(self, stage: Sequence[Any], chain: Chain) -> int:
        """Begin the operations of a stage; how many."""

    def reap(self, timeout_s: float) -> Iterable[tuple[Chain, Outcome]]:
        """Wait for one or more to end.

        Raises
        ------
        OSError
            The first failure of the storage.
        """

    def cancel(self) -> None:
        """Nothing more is begun."""

    def figures(self, into: PhaseReport, outcomes: Sequence[Outcome]) -> None:
        """Histograms of the phase, and how its files were reached."""


class Chain:
    """The operations of one logical rank, stage after stage: a stage begins when all of the last one are done."""

    def __init__(self, rank: int, nfiles: int, stages: Sequence[Sequence[Any]]) -> None:
        self.rank = rank
        self.nfiles = nfiles
        self.waiting = list(reversed(stages))
        self.pending = 0
        self.results: list[Outcome] = []

    def advance(self, carrier: Carrier) -> None:
        """Submit the next stage, once nothing of the last one is under way."""
        while not self.pending and self.waiting:
            self.pending = carrier.submit(self.waiting.pop(), self)

    def take(self, outcome: Outcome) -> None:
        """One operation has ended."""
        self.results.append(outcome)
        self.pending -= 1

    def figures(self, start_ns: int) -> RankFigures:
        """What the rank did, relative to `start_ns`."""
        if not self.results:
            return RankFigures(self.rank, 0, 0, 0, 0, 0)
        ends: dict[str, int] = {}
        for result in self.results:  # a file that several operations read is done when the last of them is
            ends[result.path] = max(ends.get(result.path, 0), result.end_ns)
        return RankFigures(
            self.rank,
            max(0, min(result.start_ns for result in self.results) - start_ns),
            max(0, min(ends.values()) - start_ns),
            max(0, max(ends.values()) - start_ns),
            sum(result.nbytes for result in self.results),
            self.nfiles,
        )


def run_phase(
    carrier: Carrier,
    chains: Sequence[Chain],
    report_to: PhaseReport,
    of_host: bool,
    begin: Callable[[], None],
    tick: Callable[[int, int], None],
) -> PhaseReport:
    """Run the chains and fill in `report_to`; called right behind the phase's barrier.

    Parameters
    ----------
    of_host
        Whether this process looks at its host's traffic; one of each host does.
    begin
        What belongs to the phase but is no transfer: making its directories.
    tick
        Called every quarter of a second at least with ns since the barrier and bytes done.

    Raises
    ------
    OSError
        The first failure of the storage; nothing more is submitted then.
    """
    carrier.begin()
    meter = Meter(carrier.counters, carrier.workers, of_host)
    start_ns = time.monotonic_ns()
    report_to.barrier_unix_ns = time.time_ns()
    series = Series(carrier.moved_nbytes, start_ns)
    begin()
    for chain in chains:
        chain.advance(carrier)
    while carrier.outstanding:
        try:
            for chain, outcome in carrier.reap(INTERVAL_NS / 1e9):
                chain.take(outcome)
                chain.advance(carrier)
        except OSError:
            carrier.cancel()
            raise
        tick(time.monotonic_ns() - start_ns, series.sample())
        raise_lost()
    meter.read(report_to)
    report_to.interval_ns = INTERVAL_NS
    report_to.series = series.nbytes
    report_to.ranks = [chain.figures(start_ns) for chain in chains]
    carrier.figures(report_to, [outcome for chain in chains for outcome in chain.results])
    return report_to
