"""A copy from its first question to its record."""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlstor import host_report
from mlstor.copy import describe
from mlstor.copy.calls import Calls
from mlstor.copy.check import proven_or_same
from mlstor.copy.mover import End, How, Mover
from mlstor.copy.parts import FileParts, ServerParts, Target
from mlstor.copy.session import CopySession
from mlstor.copy.tally import CopyTally
from mlstor.meter import INTERVAL_NS, Meter, Series
from mlstor.results.notes import plural
from mlstor.results.phase import Cached, RankFigures, Verification
from mlstor.results.record import StreamRecord
from mlstor.results.stream import StreamPhase, StreamProgress, StreamReport
from mlstor.results.stream_merge import merge_stream
from mlstor.runlog import RunLog
from mlstor.signals import Interrupts
from mlstor.storage.transfers import Digest
from mlstor.stream.describe import target_names
from mlstor.stream.live import StreamLive
from mlstor.units import format_gb
from mlstor.world import connect

if TYPE_CHECKING:
    from mlstor.copy.options import Options
    from mlstor.copy.session import Side
    from mlstor.stream.draws import U64

_CALLERS = 8
#: How long what is under way may take to end when the run is stopped: mpirun kills 0.5 s after SIGTERM.
_STOP_S, _STOP_ALONE_S = 0.25, 5.0


def run(options: Options, command: list[str]) -> int:
    """Carry out a copy; every process of the world calls this.

    Returns
    -------
    int
        0; 1 if objects did not arrive; 3 if bytes were found that are not the source's.
    """
    with Interrupts(), connect(options.expect_nodes, options.expect_ranks) as world, ExitStack() as stack:
        live = stack.enter_context(StreamLive(world, options.live))
        session = CopySession(world, options, command)
        for side in (session.source, session.destination):
            stack.callback(side.store.close)
        return Runner(session, live, stack).execute()


class _Counted(NamedTuple):
    busy_ns: int
    wait_ns: int


