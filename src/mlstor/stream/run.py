"""A stream: its phases in order, what each process reports of them, the record that comes of it."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mlstor import host_report
from mlstor.meter import INTERVAL_NS, Meter, Series
from mlstor.results.phase import RankFigures
from mlstor.results.record import StreamRecord
from mlstor.results.stream import StreamPhase, StreamProgress, StreamReport, Temperature
from mlstor.results.stream_merge import merge_stream
from mlstor.results.stream_verdicts import distinct_nbytes, server_cache
from mlstor.runlog import RunLog
from mlstor.signals import Interrupts
from mlstor.stream import cleanup, describe, token_run, verdict
from mlstor.stream.live import StreamLive
from mlstor.stream.load import Load
from mlstor.stream.session import Session
from mlstor.stream.tally import Tally
from mlstor.stream.token_loop import TokenLoop, TokenTally
from mlstor.stream.workload import Planned, Workload, phases
from mlstor.units import format_gb
from mlstor.world import World, connect

if TYPE_CHECKING:
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.compose import Composer
    from mlstor.stream.handles import Handles
    from mlstor.stream.options import Options
    from mlstor.stream.reads import Reads


def run(options: Options, command: list[str]) -> int:
    """Carry out a stream; every process of the world calls this.

    Returns
    -------
    int
        0; 1 if transfers failed; 3 if what was read is not what was written.
    """
    with Interrupts(), connect(options.expect_nodes, options.expect_ranks) as world, ExitStack() as stack:
        live = stack.enter_context(StreamLive(world, options.live))
        if options.clean is not None:
            return cleanup.clean(world, options, live)
        session = Session(world, options, command)
        stack.callback(session.store.close)
        return Runner(session, live, stack).execute()


class Runner:
    """The phases of a session on one process."""

    def __init__(self, session: Session, live: StreamLive, stack: ExitStack) -> None:
        self.session, self.live, self._stack = session, live, stack
        self.world: World = session.world
        self.log: RunLog[StreamRecord] = RunLog(
            session.world, live, session.settings.results_dir, session.results_id, stack
        )
        self.phases: list[StreamPhase] = []
        self._damaged = self._failed = self._waited = 0
        self._handles: Handles | None = None

    def execute(self) -> int:
        """All phases, then the record, then the tidying up."""
        session = self.session
        try:
            session.begin()
            workload = self._workload()
            self._open_journal(workload)
            with ExitStack() as stack:
                transfers = self._transfers()
                stack.callback(transfers.close)
                self._keep_handles(stack)
                all_of_them = list(phases(session))
                for number, planned in enumerate(all_of_them):
                    self._phase(number, planned, workload, transfers)
                    self._note_written(workload, ended=number == len(all_of_them) - 1)
            if self.log.header is not None:
                self.log.header.stores = describe.stores(session)  # how they were read is known only now
            self.log.seal(self.phases, self._show)
            if session.options.cleanup:
                self._tidy()
        except BaseException as error:
            self.log.last_words(error, self._remedy())
            raise
        self._say_kept()
        return verdict.exit_code(self.world, self.phases, self._failed, self._damaged, self._waited, sys.stderr)

    # -- what `mlstor aisloader` does in its own way --

    def _workload(self) -> Workload:
        return Workload(self.session)

    def _transfers(self) -> Transfers:
        session = self.session
        return session.store.transfers(workers=session.workers, in_flight=session.in_flight)

    def _header(self, workload: Workload, reports: list[host_report.HostReport]) -> StreamRecord:
        return describe.header(self.session, workload, reports, time.time_ns())

    def _ticked(self, tally: Tally, elapsed_ns: int) -> None:
        """A phase is under way; called every quarter of a second."""

    def _stopped(self, report: StreamReport, elapsed_ns: int) -> None:
        """A phase ends early, with this process's figures."""

    def _tidy(self) -> None:
        cleanup.tidy(self.session, self.live)

    def _remedy(self) -> str:
        return cleanup.remedy(self.session)

    # -- before --

    def _open_journal(self, workload: Workload) -> None:
        session, world = self.session, self.world
        self.log.recover_others()
        found = host_report.gather(world, session.host, describe.host_report(session))
        if found is None:
            self.log.open(None, [])
            return
        reports, warnings = found
        for warning in warnings:
            self.live.say(warning)
        self.live.say(describe.announcement(session, workload))
        header = self._header(workload, reports)
        self.log.open(header, [report.cores for report in reports])

    # -- a phase --

    def _phase(self, number: int, planned: Planned, workload: Workload, transfers: Transfers) -> None:
        """One phase, from its preparation to its figures at process 0."""
        session, world = self.session, self.world
        reads = workload.reads(planned)
        limits = workload.limits(planned, reads)
        composer: Composer | TokenLoop
        if self._handles is not None and reads is not None:
            composer = TokenLoop(self._handles, reads, limits, session.options.verify == "pattern")
        else:
            composer = workload.composer(planned, transfers, reads, limits)
        report = StreamReport(
            number=number, name=planned.name, process=world.rank, host=world.host_index, barrier_unix_ns=0, ranks=[]
        )
        self.log.reached(_progress(report, 0, 0, 0, time.time_ns()), now=True)
        world.barrier(planned.name)
        under_way = _UnderWay(self, report, composer, transfers)
        total = None if planned.ops is None else planned.ops
        self.live.begin(planned.name, total)
        try:
            under_way.run(workload.start(composer, planned, under_way.start_ns))
        except (KeyboardInterrupt, OSError):
            under_way.write(complete=False)
            self.log.finished(report)
            self._stopped(report, time.monotonic_ns() - under_way.start_ns)
            raise
        under_way.write(complete=True)
        report.verification = verdict.verification(session, under_way.tally, again=True)
        self._failed += under_way.tally.failed
        if not under_way.tally.count:  # nothing ended well, and nothing failed for good only for lack of time
            self._failed += under_way.tally.waited
        else:
            self._waited += under_way.tally.waited
        self._damaged += under_way.tally.damaged_blocks + under_way.tally.checksum_failures
        self.log.finished(report)
        gathered = world.gather(report.encode())
        workload.ended(reads)
        if gathered is None:
            return
        phase = merge_stream(
            [StreamReport.decode(text) for text in gathered], host_cores=self.log.host_cores, processes=world.size
        )
        if reads is not None:
            self._judge_cache(phase, reads)
        self.phases.append(phase)
        self.live.end(_sentence(phase))

    def _keep_handles(self, stack: ExitStack) -> None:
        self._handles = self.session.agreed(lambda: token_run.kept_of(self.session))
        if self._handles is not None:
            stack.callback(self._handles.close)

    def _judge_cache(self, phase: StreamPhase, reads: Reads) -> None:
        """Whether the servers' memory may have answered: by the distinct bytes that were read."""
        read = sum(one.nbytes for name, one in phase.ops.items() if name.startswith("get"))
        memory, source = self.session.server_memory
        options, epoch_nbytes = self.session.options, reads.epoch_nbytes
        if epoch_nbytes:
            read = distinct_nbytes(
                read,
                epoch_nbytes,
                draws_of=len(reads.ranges.objects) if options.order == "replacement" else None,
                clients=self.session.group.size if options.epoch_scope == "client" else 1,
            )
        phase.server_cache = server_cache(read, memory, source)

    def _note_written(self, workload: Workload, ended: bool) -> None:
        cleanup.note_written(self.session, workload.writes, ended)

    # -- after --

    def _show(self, record: StreamRecord) -> None:
        from mlstor.results.table import print_record

        print_record(record, self.live.console)

    def _say_kept(self) -> None:
        session = self.session
        if session.written is not None and not session.options.cleanup:
            self.live.say(f"kept: what run {session.run_id} wrote{self._remedy()}")


