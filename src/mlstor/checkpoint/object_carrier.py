"""Objects of a phase, on the transfers of their stores."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from mlstor.results.phase import Requests
from mlstor.results.stream import fault
from mlstor.storage.transfers import (
    COMPLETION_DTYPE,
    IN_PARTS,
    TRANSFER_DTYPE,
    WHOLE,
    Digest,
    Kind,
    Memory,
    Op,
    TransferCounters,
)
from mlstor.stream import buckets
from mlstor.stream.buckets import Durations
from mlstor.stream.failures import failed

if TYPE_CHECKING:
    from mlstor._io import Pattern
    from mlstor.checkpoint.phase import Chain, Outcome
    from mlstor.checkpoint.profiles import ObjectHow
    from mlstor.results.phase import PhaseReport
    from mlstor.storage.transfers import Transfers

#: How long one of several stores is waited for before the others are looked at.
_LOOK_S = 0.002
_AT_ONCE = 256


class ObjectJob(NamedTuple):
    """An object of a logical rank: in which target, its key there, its URL, its size, and the stamp in its data."""

    target: str
    key: str
    path: str
    nbytes: int
    file_id: int


class Moved(NamedTuple):
    """What became of it; see `phase.Outcome`."""

    job: ObjectJob
    start_ns: int
    end_ns: int
    nbytes: int
    damaged_blocks: int

    @property
    def path(self) -> str:
        return self.job.path


class ObjectCarrier:
    """See `phase.Carrier`.

    Parameters
    ----------
    workers
        Threads of all targets' transfers.
    digests
        The checksum that is sent with what is written to each target.

    counts_requests
        Whether the stores' clients tell how many requests they sent.

    Attributes
    ----------
    transfers : dict of str to Transfers
        Of each target; whoever makes the carrier puts them in, and `close` ends them.
    """

    def __init__(self, how: ObjectHow, workers: int, digests: Mapping[str, Digest], counts_requests: bool) -> None:
        self.how, self.workers = how, workers
        self._counts_requests = counts_requests
        self.transfers: dict[str, Transfers] = {}
        self._digests = digests
        self._serial = itertools.count()
        self._under_way: dict[int, tuple[ObjectJob, Chain]] = {}
        self._out: Any = np.zeros(_AT_ONCE, COMPLETION_DTYPE)
        self._op: Literal["write", "read"] = "write"
        self._pattern: Pattern | None = None
        self._times: dict[str, Durations] = {}
        self._retried_by: dict[str, int] = {}
        self._before = self.counters()

    def prepare(self, how: ObjectHow, op: Literal["write", "read"], pattern: Pattern | None) -> None:
        """The next phase: what is done, and the pattern that is written or compared with (None: dropped)."""
        self.how, self._op, self._pattern = how, op, pattern

    @property
    def outstanding(self) -> int:
        return len(self._under_way)

    def begin(self) -> None:
        self._times = {name: Durations() for name in ("put", "get", "first byte", "retried")}
        self._retried_by = {}
        self._before = self.counters()

    def counters(self) -> TransferCounters:
        """Of all targets together."""
        found = [one.counters() for one in self.transfers.values()]
        return TransferCounters(*map(sum, zip(*found, strict=True))) if found else TransferCounters(*(0,) * 7)

    def moved_nbytes(self) -> int:
        counters = self.counters()
        return counters.received_bytes + counters.sent_bytes

    def submit(self, stage: Sequence[ObjectJob], chain: Chain) -> int:
        by_target: dict[str, list[ObjectJob]] = {}
        for job in stage:
            by_target.setdefault(job.target, []).append(job)
        for target, jobs in by_target.items():
            array, names = self._transfers_of(jobs, self._digests[target])
            self._under_way.update((int(tag), (job, chain)) for tag, job in zip(array["tag"], jobs, strict=True))
            self.transfers[target].submit(array, names, None, self._pattern)
        return len(stage)

    def _transfers_of(self, jobs: Sequence[ObjectJob], digest: Digest) -> tuple[Any, bytes]:
        names = [job.key.encode() for job in jobs]
        array: Any = np.zeros(len(jobs), TRANSFER_DTYPE)
        array["tag"] = [next(self._serial) for _ in jobs]
        array["key_nbytes"] = [len(name) for name in names]
        array["key_start"] = np.cumsum(array["key_nbytes"], dtype=np.uint64) - array["key_nbytes"]
        sizes = np.array([job.nbytes for job in jobs], np.uint64)
        writes = self._op == "write"
        array["op"] = Op.WRITE if writes else Op.READ
        array["nbytes"] = sizes if writes else WHOLE
        array["object_nbytes"] = WHOLE if writes else sizes
        array["place"] = [job.file_id for job in jobs]
        array["memory"] = Memory.PATTERN if self._pattern is not None else Memory.DROP
        array["digest"] = digest if writes and self.how.checksum else Digest.NONE
        if self.how.part_nbytes is not None:
            array["flags"], array["room"] = IN_PARTS, self.how.part_nbytes
        return array, b"".join(names)

    def reap(self, timeout_s: float) -> Iterator[tuple[Chain, Outcome]]:
        for transfers, count in self._wait(timeout_s):
            rows = self._out[:count].copy()
            self._count(rows[rows["kind"] == Kind.OK])
            for row in rows:
                job, chain = self._under_way.pop(int(row["tag"]))
                if row["kind"] != Kind.OK:
                    raise failed(transfers, row, job.path)
                yield (
                    chain,
                    Moved(job, int(row["start_ns"]), int(row["end_ns"]), job.nbytes, int(row["damaged_blocks"])),
                )

    def _wait(self, timeout_s: float) -> Iterator[tuple[Transfers, int]]:
        """Stores with completions, which lie in `_out` then."""
        busy = [one for one in self.transfers.values() if one.outstanding]
        if len(busy) == 1:
            yield busy[0], busy[0].reap(self._out, 1, timeout_s)
            return
        deadline = time.monotonic() + timeout_s
        found = False
        while busy and not found and time.monotonic() < deadline:
            for place, one in enumerate(busy):
                count = one.reap(self._out, 1, 0.0 if place else _LOOK_S)
                if count:
                    found = True
                    yield one, count

    def _count(self, rows: Any) -> None:
        total_ns = rows["end_ns"] - rows["start_ns"]
        found = buckets.of(total_ns)
        self._times["put" if self._op == "write" else "get"].add(total_ns, found)
        retried = rows["attempts"] > 1
        self._times["retried"].add(total_ns[retried], found[retried])
        for kind, status in rows[retried][["first_kind", "first_status"]].tolist():
            word = fault(kind, status, 0)
            self._retried_by[word] = self._retried_by.get(word, 0) + 1
        if self._op == "read":
            answered = rows[rows["first_byte_ns"] > 0]
            first_ns = answered["first_byte_ns"] - answered["attempt_ns"]
            self._times["first byte"].add(first_ns, buckets.of(first_ns))

    def cancel(self) -> None:
        for one in self.transfers.values():
            one.cancel()

    def figures(self, into: PhaseReport, outcomes: Sequence[Outcome]) -> None:
        into.histograms = {name: times.histogram() for name, times in self._times.items() if times.count}
        if not self._counts_requests:
            return
        now = self.counters()
        into.requests = Requests(
            sent=now.requests - self._before.requests,
            retries=now.retries - self._before.retries,
            retried_by=dict(self._retried_by),
            connections=now.connections - self._before.connections,
        )

    def close(self) -> None:
        """End all transfers; uploads that were begun are aborted.

        Raises
        ------
        OSError
            If some could not be.
        """
        left: OSError | None = None
        while self.transfers:
            try:
                self.transfers.popitem()[1].close()
            except OSError as error:
                left = error
        if left is not None:
            raise left
