"""A stream as aisloader's options ask for it: its bucket, its names, its operations, its figures, its clean-up."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mlstor.aisloader.batches import BatchedReads, BatchTransfers
from mlstor.aisloader.compose import Extras, LoaderComposer, PutLimits
from mlstor.aisloader.report import Report
from mlstor.aisloader.session import LoaderSession
from mlstor.results.figures import covered_ns
from mlstor.signals import Interrupts
from mlstor.storage.transfers import Digest
from mlstor.stream.draws import Purpose, generator
from mlstor.stream.live import StreamLive
from mlstor.stream.mix import Mix
from mlstor.stream.run import Runner
from mlstor.stream.workload import Planned, Workload
from mlstor.world import connect

if TYPE_CHECKING:
    from mlstor.aisloader.translate import Plan
    from mlstor.host_report import HostReport
    from mlstor.results.record import StreamRecord
    from mlstor.results.stream import StreamReport
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.compose import Composer, Limits
    from mlstor.stream.reads import Reads
    from mlstor.stream.tally import Tally
    from mlstor.stream.token_loop import TokenLoop

_RANGE_BYTES = 8 << 20
_REMOVED_AT_ONCE = 1000


def run(plan: Plan, command: list[str]) -> int:
    """Carry out a plan; every process of the world calls this.

    Returns
    -------
    int
        0; 1 if operations failed; 3 if what was read has not the checksum that the store has.
    """
    options = plan.options
    with Interrupts(), connect(options.expect_nodes, options.expect_ranks) as world, ExitStack() as stack:
        live = stack.enter_context(_Messages(world, shown=False))
        options.seed = int(world.bcast(str(options.seed).encode()).decode())
        session = LoaderSession(world, plan, command)
        stack.callback(session.close)
        runner = LoaderRunner(session, live, stack)
        if not plan["quiet"]:
            live.say(f"as mlstor stream: {' '.join(plan.words)}")
            for note in plan.notes:
                live.say(f"note: {note}")
        return runner.execute()


class _Messages(StreamLive):
    """Sentences on standard error: standard output has the table or the JSON."""

    def say(self, sentence: str, *, any_process: bool = False) -> None:
        if any_process or self._world.rank == 0:
            print(sentence, file=sys.stderr, flush=True)


class LoaderWorkload(Workload):
    """What goes on from phase to phase."""

    session: LoaderSession

    def reads(self, planned: Planned) -> Reads | None:
        """See `Workload.reads`; with -get-batchsize a read is a batch."""
        reads, size = super().reads(planned), self.session.plan["get-batchsize"]
        return cast("Reads", BatchedReads(reads, size)) if reads is not None and size else reads

    def composer(self, planned: Planned, transfers: Transfers, reads: Reads | None, limits: Limits) -> Composer:
        """See `Workload.composer`."""
        session = self.session
        made = LoaderComposer(
            transfers,
            session.in_flight * session.workers,
            Mix(planned.percent, self._draws),
            limits,
            reads=reads,
            writes=self.writes,
            verified=self._verified(),
            write_pattern=self._write_pattern(),
        )
        made.prepare(self._extras())
        return made

    def _extras(self) -> Extras:
        session, plan = self.session, self.session.plan
        seed, rank = session.options.seed, session.world.rank
        purposes = {"update": Purpose.UPDATE, "parts": Purpose.PARTS, "parallel": Purpose.PARALLEL}
        digest = plan.digest if plan.digest is not None else session.digest
        return Extras(
            run_key=session.run_key,
            limits=PutLimits(
                session.dealt(plan["maxputs"]) if plan["maxputs"] else None,
                session.dealt(plan["totalputsize"]) if plan["totalputsize"] else None,
            ),
            names=session.names() if session.writes else None,
            draws={name: generator(seed, rank, purpose) for name, purpose in purposes.items()},
            update_percent=plan["pctupdate"],
            parts=plan["multipart-chunks"],
            parts_percent=plan["pctmultipart"],
            parallel_percent=plan["pctmpdstream"],
            range_bytes=plan["mpdstream-chunk-size"] or _RANGE_BYTES,
            batched=plan["get-batchsize"] > 0,
            archives=plan.archives,
            latest=plan["latest"],
            shards=plan.shards,
            put_digest=digest if session.options.checksum else Digest.NONE,
            capacity=plan["numworkers"] if plan.one_by_one else None,
        )

    def start(self, composer: Composer | TokenLoop, planned: Planned, start_ns: int) -> int | None:
        """See `Workload.start`."""
        ends_ns = super().start(composer, planned, start_ns)
        assert isinstance(composer, LoaderComposer)
        composer.stops_ns = ends_ns
        return ends_ns


class LoaderRunner(Runner):
    """The run, with aisloader's figures."""

    session: LoaderSession

    def __init__(self, session: LoaderSession, live: StreamLive, stack: ExitStack) -> None:
        super().__init__(session, live, stack)
        plan = session.plan
        # of several processes only the whole run is known here
        every_s = plan["statsinterval"] if session.world.size == 1 else 0
        self._report: Report | None = None
        if session.world.rank == 0:
            self._report = Report(plan["stats-output"], plan["json"], every_s)
            stack.callback(self._report.close)
        self._put: int | None = None

    def execute(self) -> int:
        """See `Runner.execute`; an interrupted run removes what it has written, too, where that was asked for."""
        try:
            return super().execute()
        except KeyboardInterrupt:
            if self.session.options.cleanup and self.session.world.size == 1:
                self._tidy()
            raise

    def _workload(self) -> Workload:
        self._made = LoaderWorkload(self.session)
        return self._made

    def _transfers(self) -> Transfers:
        session, plan = self.session, self.session.plan
        transfers = session.store.transfers(workers=session.workers, in_flight=session.in_flight * plan.parts)
        if not plan["get-batchsize"]:
            return transfers
        store: Any = session.store
        reader = store.batches(workers=1, in_flight=plan["numworkers"])
        return BatchTransfers(transfers, reader, plan["numworkers"], plan["cont-on-err"])

    def _header(self, workload: Workload, reports: list[HostReport]) -> StreamRecord:
        header, plan = super()._header(workload, reports), self.session.plan
        if self._report is not None:
            self._say_plan()
            self._report.begin()
        asked = header.workload
        asked.mix_ppm = mix_ppm(plan)  # type: ignore[union-attr]  # a stream's
        asked.update_ppm = plan["pctupdate"] * 10_000  # type: ignore[union-attr]
        asked.batch_count = plan["get-batchsize"] or None  # type: ignore[union-attr]
        return header

    def _say_plan(self) -> None:
        session = self.session
        if session.objects is not None:
            word = "archived file" if session.plan.archives else "existing object"
            self.live.say(f"Found {len(session.objects):,} {word}{'s' if len(session.objects) != 1 else ''}")
        if not session.plan["quiet"]:
            self.live.say(f"Runtime configuration:\n{json.dumps(essentials(session.plan), indent=3)}")

    def _ticked(self, tally: Tally, elapsed_ns: int) -> None:
        if self._report is not None:
            self._report.tick(tally, elapsed_ns)

    def _stopped(self, report: StreamReport, elapsed_ns: int) -> None:
        if self._report is not None:
            self._report.whole(report.ops, report.barrier_unix_ns, elapsed_ns)

    def _show(self, record: StreamRecord) -> None:
        if self._report is not None:
            phase = self.phases[-1]
            self._report.whole(phase.ops, phase.barrier_unix_ns, covered_ns(phase))

    def _note_written(self, workload: Workload, ended: bool) -> None:
        pass  # nothing is put beside the objects

    def _tidy(self) -> None:
        session, writes = self.session, self._made.writes
        if session.made_bucket:
            session.world.barrier("cleanup")
            if session.world.rank == 0:
                session.client_.destroy()
            self.live.say(f"removed: bucket {session.plan.bucket}, which this run had made")
            return
        count = 0
        if writes is not None:
            for first in range(0, writes.begun, _REMOVED_AT_ONCE):
                own = np.arange(first, min(writes.begun, first + _REMOVED_AT_ONCE), dtype=np.uint64)
                numbers = np.uint64(writes.rank) + own * np.uint64(writes.size)
                names = session.names()
                session.store.delete([names.name(number) for number in numbers.tolist()])
                count += len(numbers)
        counts = session.world.allgather(str(count).encode())
        self.live.say(f"removed: {sum(map(int, counts)):,} objects that this run had written")

    def _remedy(self) -> str:
        return ""

    def _say_kept(self) -> None:
        pass