class Runner:
    """The one phase of a copy on one process."""

    def __init__(self, session: CopySession, live: StreamLive, stack: ExitStack) -> None:
        self.session, self.live, self._stack = session, live, stack
        self.world = session.world
        self.log: RunLog[StreamRecord] = RunLog(
            session.world, live, session.settings.results_dir, session.results_id, stack
        )
        self._calls = Calls(_CALLERS)
        stack.callback(self._calls.close)
        self._source = self._open(session.source)
        self._destination = self._open(session.destination)
        self._target = self._make_target()
        self._workers = sum(self._workers_of(end) for end in (self._source, self._destination))

    def _open(self, side: Side) -> End:
        session = self.session
        transfers = side.store.transfers(workers=session.workers, in_flight=session.in_flight)
        self._stack.callback(transfers.close)
        return End(side.store, transfers, side.digest, side.scheme)

    def _workers_of(self, end: End) -> int:
        found = getattr(end.transfers, "workers", None) or getattr(getattr(end.transfers, "engine", None), "workers", 0)
        return int(found or self.session.workers)

    def _make_target(self) -> Target | None:
        session, side = self.session, self.session.destination
        if side.scheme == "file":
            return FileParts(side.url, session.settings.for_target(side.url).direct)
        uploads = getattr(self._destination.transfers, "uploads", None)
        digest = Digest.NONE if session.options.verify == "no" else Digest.CRC32C
        return None if uploads is None else ServerParts(uploads, digest)

    # -- the run --

    def execute(self) -> int:
        """The phase, the record, and the exit code."""
        session = self.session
        phases: list[StreamPhase] = []
        try:
            self._open_journal()
            self._abort_left()
            todo, tally = self._plan()
            found = self._phase(todo, tally)
            if found is not None:
                phases.append(found)
            said = [
                json.loads(text) for text in self.world.allgather(json.dumps([tally.failed, tally.damaged]).encode())
            ]
            failed, damaged = (sum(column) for column in zip(*said, strict=True))
            if not failed and session.world.local_rank == 0:
                session.proven.discard()
            if self.log.header is not None:
                self.log.header.stores = describe.stores(session)  # how it was read is known only now
            self.log.seal(phases, self._show)
        except BaseException as error:
            self.log.last_words(error, "; the same command goes on where this one has ended")
            raise
        if self.world.rank == 0 and failed:
            sys.stderr.write(f"mlstor: {_failure_line(phases[0], failed, damaged)}\n")
        return 3 if damaged else 1 if failed else 0

    def _open_journal(self) -> None:
        session = self.session
        self.log.recover_others()
        found = host_report.gather(self.world, session.host, describe.host_report(session))
        if found is None:
            self.log.open(None, [])
            return
        reports, warnings = found
        for warning in warnings:
            self.live.say(warning)
        self.live.say(describe.announcement(session))
        header = describe.header(session, self._workers, reports, time.time_ns())
        self.log.open(header, [report.cores for report in reports])

    def _abort_left(self) -> None:
        """Uploads that an interrupted copy could not abort any more."""
        session = self.session
        if self._target is not None and self.world.local_rank == 0:
            left = session.proven.unfinished()
            for key, upload_id in left:
                try:
                    self._target.abort(key, upload_id)
                except OSError as error:
                    self.live.say(f"warning: an upload of {key} can't be aborted: {error}", any_process=True)
            session.proven.forget_uploads()
        self.world.barrier("uploads")

    def _plan(self) -> tuple[U64, CopyTally]:
        """What this process copies, and counts in which that what it need not is in already."""
        session = self.session
        tally = CopyTally(time.monotonic_ns(), self.world.rank)
        todo = session.mine(~session.there)
        there = session.mine(session.there)
        if len(there):
            same = proven_or_same(session, there)
            tally.skipped(session.objects.pack(there[same]).sizes)
            todo = np.sort(np.concatenate([todo, there[~same]]))
        return todo, tally

    # -- the phase --

    def _phase(self, todo: U64, tally: CopyTally) -> StreamPhase | None:
        session, world = self.session, self.world
        report = StreamReport(
            number=0, name="copy", process=world.rank, host=world.host_index, barrier_unix_ns=0, ranks=[]
        )
        how = How(session.options.verify, session.part_bytes, session.options.memory_bytes)
        ticks = _Ticks(self, report, tally)
        mover = Mover(
            self._source, self._destination, self._target, session.objects, todo, how, tally, session.proven,
            self._calls, ticks.tick,
        )  # fmt: skip
        total = sum(int(text) for text in world.allgather(str(len(todo)).encode()))
        self.log.reached(ticks.progress(), now=True)
        world.barrier("copy")
        self.live.begin("copy", total)
        ticks.start()
        try:
            mover.run()
        except (KeyboardInterrupt, OSError):
            mover.stop(_STOP_S if world.size > 1 else _STOP_ALONE_S)
            session.proven.save()
            ticks.write(complete=False)
            self.log.finished(report)
            raise
        session.proven.save()
        ticks.write(complete=True)
        self.log.finished(report)
        gathered = world.gather(report.encode())
        if gathered is None:
            return None
        reports = [StreamReport.decode(text) for text in gathered]
        phase = merge_stream(reports, host_cores=self.log.host_cores, processes=world.size)
        self.live.end(_sentence(phase))
        return phase

    def counters(self) -> _Counted:
        """Of both sides' workers."""
        both = [end.transfers.counters() for end in (self._source, self._destination)]
        return _Counted(sum(one.busy_ns for one in both), sum(one.wait_ns for one in both))

    def targets(self) -> dict[str, Any]:
        """Who serves the transfers of either side, where they are told apart."""
        return {"get": target_names(self._source.store), "put": target_names(self._destination.store)}

    @property
    def workers(self) -> int:
        """Threads of both sides."""
        return self._workers

    def _show(self, record: StreamRecord) -> None:
        from mlstor.results.table import print_record

        print_record(record, self.live.console)


