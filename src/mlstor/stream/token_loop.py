"""The loop of token reads over kept handles: as lean as a read of 4 KiB needs it, a few us for each in all.

`load.Load` does the same for any transfers and store; here everything that is not needed before the next read is done
for thousands of them at once.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlstor.meter import INTERVAL_NS
from mlstor.operations import DONE_DTYPE
from mlstor.results.phase import MAX_DAMAGE
from mlstor.results.stream import size_class
from mlstor.signals import held
from mlstor.storage.transfers import COMPLETION_DTYPE, Failure, Kind as Ended, Op
from mlstor.stream import buckets
from mlstor.stream.buckets import Durations
from mlstor.stream.load import MOST_FAILURES
from mlstor.stream.mix import Kind
from mlstor.stream.slots import Slots
from mlstor.stream.tally import FOLD, OpTally, Part, Tally

if TYPE_CHECKING:
    from mlstor.stream.compose import Limits, Pace
    from mlstor.stream.handles import Handles
    from mlstor.stream.reads import Reads

_BATCH = 128  # of completions, where reads wait for room
_ENDS_BEFORE = -10001  # of RangeSet.reap: the file ends before the range
_STOP_S = 0.2  # how long an interrupted run waits for what it called back
#: What is known of a read before it begins.
ASKED_DTYPE = [("epoch", "<u4"), ("index", "<u4"), ("offset", "<u8"), ("intended_ns", "<u8")]
_WHOLE = "V24"  # the same without its fields: numpy copies those one by one, ten times as slowly


class TokenTally(Tally):
    """A tally that takes reads as the loop notes them: all of one kind and size, a third as large as completions."""

    def add_reads(self, asked: Any, done: Any, damaged_blocks: npt.NDArray[np.uint32] | None) -> None:
        """Add reads that ended well.

        Parameters
        ----------
        asked, done
            Of each read: ASKED_DTYPE and DONE_DTYPE.
        damaged_blocks
            Of each, if they were compared with a pattern.
        """
        if not len(done):
            return
        op = self.ops.setdefault(Kind.GET_RANGE, OpTally())
        total_ns, ends_ns, results = (np.ascontiguousarray(done[name]) for name in ("latency_ns", "end_ns", "result"))
        starts_ns = ends_ns - total_ns
        found, times = buckets.of(total_ns), Durations()
        times.add(total_ns, found)
        nbytes = int(results.sum())
        size = size_class(int(results[0]))
        for part in (op.all, op.by_class.setdefault(size, Part()), op.by_target.setdefault(0, Part())):
            part.nbytes += nbytes
            part.total.merge(times)
        if asked["intended_ns"][0]:
            late_ns = ends_ns - asked["intended_ns"]
            op.times["from_intended"].add(late_ns, buckets.of(late_ns))
        epochs = np.ascontiguousarray(asked["epoch"])
        alike = bool((epochs == epochs[0]).all())
        for epoch in [int(epochs[0])] if alike else np.unique(epochs).tolist():
            mask = slice(None) if alike else epochs == epoch
            self._add_to_epoch(epoch, starts_ns[mask], ends_ns[mask], results[mask])
            word = self._temperature(epoch)
            if word != "unknown":
                part = op.by_temperature.setdefault(word, Part())
                part.nbytes += int(results[mask].sum())
                part.total.add(total_ns[mask], found[mask])
        self._span(starts_ns, ends_ns)
        self.count += len(done)
        self.nbytes += nbytes
        if damaged_blocks is not None:
            self.verified_nbytes += nbytes
            self.damaged_blocks += int(damaged_blocks.sum())
            where = np.flatnonzero(damaged_blocks)[: max(0, MAX_DAMAGE - len(self.damaged))]
            columns = asked["index"][where], asked["offset"][where], damaged_blocks[where]
            self.damaged += zip(*(column.tolist() for column in columns), strict=True)


class TokenLoop:
    """Reads records to the end of a phase.

    Parameters
    ----------
    handles : Handles
    reads : Reads
        Of `TokenRecords`.
    limits : Limits
        This rank's part.
    verify : bool
        Compare each record with its pattern.

    Attributes
    ----------
    slots : Slots
        For the `TokenTally`.
    pace : Pace or None
        An open loop; set before `run`.
    ends_ns : int or None
        In an open loop: reads that are meant to begin from here on are not made (CLOCK_MONOTONIC).
    """

    def __init__(self, handles: Handles, reads: Reads, limits: Limits, verify: bool = False) -> None:
        self.handles, self.reads, self.verify = handles, reads, verify
        self.slots = Slots(FOLD + handles.capacity)
        self.slots.kind[:] = Kind.GET_RANGE
        self.pace: Pace | None = None
        self.ends_ns: int | None = None
        self._left = _reads_in(limits, handles.record_nbytes)
        self._begun = 0
        #: outstanding reads at which more are handed over: half of those that are to wait in the engine
        self._refill_at = handles.in_flight + handles.ahead // 2
        self._block: Any = np.zeros(0, ASKED_DTYPE)
        self._under_way: Any = np.zeros(handles.capacity, ASKED_DTYPE)
        self._asked: Any = np.zeros(FOLD + handles.capacity, ASKED_DTYPE)
        self._done: Any = np.zeros(FOLD + handles.capacity, DONE_DTYPE)
        self._damaged_blocks: Any = np.zeros(FOLD + handles.capacity, np.uint32)
        self._filled = 0
        self._failed_in_a_row = 0
        self._finished = False

    def run(self, tally: TokenTally, ends_ns: int | None, tick: Callable[[], None]) -> None:
        """From the first read to the last.

        Parameters
        ----------
        ends_ns
            When no more are begun, CLOCK_MONOTONIC; None: when limits or epochs end it.
        tick
            Called every quarter of a second or more often.

        Raises
        ------
        KeyboardInterrupt
            When interrupted; what was done until then is counted.
        OSError
            If a file can't be opened, or nothing ends well any more.
        """
        with held() as check:
            try:
                self._loop(tally, ends_ns, tick, check)
            except (KeyboardInterrupt, OSError):
                self.handles.cancel()
                until_s = time.monotonic() + _STOP_S
                while self.handles.outstanding and time.monotonic() < until_s:
                    self._reap(self.handles.outstanding, 0.05, tally)
                self._fold(tally)
                tally.fold()
                raise
        self._fold(tally)
        tally.fold()

    def _loop(
        self, tally: TokenTally, ends_ns: int | None, tick: Callable[[], None], check: Callable[[], None]
    ) -> None:
        handles, stopped = self.handles, False
        now_ns = ticked_ns = time.monotonic_ns()
        while True:
            check()
            if not stopped and ends_ns is not None and now_ns >= ends_ns:
                if not self._finished and (missed := self._meant() - self._begun) > 0:
                    tally.not_begun(Kind.GET_RANGE, missed)
                stopped = self._finished = True
                handles.cancel()
            wait_ns = ticked_ns + INTERVAL_NS - now_ns
            if not self._finished:
                wait_ns = min(wait_ns, self._begin(now_ns))
            outstanding = handles.outstanding
            if self._finished and not outstanding:
                return
            if not stopped and ends_ns is not None:
                wait_ns = min(wait_ns, ends_ns - now_ns)
            if outstanding:
                self._reap(self._least(outstanding), max(wait_ns, 0) / 1e9, tally)
            else:
                time.sleep(max(wait_ns, 0) / 1e9)
            now_ns = time.monotonic_ns()
            if now_ns - ticked_ns >= INTERVAL_NS:
                ticked_ns = now_ns
                self._fold(tally)
                tally.fold()
                tick()

    def _least(self, outstanding: int) -> int:
        """Completions that are worth waking up for."""
        if self.pace is not None and not self.handles.room:
            return min(_BATCH, outstanding)
        if self.pace is not None or self._finished:
            return outstanding
        return max(1, outstanding - self._refill_at)

    def _begin(self, now_ns: int) -> int:
        """Begin what there is room for and is due; ns until the next is due."""
        count, due_ns = self.handles.room, INTERVAL_NS
        if self._left is not None:
            count = min(count, self._left - self._begun)
        pace = self.pace
        if pace is not None:
            due = int((now_ns - pace.first_ns) // pace.step_ns) + 1
            if self.ends_ns is not None:
                all_of_them = self._meant()
                self._finished = self._begun >= all_of_them
                due = min(due, all_of_them)
            count = max(0, min(count, due - self._begun))
        while count and not self._finished:
            if not len(self._block):
                self._block = self._look_ahead()
            part = self._block[:count]
            if not len(part):
                self._finished = True
                break
            if pace is not None:
                order = np.arange(self._begun, self._begun + len(part))
                part["intended_ns"] = (pace.first_ns + order * pace.step_ns).astype(np.uint64)
            taken = self.handles.read(part["index"], part["offset"])
            self._under_way.view(_WHOLE)[taken] = part.view(_WHOLE)
            self._block = self._block[len(part) :]
            self._begun += len(part)
            count -= len(part)
        if self._left is not None and self._begun >= self._left:
            self._finished = True
        if pace is not None and self.handles.room:
            due_ns = max(0, int(pace.first_ns + self._begun * pace.step_ns) - now_ns)
        return due_ns

    def _meant(self) -> int:
        """Reads that are meant to begin before the end of an open loop; 0 where there is none."""
        if self.pace is None or self.ends_ns is None:
            return 0
        meant = max(0, -int((self.pace.first_ns - self.ends_ns) // self.pace.step_ns))
        most = [meant] if self._left is None else [meant, self._left]
        if self.reads.left is not None:
            most.append(self._begun + len(self._block) + self.reads.left)
        return min(most)

    def _look_ahead(self) -> Any:
        most = FOLD if self._left is None else min(FOLD, self._left - self._begun)
        picked = self.reads.take(most)
        block = np.zeros(len(picked.offset), ASKED_DTYPE)
        block["epoch"], block["index"], block["offset"] = picked.epoch, picked.index, picked.offset
        return block

    def _reap(self, least: int, timeout_s: float, tally: TokenTally) -> None:
        first = self._filled
        count = self.handles.reap(self._done[first:], least, timeout_s)
        if not count:
            return
        done, asked = (rows[first : first + count] for rows in (self._done, self._asked))
        slots = done["tag"].astype(np.intp)
        np.take(self._under_way, slots, out=asked, mode="clip")  # which, unlike "raise", writes without a copy
        if self.verify:
            self._damaged_blocks[first : first + count] = [
                self.handles.damaged(*one) if result >= 0 else 0
                for result, *one in zip(
                    done["result"].tolist(),
                    slots.tolist(),
                    asked["index"].tolist(),
                    asked["offset"].tolist(),
                    strict=True,
                )
            ]
        self.handles.give_back(slots)
        self._filled += count
        if self._filled >= FOLD:
            self._fold(tally)

    def _fold(self, tally: TokenTally) -> None:
        """Give the tally what was done since the last time."""
        count, self._filled = self._filled, 0
        if not count:
            return
        done, asked = self._done[:count], self._asked[:count]
        damaged = self._damaged_blocks[:count] if self.verify else None
        bad = done["result"] < 0
        if not bad.any():
            tally.add_reads(asked, done, damaged)
            self._failed_in_a_row = 0
            return
        tally.add_reads(asked[~bad], done[~bad], None if damaged is None else damaged[~bad])
        self._add_failed(tally, asked[bad], done[bad])
        well = np.flatnonzero(~bad)
        behind = done[int(well[-1]) + 1 if len(well) else 0 :]
        failed = int((behind["result"] != -errno.ECANCELED).sum())
        self._failed_in_a_row = failed + (0 if len(well) else self._failed_in_a_row)
        if self._failed_in_a_row >= MOST_FAILURES and not self._finished:
            last = tally.failures[-1]
            raise OSError(
                errno.EIO,
                f"{self._failed_in_a_row} reads failed one after the other, the first ones with {last.fault} "
                f"({last.message})",
                last.url,
            )

    def _add_failed(self, tally: TokenTally, asked: Any, done: Any) -> None:
        count, slots = len(done), self.slots
        for name in ("epoch", "index", "intended_ns"):
            getattr(slots, name)[:count] = asked[name]
        rows: Any = np.zeros(count, COMPLETION_DTYPE)
        rows["tag"] = np.arange(count)
        rows["op"], rows["attempts"] = Op.READ, 1
        rows["result"], rows["end_ns"] = done["result"], done["end_ns"]
        rows["start_ns"] = done["end_ns"] - done["latency_ns"]
        rows["kind"] = Ended.SYSTEM
        for code, kind in ((-errno.ECANCELED, Ended.CANCELLED), (_ENDS_BEFORE, Ended.SHORT)):
            rows["kind"][done["result"] == code] = kind
        rows["first_kind"] = rows["kind"]
        tally.add(rows, lambda: self._failures(rows, asked))

    def _failures(self, rows: Any, asked: Any) -> list[Failure]:
        found = []
        for at in np.flatnonzero(rows["kind"] != Ended.CANCELLED)[:256].tolist():
            kind, offset = Ended(int(rows["kind"][at])), int(asked["offset"][at])
            if kind is Ended.SHORT:
                text = f"the file ends before {offset + self.handles.record_nbytes}"
            else:
                text = f"{os.strerror(-int(rows['result'][at]))} at offset {offset}"
            found.append(Failure(at, kind, 0, self.handles.paths[int(asked["index"][at])], text))
        return found


def _reads_in(limits: Limits, record_nbytes: int) -> int | None:
    """Reads that the limits leave; None: no limit."""
    if limits.nbytes is None:
        return limits.ops
    by_bytes = -(-limits.nbytes // record_nbytes)
    return by_bytes if limits.ops is None else min(limits.ops, by_bytes)