class _UnderWay:
    """A phase between its barrier and its report."""

    def __init__(
        self,
        runner: Runner,
        report: StreamReport,
        composer: Composer | TokenLoop,
        transfers: Transfers,
    ) -> None:
        self._runner, self._report, self._composer, self._transfers = runner, report, composer, transfers
        moved: Transfers | Handles = composer.handles if isinstance(composer, TokenLoop) else transfers
        self._opened = token_run.Opened(runner.session, moved) if runner.session.options.tokens is not None else None
        session = runner.session
        self._reads = composer.reads
        first_epoch = 0 if composer.reads is None else composer.reads.epoch
        self._meter = Meter(moved.counters, session.workers, session.world.local_rank == 0)
        self.start_ns = time.monotonic_ns()
        report.barrier_unix_ns = time.time_ns()
        self._series = Series(lambda: _moved(moved), self.start_ns)

        def temperature(epoch: int) -> Temperature:
            if self._reads is None or session.options.order == "replacement":
                return "unknown"
            if epoch > first_epoch or session.options.fill is not None:
                return "warm"
            if epoch > 0:  # a warm-up of some time has touched who knows which
                return "warm" if session.options.warmup_epochs else "unknown"
            return "cold" if describe.no_cache_answers(session) else "unknown"

        self.tally = (TokenTally if isinstance(composer, TokenLoop) else Tally)(
            composer.slots,
            self.start_ns,
            session.world.rank,
            temperature,
            verified=session.options.verify == "pattern",
        )

    def run(self, ends_ns: int | None) -> None:
        """All its transfers."""
        if isinstance(self._composer, TokenLoop):
            assert isinstance(self.tally, TokenTally)
            self._composer.run(self.tally, ends_ns, self._tick)
        else:
            Load(self._transfers, self._composer, self.tally, ends_ns=ends_ns, tick=self._tick).run()

    def _tick(self) -> None:
        tally, log, runner = self.tally, self._runner.log, self._runner
        elapsed_ns = time.monotonic_ns() - self.start_ns
        nbytes = self._series.sample()
        epoch = None if self._reads is None else max(tally.epochs, default=None)
        runner.live.at(epoch, elapsed_ns, tally.count, nbytes)
        runner._ticked(tally, elapsed_ns)
        report = self._report
        log.reached(_progress(report, elapsed_ns, tally.nbytes, tally.count, report.barrier_unix_ns))
        if log.journal.snapshot_due(report.number, elapsed_ns):
            self.write(complete=False)
            log.journal.snapshot(report, elapsed_ns)

    def write(self, complete: bool) -> None:
        """Put the figures into the report."""
        report, tally = self._report, self.tally
        self._series.sample()
        report.complete = complete
        report.ops = tally.figures(describe.target_names(self._runner.session.store))
        report.epochs = [one for _, one in sorted(tally.epochs.items())] if self._reads is not None else []
        report.failures = tally.failures
        report.failures_dropped = max(0, tally.failed - len(tally.failures))
        report.ranks = [
            RankFigures(report.process, tally.first_ns, tally.first_done_ns, tally.last_ns, tally.nbytes, tally.count)
        ]
        session = self._runner.session
        report.paths = describe.paths_taken(session, self._transfers, tally.count, tally.nbytes)
        report.cached = verdict.cached(session, reads=self._reads is not None)
        report.verification = verdict.verification(session, tally, again=False)
        report.interval_ns, report.series = INTERVAL_NS, self._series.nbytes
        if self._opened is not None:
            self._opened.write(report)
        self._meter.read(report)


def _moved(transfers: Transfers | Handles) -> int:
    counters = transfers.counters()
    return counters.received_bytes + counters.sent_bytes


def _progress(report: StreamReport, elapsed_ns: int, nbytes: int, count: int, barrier_unix_ns: int) -> StreamProgress:
    return StreamProgress(
        number=report.number,
        name=report.name,
        process=report.process,
        host=report.host,
        barrier_unix_ns=barrier_unix_ns,
        elapsed_ns=elapsed_ns,
        nbytes=nbytes,
        count=count,
    )


def _sentence(phase: StreamPhase) -> str:
    duration_s = max(1, *phase.ranks.end_ns) / 1e9
    count = sum(phase.ranks.nfiles)
    failed = sum(one.failed for one in phase.ops.values())
    wrong = f"; {failed:,} FAILED" if failed else ""
    damage = (
        f"; {phase.verification.damaged_blocks:,} blocks of 4 KiB DAMAGED" if phase.verification.damaged_blocks else ""
    )
    return (
        f"{phase.name}: {count:,} operations, {format_gb(phase.nbytes)} in {duration_s:.2f} s: "
        f"{count / duration_s:,.0f} per second, {phase.nbytes / duration_s / 1e9:.2f} GB/s{wrong}{damage}"
    )