class _Ticks:
    """What is told while the phase runs, and its report."""

    def __init__(self, runner: Runner, report: StreamReport, tally: CopyTally) -> None:
        self._runner, self._report, self._tally = runner, report, tally
        self._start_ns = self._ticked_ns = time.monotonic_ns()

    def start(self) -> None:
        """The barrier is passed."""
        runner = self._runner
        of_host = runner.world.local_rank == 0
        self._meter = Meter(runner.counters, runner.workers, of_host)
        self._start_ns = self._ticked_ns = time.monotonic_ns()
        self._tally.begin(self._start_ns)
        self._report.barrier_unix_ns = time.time_ns()
        self._series = Series(lambda: self._tally.nbytes, self._start_ns)

    def tick(self) -> None:
        """Called often; four times a second something is done."""
        now_ns = time.monotonic_ns()
        if now_ns - self._ticked_ns < INTERVAL_NS:
            return
        self._ticked_ns = now_ns
        runner, tally = self._runner, self._tally
        tally.fold()
        runner.session.proven.save()
        elapsed_ns = now_ns - self._start_ns
        self._series.sample()
        runner.live.at(None, elapsed_ns, tally.count, tally.nbytes)
        runner.log.reached(self.progress(elapsed_ns))
        if runner.log.journal.snapshot_due(self._report.number, elapsed_ns):
            self.write(complete=False)
            runner.log.journal.snapshot(self._report, elapsed_ns)

    def progress(self, elapsed_ns: int = 0) -> StreamProgress:
        """How far this process is."""
        report = self._report
        return StreamProgress(
            number=report.number,
            name=report.name,
            process=report.process,
            host=report.host,
            barrier_unix_ns=report.barrier_unix_ns or time.time_ns(),
            elapsed_ns=elapsed_ns,
            nbytes=self._tally.nbytes,
            count=self._tally.count,
        )

    def write(self, complete: bool) -> None:
        """Put the figures into the report."""
        report, tally = self._report, self._tally
        self._series.sample()
        report.complete = complete
        report.ops = tally.figures(self._runner.targets())
        report.failures = tally.failures
        report.failures_dropped = max(0, tally.failed - len(tally.failures))
        report.skipped_count, report.skipped_nbytes = tally.skipped_count, tally.skipped_nbytes
        report.verification = Verification(
            verified_nbytes=tally.verified_nbytes,
            damaged_blocks=tally.damaged_blocks,
            damage=tally.damage,
            damage_dropped=max(0, tally.damaged_blocks - len(tally.damage)),
        )
        report.cached = _cached(self._runner.session)
        report.ranks = [
            RankFigures(
                report.process, tally.first_ns, tally.first_done_ns, max(tally.last_ns, tally.first_done_ns),
                tally.nbytes, tally.count,
            )
        ]  # fmt: skip
        report.interval_ns, report.series = INTERVAL_NS, self._series.nbytes
        self._meter.read(report)


def _cached(session: CopySession) -> Cached:
    if session.source.scheme == "file":
        return Cached(verdict="unknown", how="files of a directory: the page cache may hold them")
    return Cached(verdict="no", how="every byte came over the connection: there is no cache on the client")


def _sentence(phase: StreamPhase) -> str:
    duration_s = max(1, *phase.ranks.end_ns) / 1e9
    count = sum(phase.ranks.nfiles)
    failed = sum(one.failed for one in phase.ops.values())
    skipped = f"; {phase.skipped_count:,} were there already" if phase.skipped_count else ""
    wrong = f"; {failed:,} FAILED" if failed else ""
    return (
        f"copy: {count:,} objects, {format_gb(phase.nbytes)} in {duration_s:.2f} s: "
        f"{phase.nbytes / duration_s / 1e9:.2f} GB/s{skipped}{wrong}"
    )


def _failure_line(phase: StreamPhase, failed: int, damaged: int) -> str:
    first = phase.failures[0]
    message = f": {first.message}" if first.message else f": {first.fault}"
    text = f"{plural(failed, 'object')} did not arrive"
    text += f", {damaged:,} of them because bytes are DAMAGED" if damaged else ""
    return f"{text}; the first of them: {first.op} {first.url}{message}"
