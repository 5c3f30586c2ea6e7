"""A run: its phases in order, what each process reports of them, the record that comes of it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from mlstor import _io
from mlstor.checkpoint import describe, honesty, rundir
from mlstor.checkpoint.live import Live
from mlstor.checkpoint.options import Options
from mlstor.checkpoint.phase import Chain, run_phase
from mlstor.checkpoint.profiles import Job
from mlstor.checkpoint.session import Session
from mlstor.errors import MlstorError
from mlstor.host import binding_warning
from mlstor.launch import detect
from mlstor.operations import Step
from mlstor.results import figures, journal
from mlstor.results.merge import merge_phase
from mlstor.results.notes import damage_text, plural
from mlstor.results.phase import Phase, PhaseReport, Progress
from mlstor.results.record import Record, RunError
from mlstor.signals import Interrupts
from mlstor.world import World, connect

if TYPE_CHECKING:
    from mlstor._io import Engine

Op = Literal["write", "read"]
# mpirun kills 0.5 s after SIGTERM; by then all journals hold their last word and process 0 has made a record of them.
_LAST_WORDS_S = 0.1


def run(options: Options, command: list[str]) -> int:
    """Carry out a checkpoint run; every process of the world calls this.

    Returns
    -------
    int
        0, or 3 if data that was read is not what was written.
    """
    with Interrupts(), connect(options.expect_nodes, options.expect_ranks) as world:
        session = Session(world, options, command)
        with ExitStack() as stack, Live(world, options.live) as live:
            return Runner(session, live, stack).execute()


class Runner:
    """The phases of a session on one process."""

    def __init__(self, session: Session, live: Live, stack: ExitStack) -> None:
        self.session, self.live, self._stack = session, live, stack
        self.world: World = session.world
        self.run_dir = Path(session.settings.results_dir, session.results_id)
        self.phases: list[Phase] = []
        self.header: Record | None = None
        self.host_cores: list[int] = []
        self._engines: dict[str, Engine] = {}
        self._progress: Progress | None = None
        self._recorded = False
        self._journal: journal.Journal | None = None
        self._read: set[int] = set()

    def execute(self) -> int:
        """All phases, then the record, then the tidying up."""
        try:
            self.session.begin()
            opened = self._open_journal()
            for number, (op, checkpoint) in enumerate(self._phases()):
                self._phase(opened, number, op, checkpoint)
                if op == "write":
                    self._note_complete(checkpoint)
            while self._engines:
                self._engines.popitem()[1].close()
            self._finish(opened)
            self._tidy()
        except BaseException as error:
            self._last_words(error)
            raise
        return self._verdict()

    def _phases(self) -> Iterator[tuple[Op, int]]:
        for checkpoint in range(1, (self.session.options.writes or 0) + 1):
            yield "write", checkpoint
        for index in range(self.session.options.reads or 0):
            present = self.session.manifest.complete
            yield "read", present[index % len(present)]

    # -- before --

    def _open_journal(self) -> journal.Journal:
        session, world = self.session, self.world
        if world.rank == 0:
            for left in journal.find_unfinished(session.settings.results_dir):
                self._recover(left)
        reports = self._describe_hosts()
        if reports is not None:
            self.host_cores = [report.cores for report in reports]
            self.header = describe.header(session, reports, time.time_ns())
            self._announce(reports)

        def begin() -> journal.Journal:
            self._journal = opened = journal.Journal(self.run_dir, world.rank, self.header, self.host_cores)
            self._stack.callback(opened.close)
            return opened

        return session.agreed(begin)

    def _recover(self, left: Path) -> None:
        """Make the record of a former run that was killed."""
        try:
            recovered = journal.recover(left)
            journal.seal(left, recovered)
        except (MlstorError, OSError) as error:  # no reason not to run this one
            self.live.say(f"warning: run {left.name} ended without a record, and none could be made: {error}")
            return
        self.live.say(
            f"note: run {left.name} had ended without a record; one was made of its journals, marked {recovered.status}"
        )

    def _describe_hosts(self) -> list[describe.HostReport] | None:
        """One report per host, at process 0."""
        mine = describe.ProcessReport(
            affinity=self.session.host.affinity,
            warning=binding_warning(self.session.host, detect()),
            host=describe.host_report(self.session),
        )
        gathered = self.world.gather(msgspec.msgpack.encode(mine))
        if gathered is None:
            return None
        processes = [msgspec.msgpack.decode(text, type=describe.ProcessReport) for text in gathered]
        self._warn_of_binding([one.warning for one in processes if one.warning is not None])
        return describe.host_reports(processes, self.world.host_of_rank)

    def _warn_of_binding(self, warnings: Sequence[str]) -> None:
        if warnings:
            of = f" ({len(warnings)} of {self.world.size} processes are bound)" if self.world.size > 1 else ""
            self.live.say(f"warning: {warnings[0]}{of}")

    def _announce(self, reports: Sequence[describe.HostReport]) -> None:
        session = self.session
        if self.world.size > len(session.ranks):
            self.live.say(f"note: {self.world.size} processes for {len(session.ranks)} ranks: some have nothing to do")
        results = Path(session.settings.results_dir).absolute()
        if any(_same_device(results, target.path) for report in reports for target in report.targets):
            self.live.say(f"note: the results go to {results}, on the file system that is being measured")
        self.live.say(f"run {session.run_id}: {session.meaning}")
        self.live.say(describe.memory_rule(session, list(reports))[1])

    # -- a phase --

    def _engine(self, op: Op) -> Engine:
        """The engine for a phase; one for both kinds where the profile wants the same."""
        session = self.session
        wanted = session.profile.engine_settings(session.settings, op, len(session.my_ranks), session.largest_nbytes)
        for other, engine in list(self._engines.items()):
            if engine.settings == wanted:
                return engine
            engine.close()
            del self._engines[other]
        self._engines[op] = _io.Engine(wanted)
        return self._engines[op]

    def _chains(self, op: Op, checkpoint: int) -> list[Chain]:
        session, chains = self.session, []
        for rank in session.my_ranks:
            owner = rank if op == "write" else session.source_rank(rank)
            files = session.files(owner, checkpoint)
            jobs = []
            for file, path in files:
                compared = op == "write" or session.verify
                pattern = honesty.pattern(session.manifest, checkpoint, file.file_id) if compared else None
                jobs.append(Job(path, file.nbytes, pattern))
            make = session.profile.writes if op == "write" else session.profile.reads
            chains.append(Chain(rank, len(files), make(jobs, session.how(owner))))
        return chains

    def _phase(self, opened: journal.Journal, number: int, op: Op, checkpoint: int) -> None:
        """One phase, from its pause to its figures at process 0."""
        session, world = self.session, self.world
        if session.pause_s:
            time.sleep(session.pause_s)
        engine = session.agreed(lambda: self._engine(op))
        chains = self._chains(op, checkpoint)
        evicted = honesty.evict(session, checkpoint) if op == "read" and session.options.evict else None
        report = PhaseReport(
            number=number,
            op=op,
            checkpoint=checkpoint,
            process=world.rank,
            host=world.host_index,
            barrier_unix_ns=0,
            ranks=[],
        )
        total = sum(session.layout.rank_nbytes(rank) for rank in session.ranks)
        self._begun(opened, report)
        world.barrier(f"{op} {checkpoint}")
        self.live.begin(f"{op} {checkpoint}", total)
        run_phase(
            engine,
            chains,
            report,
            world.local_rank == 0,
            lambda: self._make_directories(op, checkpoint),
            lambda elapsed_ns, nbytes: self._tick(opened, report, elapsed_ns, nbytes),
        )
        report.cached = honesty.WRITTEN
        if op == "read":
            report.cached = honesty.cached(session, report.paths, evicted, checkpoint not in self._read)
            self._read.add(checkpoint)
            report.verification = honesty.verification(session, chains, checkpoint)
        opened.finished(report)
        self._progress = None
        gathered = world.gather(report.encode())
        if gathered is None:
            return
        phase = merge_phase(
            [PhaseReport.decode(text) for text in gathered], host_cores=self.host_cores, processes=world.size
        )
        self.phases.append(phase)
        self.live.end(_sentence(phase))

    def _make_directories(self, op: Op, checkpoint: int) -> None:
        if op != "write":
            return
        session = self.session
        durable = bool(session.profile.steps & Step.FSYNC_DIR)
        for target in sorted({session.target_of(rank) for rank in session.my_ranks}):
            rundir.make_checkpoint_dir(target, session.run_id, session.layout.shape.name, checkpoint, durable)

    def _begun(self, opened: journal.Journal, report: PhaseReport) -> None:
        """Journal that this process is about to enter a phase, so that a killed run's record has it."""
        self._progress = _progress(report, 0, 0)
        self._progress.barrier_unix_ns = time.time_ns()
        opened.progress(self._progress, now=True)

    def _tick(self, opened: journal.Journal, report: PhaseReport, elapsed_ns: int, nbytes: int) -> None:
        self.live.update(elapsed_ns, nbytes)
        self._progress = _progress(report, elapsed_ns, nbytes)
        opened.progress(self._progress)

    # -- after --

    def _note_complete(self, checkpoint: int) -> None:
        """All ranks' files of a checkpoint are durable (the phase's gather has shown that): say so in the manifest."""
        session = self.session
        session.manifest = replace(session.manifest, complete=(*session.manifest.complete, checkpoint))
        for target in session.claims:
            rundir.save(target, session.manifest)

    def _finish(self, opened: journal.Journal) -> None:
        """The record, at process 0; then nobody needs the journals."""
        from mlstor.results.table import print_record

        header = self.header
        if header is not None:
            header.status = "complete"
            header.phases = self.phases
            header.end_unix_ns = time.time_ns()
            path = journal.seal(self.run_dir, header)
            self.live.say("")
            print_record(header, self.live.console)
            self.live.say(f"record: {path}")
        self.world.barrier("record")
        opened.discard()
        self._recorded = True

    def _tidy(self) -> None:
        """Remove the run's own checkpoints but those that are to be kept; nobody reads any more."""
        session = self.session
        writes, keep = session.options.writes or 0, session.options.keep_count
        if not writes:
            return
        kept = range(1 if keep is None else max(1, writes - keep + 1), writes + 1)
        foreign: list[str] = []
        for target in session.claims if keep is not None else []:
            if not kept:
                foreign += rundir.remove(session.manifest, target)[1]
                continue
            for checkpoint in set(range(1, session.manifest.written + 1)).difference(kept):
                foreign += rundir.remove_checkpoint(session.manifest, target, checkpoint)[1]
            rundir.save(target, replace(session.manifest, complete=tuple(kept)))
        for path in foreign:
            self.live.say(f"{path} stays: the run did not write it", any_process=True)
        if kept:
            self.live.say(
                f"kept: {plural(len(kept), 'checkpoint')} of run {session.run_id}; {self._clean} removes what is kept"
            )

    @property
    def _clean(self) -> str:
        return f"`{shlex.join(['mlstor', 'clean', self.session.run_id, *self.session.options.paths])}`"

    def _verdict(self) -> int:
        """The exit code: 3 on every process if damage was found, and then a sentence on standard error."""
        damaged = sum(phase.verification.damaged_blocks for phase in self.phases)
        if damaged:
            first = next(one for phase in self.phases for one in phase.verification.damage)
            sys.stderr.write(
                f"mlstor: {plural(damaged, 'damaged block')} of 4 KiB: {first.file}: {damage_text(first)}"
                f"{'; the record lists further ones' if damaged > 1 else ''}\n"
            )
        return 3 if int(self.world.bcast(str(damaged).encode())) else 0

    def _last_words(self, error: BaseException) -> None:
        """The run ends here: journal what this process has, and where it can be done make a record of all journals."""
        for engine in self._engines.values():
            engine.cancel()
        left = f"; {self._clean} removes its files" if self.session.claimed else ""
        if self._recorded:
            self.live.say(f"stopped while tidying up{left}")
            return
        if self._journal is None:
            if left:
                alone = not isinstance(error, KeyboardInterrupt | MlstorError)
                self.live.say(f"stopped before the first phase, without a record{left}", any_process=alone)
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        if self._progress is not None:
            self._journal.progress(self._progress, now=True)
        if not interrupted:
            self._journal.failed(self._error(error))
        elif self.world.rank != 0:
            return
        elif self.world.size > 1:
            time.sleep(_LAST_WORDS_S)
        sealed = journal.seal_early(self.run_dir)
        if sealed is not None:
            path, record = sealed
            self.live.say(f"record, {record.status}: {path}{left}", any_process=True)

    def _error(self, error: BaseException) -> RunError:
        return RunError(
            rank=self.world.rank,
            host=self.world.hostname,
            message=str(error) or type(error).__name__,
            file=getattr(error, "filename", None),
            offset=getattr(error, "offset", None),
        )


def _progress(report: PhaseReport, elapsed_ns: int, nbytes: int) -> Progress:
    return Progress(
        number=report.number,
        op=report.op,
        checkpoint=report.checkpoint,
        process=report.process,
        host=report.host,
        barrier_unix_ns=report.barrier_unix_ns,
        elapsed_ns=elapsed_ns,
        nbytes=nbytes,
    )


def _same_device(results: Path, target: str) -> bool:
    existing = next((path for path in (results, *results.parents) if path.exists()), None)
    return existing is not None and existing.stat().st_dev == Path(target).stat().st_dev


def _sentence(phase: Phase) -> str:
    duration_ns = max(phase.ranks.end_ns, default=0)
    rate = figures.rate(phase.nbytes, duration_ns) or 0
    damage = phase.verification.damaged_blocks
    found = f"; {plural(damage, 'block')} of 4 KiB DAMAGED" if damage else ""
    done = f"{phase.nbytes / 1e9:.2f} GB in {duration_ns / 1e9:.2f} s, {rate:.2f} GB/s"
    return f"{phase.op} {phase.checkpoint}: {done}{found}"
