"""A run: its phases in order, what each process reports of them, the record that comes of it."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from mlstor import host_report
from mlstor.checkpoint import describe, honesty
from mlstor.checkpoint.live import CheckpointLive
from mlstor.checkpoint.options import Options
from mlstor.checkpoint.phase import Chain, run_phase
from mlstor.checkpoint.session import Session
from mlstor.checkpoint.site import Op
from mlstor.host_report import HostReport
from mlstor.live import Live
from mlstor.results import figures
from mlstor.results.merge import merge_phase
from mlstor.results.notes import damage_text, plural
from mlstor.results.phase import Phase, PhaseReport, Progress
from mlstor.results.record import Record
from mlstor.runlog import RunLog
from mlstor.signals import Interrupts
from mlstor.storage.store import scheme_of
from mlstor.world import World, connect


def run(options: Options, command: list[str]) -> int:
    """Carry out a checkpoint run; every process of the world calls this.

    Returns
    -------
    int
        0, or 3 if data that was read is not what was written.
    """
    with Interrupts(), connect(options.expect_nodes, options.expect_ranks) as world:
        session = Session(world, options, command)
        with ExitStack() as stack, CheckpointLive(world, options.live) as live:
            return Runner(session, live, stack).execute()


class Runner:
    """The phases of a session on one process."""

    def __init__(self, session: Session, live: Live, stack: ExitStack) -> None:
        self.session, self.live = session, live
        self.world: World = session.world
        self.log: RunLog[Record] = RunLog(session.world, live, session.settings.results_dir, session.results_id, stack)
        self.phases: list[Phase] = []
        self._read: set[int] = set()

    def execute(self) -> int:
        """All phases, then the record, then the tidying up."""
        try:
            self.session.begin()
            self._open_journal()
            for number, (op, checkpoint) in enumerate(self._phases()):
                self._phase(number, op, checkpoint)
                if op == "write":
                    self._note_complete(checkpoint)
            self.session.site.end_phases()
            if (header := self.log.header) is not None:  # how stores are reached may have changed
                header.stores = self.session.site.stores([target.path for target in header.targets])
            self.log.seal(self.phases, self._show)
            self._tidy()
        except BaseException as error:
            self._last_words(error)
            raise
        self.session.site.close()
        return self._verdict()

    def _phases(self) -> Iterator[tuple[Op, int]]:
        for checkpoint in range(1, (self.session.options.writes or 0) + 1):
            yield "write", checkpoint
        for index in range(self.session.options.reads or 0):
            present = self.session.manifest.complete
            yield "read", present[index % len(present)]

    # -- before --

    def _open_journal(self) -> None:
        session, world = self.session, self.world
        self.log.recover_others()
        found = host_report.gather(world, session.host, describe.host_report(session))
        if found is None:
            self.log.open(None, [])
            return
        reports, warnings = found
        for warning in warnings:
            self.live.say(warning)
        header = describe.header(session, reports, time.time_ns())
        self._announce(reports)
        self.log.open(header, [report.cores for report in reports])

    def _announce(self, reports: Sequence[HostReport]) -> None:
        session = self.session
        if self.world.size > len(session.ranks):
            self.live.say(f"note: {self.world.size} processes for {len(session.ranks)} ranks: some have nothing to do")
        results = Path(session.settings.results_dir).absolute()
        if any(_same_device(results, target.path) for report in reports for target in report.targets):
            self.live.say(f"note: the results go to {results}, on the file system that is being measured")
        self.live.say(f"run {session.run_id}: {session.meaning}")
        self.live.say(describe.memory_rule(session, list(reports))[1])

    # -- a phase --

    def _chains(self, op: Op, checkpoint: int) -> list[Chain]:
        session, chains = self.session, []
        for rank in session.my_ranks:
            owner = rank if op == "write" else session.source_rank(rank)
            chains.append(session.site.chain(session, op, rank, checkpoint, session.files(owner, checkpoint)))
        return chains

    def _phase(self, number: int, op: Op, checkpoint: int) -> None:
        """One phase, from its pause to its figures at process 0."""
        session, world = self.session, self.world
        if session.pause_s:
            time.sleep(session.pause_s)
        carrier = session.agreed(lambda: session.site.carrier(session, op, checkpoint))
        chains = self._chains(op, checkpoint)
        if op == "read":
            session.site.before_read(session, checkpoint)
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
        self._begun(report)
        world.barrier(f"{op} {checkpoint}")
        self.live.begin(f"{op} {checkpoint}", total)
        run_phase(
            carrier,
            chains,
            report,
            world.local_rank == 0,
            lambda: session.site.make_directories(session, checkpoint) if op == "write" else None,
            lambda elapsed_ns, nbytes: self._tick(report, elapsed_ns, nbytes),
        )
        report.cached = session.site.cached(session, report, checkpoint not in self._read)
        if op == "read":
            self._read.add(checkpoint)
            report.verification = honesty.verification(session, chains, checkpoint)
            while session.notes:
                self.live.say(f"note: {session.notes.pop(0)}", any_process=True)
        self.log.finished(report)
        gathered = world.gather(report.encode())
        if gathered is None:
            return
        phase = merge_phase(
            [PhaseReport.decode(text) for text in gathered], host_cores=self.log.host_cores, processes=world.size
        )
        self.phases.append(phase)
        self.live.end(_sentence(phase))

    def _begun(self, report: PhaseReport) -> None:
        """Journal that this process is about to enter a phase, so that a killed run's record has it."""
        progress = _progress(report, 0, 0)
        progress.barrier_unix_ns = time.time_ns()
        self.log.reached(progress, now=True)

    def _tick(self, report: PhaseReport, elapsed_ns: int, nbytes: int) -> None:
        self.live.update(elapsed_ns, nbytes)
        self.log.reached(_progress(report, elapsed_ns, nbytes))

    # -- after --

    def _note_complete(self, checkpoint: int) -> None:
        """All ranks' files of a checkpoint are durable (the phase's gather has shown that): say so in the manifest."""
        session = self.session
        session.manifest = replace(session.manifest, complete=(*session.manifest.complete, checkpoint))
        for target in session.claims:
            session.site.save(target, session.manifest)

    def _show(self, record: Record) -> None:
        from mlstor.results.table import print_record

        print_record(record, self.live.console)

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
                foreign += session.site.remove(session.manifest, target)[1]
                continue
            for checkpoint in set(range(1, session.manifest.written + 1)).difference(kept):
                foreign += session.site.remove_checkpoint(session.manifest, target, checkpoint)[1]
            session.site.save(target, replace(session.manifest, complete=tuple(kept)))
        for path in foreign:
            self.live.say(f"{path} stays: the run did not write it", any_process=True)
        if kept:
            self.live.say(
                f"kept: {plural(len(kept), 'checkpoint')} of run {session.run_id}; {self._clean} removes what is kept"
            )

    @property
    def _clean(self) -> str:
        options = self.session.options
        words = ["mlstor", "clean", self.session.run_id, *options.paths]
        for name, value in options.store_options.items():
            words += ["--endpoint", value] if name == "endpoint" else ["-o", f"{name}={_word(value)}"]
        return f"`{shlex.join(words)}`"

    def _verdict(self) -> int:
        """The exit code: 3 on every process if damage was found, and then a sentence on standard error."""
        damaged = sum(phase.verification.damaged_blocks for phase in self.phases)
        if damaged:
            first = next((one for phase in self.phases for one in phase.verification.damage), None)
            where = "a note above says of which object" if first is None else f"{first.file}: {damage_text(first)}"
            more = "; the record lists further ones" if damaged > 1 and first is not None else ""
            sys.stderr.write(f"mlstor: {plural(damaged, 'damaged block')} of 4 KiB: {where}{more}\n")
        return 3 if int(self.world.bcast(str(damaged).encode())) else 0

    def _last_words(self, error: BaseException) -> None:
        """The run ends here: journal what this process has, and where it can be done make a record of all journals."""
        self.session.site.cancel()
        left = f"; {self._clean} removes its files" if self.session.claimed else ""
        self.log.last_words(error, left)
        try:
            self.session.site.close()
        except OSError as also:  # what ends the run is the other error
            self.live.say(f"note: {also.strerror or also}", any_process=True)


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


def _word(value: object) -> str:
    """A store's option as the command line takes it."""
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _same_device(results: Path, target: str) -> bool:
    if scheme_of(target) != "file":
        return False
    existing = next((path for path in (results, *results.parents) if path.exists()), None)
    return existing is not None and existing.stat().st_dev == Path(target).stat().st_dev


def _sentence(phase: Phase) -> str:
    duration_ns = max(phase.ranks.end_ns, default=0)
    rate = figures.rate(phase.nbytes, duration_ns) or 0
    damage = phase.verification.damaged_blocks
    found = f"; {plural(damage, 'block')} of 4 KiB DAMAGED" if damage else ""
    done = f"{phase.nbytes / 1e9:.2f} GB in {duration_ns / 1e9:.2f} s, {rate:.2f} GB/s"
    return f"{phase.op} {phase.checkpoint}: {done}{found}"
