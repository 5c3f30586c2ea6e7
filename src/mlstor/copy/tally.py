"""What became of the objects of a copy, in the figures of the record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.results import stream
from mlstor.results.phase import MAX_DAMAGE, Damage
from mlstor.storage.transfers import COMPLETION_DTYPE, Failure, Kind, Op
from mlstor.stream.tally import FOLD, OpTally

if TYPE_CHECKING:
    from mlstor.stream.draws import U64


class CopyTally:
    """Counts of one process.

    Parameters
    ----------
    start_ns
        The barrier, CLOCK_MONOTONIC.
    rank
        Of this process.

    Attributes
    ----------
    count, nbytes : int
        Objects that have arrived and were verified, and their bytes.
    failed, damaged : int
        Objects that did not arrive, and those among them whose bytes were found to be others.
    in_a_row : int
        Failures since the last object that arrived.
    """

    def __init__(self, start_ns: int, rank: int) -> None:
        self._start_ns, self._rank = start_ns, rank
        self._ops = {"get": OpTally(), "put": OpTally()}
        self._rows: dict[str, list[Any]] = {"get": [], "put": []}
        self._waiting = 0
        self.failures: list[stream.FailedTransfer] = []
        self.damage: list[Damage] = []
        self.damaged_blocks = self.verified_nbytes = 0
        self.skipped_count = self.skipped_nbytes = 0
        self.count = self.nbytes = self.failed = self.damaged = self.in_a_row = 0
        self.first_ns = self.first_done_ns = self.last_ns = 0

    def begin(self, start_ns: int) -> None:
        """All times count from here on."""
        self._start_ns = start_ns

    def got(self, rows: Any) -> None:
        """Objects that were read from the source."""
        self._add("get", rows)
        if len(rows):
            first = max(0, int(rows["start_ns"].min()) - self._start_ns)
            self.first_ns = min(self.first_ns or first, first)

    def arrived(self, rows: Any, verified_nbytes: int, ended_ns: int) -> None:
        """Objects that were written, and found to be as they should.

        Parameters
        ----------
        rows
            Completions of the writes.
        verified_nbytes
            Of those whose checksum was compared.
        ended_ns
            When that was known, CLOCK_MONOTONIC.
        """
        self._add("put", rows)
        self.count += len(rows)
        self.nbytes += int(rows["result"].sum())
        self.verified_nbytes += verified_nbytes
        self.in_a_row = 0
        done = max(0, int(rows["end_ns"].min()) - self._start_ns)
        self.first_done_ns = min(self.first_done_ns or done, done)
        self.last_ns = max(self.last_ns, ended_ns - self._start_ns)

    def fail(self, op: str, row: Any, failure: Failure | None, url: str, damaged: bool = False) -> None:
        """An object did not arrive: what became of its `op`, in a completion, and what is said of it."""
        self._add(op, np.atleast_1d(row))
        if int(row["kind"]) == Kind.CANCELLED:
            return
        self.failed += 1
        self.damaged += damaged
        self.in_a_row += 1
        self.last_ns = max(self.last_ns, int(row["end_ns"]) - self._start_ns)
        self.note(row, failure, url, op)

    def note(self, row: Any, failure: Failure | None, url: str, op: str = "delete") -> None:
        """Describe what went wrong, without counting it."""
        if len(self.failures) < stream.MAX_FAILURES:
            self.failures.append(
                stream.failed_transfer(
                    rank=self._rank,
                    op=op,
                    url=failure.url if failure is not None and failure.url else url,
                    fault=stream.fault(int(row["kind"]), int(row["status"]), int(row["result"])),
                    attempts=max(1, int(row["attempts"])),
                    message=failure.message if failure is not None else "",
                )
            )

    def locate(self, key: str, blocks: Sequence[tuple[int, int, bool]]) -> None:
        """Where a copy differs: offset, bytes, and whether there are zeros, of each block of 4 KiB."""
        self.damaged_blocks += len(blocks)
        key = key.encode("utf-8", "backslashreplace").decode()  # as a record can keep it
        for offset, nbytes, zeroed in blocks[: MAX_DAMAGE - len(self.damage)]:
            kind = "zeroed" if zeroed else "corrupt"
            self.damage.append(Damage(rank=self._rank, file=key, offset=offset, nbytes=nbytes, kind=kind))  # type: ignore[arg-type]

    def skipped(self, sizes: U64) -> None:
        """Objects that were there already."""
        self.skipped_count += len(sizes)
        self.skipped_nbytes += int(sizes.sum())

    def _add(self, op: str, rows: Any) -> None:
        self._rows[op].append(rows.copy())
        self._waiting += len(rows)
        if self._waiting >= FOLD:
            self.fold()

    def fold(self) -> None:
        """Fold what was added since the last time into the figures."""
        for op, several in self._rows.items():
            if several:
                rows = np.concatenate(several)
                self._ops[op].add(rows, np.zeros(len(rows), np.uint64), [])
                several.clear()
        self._waiting = 0

    def figures(self, targets: dict[str, Sequence[str]]) -> dict[str, stream.OpFigures]:
        """Of both sides; `targets` as `OpTally.figures` takes them, by operation."""
        self.fold()
        return {op: tally.figures(targets[op]) for op, tally in self._ops.items()}


def completion(op: Op, parts: Any, nbytes: int, end_ns: int) -> Any:
    """The completion of a whole of the completions of its parts."""
    row = np.zeros((), COMPLETION_DTYPE)
    row["op"], row["attempts"], row["result"], row["object_nbytes"] = op, 1, nbytes, nbytes
    row["end_ns"] = row["first_byte_ns"] = row["start_ns"] = row["attempt_ns"] = end_ns
    ran = parts[parts["attempts"] > 0]
    if len(ran):
        worst = ran[np.argmax(ran["attempts"])]
        for name in ("attempts", "first_kind", "first_status"):
            row[name] = worst[name]
        row["start_ns"] = ran["start_ns"].min()
        row["attempt_ns"] = worst["attempt_ns"] if worst["attempts"] > 1 else row["start_ns"]
        row["first_byte_ns"] = worst["first_byte_ns"] if worst["attempts"] > 1 else ran["first_byte_ns"].min()
        row["redirect_ns"] = ran["redirect_ns"].max()
        row["endpoint"] = ran["endpoint"][0]
        row["flags"] = 1 if (ran["flags"] & 1).any() else 0
    return row


def completion_of(error: OSError, op: Op, parts: Any, end_ns: int) -> tuple[Any, Failure]:
    """The completion of a whole that ended by an error of one of the store's calls, and what is said of it."""
    import errno
    import os

    row = completion(op, parts, 0, end_ns)
    code = error.errno or errno.EIO
    row["status"] = status = int(getattr(error, "status", 0))
    row["kind"] = Kind.HTTP if status else Kind.SYSTEM
    row["result"] = -code
    text = getattr(error, "answer", "") or error.strerror or os.strerror(code)
    return row, Failure(0, Kind(int(row["kind"])), status, str(error.filename or ""), text)