def mix_ppm(plan: Plan) -> dict[str, int]:
    """Parts of a million by operation, as the record has them."""
    puts, rest = plan["pctput"] * 10_000, (100 - plan["pctput"]) * 10_000
    parts = puts * plan["pctmultipart"] // 100 if plan["multipart-chunks"] else 0
    shards = puts * plan["arch.pct"] // 100
    parallel = rest * plan["pctmpdstream"] // 100
    get = "batch" if plan["get-batchsize"] else "get-range" if plan["readlen"] else "get"
    get = "get-archived" if plan.archives and not plan["get-batchsize"] else get
    shares = {
        "put": puts - parts - shards,
        "put-parts": parts,
        "put-shard": shards,
        "get-parallel": parallel,
        get: rest - parallel,
    }
    return {name: share for name, share in shares.items() if share}


def essentials(plan: Plan) -> dict[str, Any]:
    """What aisloader prints of a run before it begins, under its names."""
    given = plan.given
    duration = f"{given['duration']:g}s" if given["duration"] else "-"
    found: dict[str, Any] = {
        "proxy": plan.options.store_options.get("endpoint", ""),
        "bucket": plan.options.urls[0],
        "duration": duration,
        "# workers": given["numworkers"],
        "stats interval": f"{given['statsinterval']}s",
        "% PUT": given["pctput"],
        "% Update Existing": given["pctupdate"],
        "% Multipart PUT": given["pctmultipart"],
        "GET(batch): batch size": given["get-batchsize"],
        "name-getter": "none" if given["pctput"] == 100 else plan.options.order,
        "cleanup": bool(given["cleanup"]),
    }
    if given["pctput"]:
        found["minimum object size (bytes)"] = given["minsize"]
        found["maximum object size (bytes)"] = given["maxsize"]
        found["PUT upper bound"] = str(given["totalputsize"])
    return {name: value for name, value in found.items() if value != 0 or name == "cleanup"}
