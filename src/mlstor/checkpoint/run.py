"""A run: its phases in order, what each process reports of them, the record that comes of it."""

from __future__ import annotations

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
from mlstor.checkpoint.profiles import Job, make_directory
from mlstor.checkpoint.session import Session
from mlstor.host import binding_warning
from mlstor.launch import detect
from mlstor.operations import Step
from mlstor.results import figures, journal
from mlstor.results.merge import merge_phase
from mlstor.results.phase import Phase, PhaseReport, Progress
from mlstor.results.record import Record, RunError
from mlstor.signals import Interrupted, Interrupts
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
        self._journal = self._open_journal()

    def execute(self) -> int:
        """All phases, then the record, then the tidying up."""
        damaged = 0
        try:
            for number, (op, checkpoint) in enumerate(self._phases()):
                phase = self._phase(number, op, checkpoint)
                damaged += phase.verification.damaged_blocks if phase else 0
                if op == "write":
                    self._note_complete(checkpoint)
        except BaseException as error:
            self._last_words(error)
            raise
        for engine in self._engines.values():
            engine.close()
        self._tidy()
        if self.header is not None:
            self._finish(self.header)
        self.world.barrier("record")
        self._journal.discard()
        damaged = int(self.world.bcast(str(damaged).encode()))
        return 3 if damaged else 0

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
                journal.seal(left, journal.recover(left))
                self.live.say(f"run {left.name} had ended without a record: one was made of its journals, marked partial")
        reports = self._describe_hosts()
        if reports is not None:
            self.host_cores = [report.cores for report in reports]
            self.header = describe.header(session, session.settings, reports, time.time_ns())
            self._announce(reports)
        opened = session.agreed(lambda: journal.Journal(self.run_dir, world.rank, self.header, self.host_cores))
        self._stack.callback(opened.close)
        return opened

    def _describe_hosts(self) -> list[describe.HostReport] | None:
        """One report per host, at process 0."""
        session, world = self.session, self.world
        payload = b""
        if session.preflight is not None:
            rooms = {path: room for room in session.preflight.rooms for path in room.paths}
            payload = msgspec.msgpack.encode(
                describe.HostReport(
                    host=describe.host_record(session.host),
                    targets=[
                        describe.target_record(path, world.host_index, session, rooms[path].is_memory) for path in rooms
                    ],
                    checks=describe.checks(session.preflight, world.host_index),
                    cores=describe.usable_cores(session.host),
                    client_memory_bytes=session.host.client_memory_bytes,
                )
            )
        gathered = world.gather(payload)
        if gathered is None:
            return None
        return [msgspec.msgpack.decode(text, type=describe.HostReport) for text in gathered if text]

    def _announce(self, reports: Sequence[describe.HostReport]) -> None:
        session = self.session
        warning = binding_warning(session.host, detect())
        if warning:
            self.live.say(f"warning: {warning}")
        if self.world.size > len(session.ranks):
            self.live.say(f"note: {self.world.size} processes for {len(session.ranks)} ranks: some have nothing to do")
        results = Path(session.settings.results_dir).absolute()
        if any(_same_device(results, target.path) for report in reports for target in report.targets):
            self.live.say(f"note: the results go to {results}, on the file system that is being measured")
        self.live.say(f"run {session.run_id}: {session.layout.meaning}; {describe.memory_rule(session, list(reports))[1]}")

    # -- a phase --

    def _engine(self, op: Op) -> Engine:
        """The engine for a phase; one for both kinds where the profile wants the same."""
        session = self.session
        wanted = session.profile.engine_settings(
            session.settings, op, len(session.my_ranks), session.largest_nbytes
        )
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
            chains.append(Chain(rank, len(files), make(jobs, session.direct)))
        return chains

    def _phase(self, number: int, op: Op, checkpoint: int) -> Phase | None:
        """One phase; merged, at process 0."""
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
        world.barrier(f"{op} {checkpoint}")
        self.live.begin(f"{op} {checkpoint}", total)
        run_phase(
            engine,
            chains,
            report,
            world.local_rank == 0,
            lambda: self._make_directories(op, checkpoint),
            lambda elapsed_ns, nbytes: self._tick(report, elapsed_ns, nbytes),
        )
        report.cached = honesty.WRITTEN
        if op == "read":
            report.cached = honesty.cached(session, report.paths, evicted)
            report.verification = honesty.verification(session, chains, checkpoint)
        self._journal.finished(report)
        self._progress = None
        gathered = world.gather(report.encode())
        if gathered is None:
            return None
        phase = merge_phase(
            [PhaseReport.decode(text) for text in gathered], host_cores=self.host_cores, processes=world.size
        )
        self.phases.append(phase)
        self.live.end(_sentence(phase))
        return phase

    def _make_directories(self, op: Op, checkpoint: int) -> None:
        if op != "write":
            return
        durable = bool(self.session.profile.steps & Step.FSYNC_DIR)
        for directory in sorted({self.session.checkpoint_dir(rank, checkpoint) for rank in self.session.my_ranks}):
            make_directory(directory, durable)

    def _tick(self, report: PhaseReport, elapsed_ns: int, nbytes: int) -> None:
        self.live.update(elapsed_ns, nbytes)
        self._progress = Progress(
            number=report.number,
            op=report.op,
            checkpoint=report.checkpoint,
            process=report.process,
            host=report.host,
            barrier_unix_ns=report.barrier_unix_ns,
            elapsed_ns=elapsed_ns,
            nbytes=nbytes,
        )
        self._journal.progress(self._progress)

    # -- after --

    def _note_complete(self, checkpoint: int) -> None:
        """All ranks' files of a checkpoint are durable (the phase's gather has shown that): say so in the manifest."""
        session = self.session
        session.manifest = replace(session.manifest, complete=(*session.manifest.complete, checkpoint))
        for target in session.claims:
            rundir.save(target, session.manifest)

    def _tidy(self) -> None:
        """Remove the run's own checkpoints but those that are to be kept."""
        session = self.session
        keep = session.options.keep_count
        self.world.barrier("tidying up")  # nobody still reads
        if keep is None or not session.options.writes:
            return
        last = max(0, session.manifest.written - keep)
        for target in session.claims if last else []:
            _, foreign = rundir.remove(session.manifest, target, None if keep == 0 else last)
            for directory in foreign:
                self.live.say(f"{directory} stays: it holds something that this run did not write")

    def _finish(self, header: Record) -> None:
        from mlstor.results.table import print_record

        header.status = "complete"
        header.phases = self.phases
        header.end_unix_ns = time.time_ns()
        path = journal.seal(self.run_dir, header)
        self.live.say("")
        print_record(header, self.live.console)
        self.live.say(f"record: {path}")

    def _last_words(self, error: BaseException) -> None:
        """The run ends here: journal what this process has, and where it can be done make a record of all journals."""
        for engine in self._engines.values():
            engine.cancel()
        under_way = self._progress
        interrupted = isinstance(error, KeyboardInterrupt)
        if under_way is not None:
            self._journal.progress(under_way, now=True)
        if not interrupted:
            self._journal.failed(
                RunError(
                    rank=self.world.rank,
                    host=self.world.hostname,
                    message=str(error) or type(error).__name__,
                    file=getattr(error, "filename", None),
                    offset=getattr(error, "offset", None),
                )
            )
        if interrupted and self.world.rank != 0:
            return
        if interrupted and self.world.size > 1:
            time.sleep(_LAST_WORDS_S)
        self._journal.close()
        path = journal.seal(self.run_dir, journal.recover(self.run_dir))
        written = f"; `mlstor clean {self.session.run_id} PATH` removes its files" if self.session.options.writes else ""
        self._say_partial(path, written, isinstance(error, Interrupted))

    def _say_partial(self, path: Path, written: str, interrupted: bool) -> None:
        word = "partial" if interrupted else "partial or failed"
        print(f"record, {word}: {path}{written}", flush=True)


def _same_device(results: Path, target: str) -> bool:
    existing = next((path for path in (results, *results.parents) if path.exists()), None)
    return existing is not None and existing.stat().st_dev == Path(target).stat().st_dev


def _sentence(phase: Phase) -> str:
    duration_ns = max(phase.ranks.end_ns, default=0)
    rate = figures.rate(phase.nbytes, duration_ns) or 0
    damage = phase.verification.damaged_blocks
    found = f"; {damage} DAMAGED BLOCKS" if damage else ""
    return f"{phase.op} {phase.checkpoint}: {phase.nbytes / 1e9:.2f} GB in {duration_ns / 1e9:.2f} s, {rate:.2f} GB/s{found}"
