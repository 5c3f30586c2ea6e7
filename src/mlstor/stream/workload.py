"""The phases of a stream: what each does and when it ends, as this process takes part in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlstor import _io
from mlstor.errors import UsageError
from mlstor.storage.transfers import Digest
from mlstor.stream.compose import Composer, Limits, Pace, Verified
from mlstor.stream.draws import Purpose, generator, of_text
from mlstor.stream.mix import Kind, Mix
from mlstor.stream.order import Order
from mlstor.stream.reads import Ranges, Reads, make_ranges
from mlstor.stream.sources import Heads, Writes
from mlstor.stream.token_records import TokenRecords

if TYPE_CHECKING:
    from mlstor.results.stream import PhaseName
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.session import Session
    from mlstor.stream.token_loop import TokenLoop

# The first operation of an open loop is meant to begin so long after the barrier, ns: time to hand some over.
_LEAD_NS = 2_000_000


@dataclass(frozen=True)
class Planned:
    """A phase that is to come."""

    name: PhaseName
    percent: dict[Kind, float]
    epochs: int | None = None
    duration_s: float | None = None
    ops: int | None = None
    nbytes: int | None = None


def phases(session: Session) -> Iterator[Planned]:
    """The phases that the options ask for, in order."""
    options = session.options
    percent = {
        Kind.GET: options.get,
        Kind.PUT: options.put,
        Kind.HEAD: options.head,
        Kind.DELETE: options.delete,
    }
    if options.fill is not None:
        yield Planned("fill", {Kind.PUT: 100.0}, ops=options.fill)
    if options.warmup_epochs:
        yield Planned("warm-up", percent, epochs=options.warmup_epochs)
    elif options.warmup_s:
        yield Planned("warm-up", percent, duration_s=options.warmup_s)
    yield Planned("stream", percent, options.epochs, options.duration_s, options.ops, session.limit_nbytes)


class Workload:
    """What goes on from phase to phase: the epoch, the objects that were written.

    Attributes
    ----------
    ranges : Ranges or None
        What is read; None without reads.
    writes : Writes or None
        What this process writes; None without writes.
    first_epoch : int
        Of the next phase that reads.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        options, group = session.options, session.group
        self._draws = generator(options.seed, session.world.rank, Purpose.KIND)
        self.first_epoch = 0
        self.ranges: Ranges | None = None
        if options.get and session.objects is not None:
            objects = session.objects
            self.ranges = session.agreed(
                lambda: (
                    TokenRecords(objects, options.tokens.record_nbytes)
                    if options.tokens is not None
                    else make_ranges(
                        objects,
                        options.range,
                        options.read_offset or 0,
                        options.read_nbytes,
                        options.range_align,
                        options.seed,
                        session.world.rank,
                    )
                )
            )
        self.writes = None
        if session.written is not None:
            self.writes = Writes(session.written.objects(), group.rank, group.size)
        self._heads = self._other_order("head") if options.head else None
        self._deleted = self._other_order("delete") if options.delete > options.put else None

    def _other_order(self, what: str) -> Heads:
        """Objects for operations that are no reads, in an order that has nothing to do with that of the reads."""
        session, group = self.session, self.session.group
        assert session.objects is not None
        objects = session.objects
        order = Order(len(objects), of_text(f"{what} {session.options.seed}"))
        return Heads(objects, order, group.rank, group.size, once=what == "delete")

    def reads(self, planned: Planned) -> Reads | None:
        """The reads of a phase, if it has any; on every process alike."""
        if self.ranges is None or not planned.percent.get(Kind.GET):
            return None
        session, ranges = self.session, self.ranges
        options = session.options
        return session.agreed(
            lambda: Reads(
                ranges,
                seed=options.seed,
                kind=options.order,
                rank=session.group.rank,
                size=session.group.size,
                uneven=options.uneven,
                scope=options.epoch_scope,
                epochs=planned.epochs,
                first_epoch=self.first_epoch,
            )
        )

    def limits(self, planned: Planned, reads: Reads | None) -> Limits:
        """This process's part of a phase's limits; every process calls this.

        Raises
        ------
        UsageError
            On every process: if the bytes can't be reached.
        """
        return self.session.agreed(lambda: self._limits(planned, reads))

    def _limits(self, planned: Planned, reads: Reads | None) -> Limits:
        session = self.session
        only = [kind for kind, share in planned.percent.items() if share]
        ops, nbytes = planned.ops, planned.nbytes
        if only == [Kind.GET] and reads is not None and reads.share.scope == "world" and session.group.alone:
            # in the order of the world, so that the total and what is read don't depend on the number of ranks
            totals = [ops] if ops is not None else []
            totals += [reads.total_of(nbytes)] if nbytes is not None else []
            return Limits(ops=reads.count_of(min(totals)) if totals else None)
        if only == [Kind.PUT] and nbytes is not None:
            count = session.writes_for(nbytes)
            return Limits(ops=session.dealt(count if ops is None else min(ops, count)))
        if nbytes is not None and not {Kind.GET, Kind.PUT} & set(only):
            raise UsageError("--bytes never ends with --head and --delete alone, which move none: give --ops")
        return Limits(None if ops is None else session.dealt(ops), None if nbytes is None else session.dealt(nbytes))

    def composer(self, planned: Planned, transfers: Transfers, reads: Reads | None, limits: Limits) -> Composer:
        """What makes a phase's transfers. To be asked for before the barrier; `start` says when it was."""
        session, options = self.session, self.session.options
        return Composer(
            transfers,
            session.in_flight * session.workers,
            Mix(planned.percent, self._draws),
            limits,
            reads=reads,
            heads=self._heads,
            writes=self.writes,
            deleted=self._deleted,
            verified=self._verified(),
            write_pattern=self._write_pattern(),
            write_digest=session.digest if options.checksum and self.writes is not None else Digest.NONE,
        )

    def start(self, composer: Composer | TokenLoop, planned: Planned, start_ns: int) -> int | None:
        """The barrier was at `start_ns`: when it is to end (CLOCK_MONOTONIC), None without a duration."""
        ends_ns = None if planned.duration_s is None else start_ns + int(planned.duration_s * 1e9)
        rate, world = self.session.rate, self.session.world
        if rate is not None and planned.name != "fill":
            step_ns = 1e9 / rate
            composer.pace = Pace(start_ns + _LEAD_NS + world.rank * step_ns, world.size * step_ns)
            composer.ends_ns = ends_ns
        return ends_ns

    def ended(self, reads: Reads | None) -> None:
        """A phase is over: the next one begins with an epoch that no process has begun; every process calls this."""
        mine = 0 if reads is None else reads.next_epoch
        said = self.session.world.allgather(str(mine).encode())
        self.first_epoch = max(self.first_epoch, *map(int, said))

    def _verified(self) -> Verified:
        session = self.session
        if session.options.verify == "checksum":
            return Verified(None, session.digest)
        if session.options.verify == "pattern" and session.read_of is not None:
            found = session.read_of
            return Verified(_io.Pattern(found.run_key, 0, 0, found.compressibility), Digest.NONE)
        return Verified(None, Digest.NONE)

    def _write_pattern(self) -> _io.Pattern | None:
        written = self.session.written
        return None if written is None else _io.Pattern(written.run_key, 0, 0, written.compressibility)
