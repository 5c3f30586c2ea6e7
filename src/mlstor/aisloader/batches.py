"""GETs that are GetBatch requests: a row of the array asks for many objects, whose names are joined."""

from __future__ import annotations

import errno
import itertools
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import numpy as np

from mlstor.storage.ais_batch import Member
from mlstor.storage.parted import COMPLETIONS, TRANSFERS, records
from mlstor.storage.transfers import Failure, Kind, Op, TransferCounters
from mlstor.stream.compose import gathered
from mlstor.stream.reads import Picked

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor._io import Pattern
    from mlstor.storage.ais_batch import BatchReader
    from mlstor.storage.transfers import Transfers
    from mlstor.stream.catalog import Packed
    from mlstor.stream.reads import Reads

#: Between the names of a batch: what no name of an object has.
_JOINT = b"\1"
#: Between an archive's key and the query for a file in it, in a name of `lists.members`.
MEMBER = b"\0"
_QUERY = "archpath="
_MOST_FAILURES = 256
#: How long one side is waited for while the other may end, too.
_LOOK_S = 0.002


class BatchedReads:
    """Reads of which `size` at a time are one operation; all else is as `reads` has it."""

    def __init__(self, reads: Reads, size: int) -> None:
        self._reads, self._size = reads, size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reads, name)

    def take(self, count: int) -> Picked:
        """The next `count` batches; the last one before the end may be smaller."""
        picked = self._reads.take(count * self._size)
        starts = np.arange(0, len(picked.index), self._size)
        if not len(starts):
            return picked
        packed = _joined(picked.packed, starts)
        return Picked(
            picked.epoch[starts], picked.index[starts], packed, np.zeros(len(starts), np.uint64), packed.sizes
        )


def _joined(packed: Packed, starts: Any) -> Packed:
    blob, begins = gathered(packed)
    ends = begins + packed.key_nbytes
    text, names = blob.tobytes(), []
    bounds = [*starts.tolist(), len(begins)]
    for first, end in itertools.pairwise(bounds):
        names.append(_JOINT.join(text[begins[i] : ends[i]] for i in range(first, end)))
    lengths = np.array([len(name) for name in names], np.uint32)
    offsets = np.cumsum(lengths, dtype=np.uint64) - lengths
    sizes = np.add.reduceat(packed.sizes, starts)
    return packed._replace(
        names=np.frombuffer(b"".join(names), np.uint8), key_start=offsets, key_nbytes=lengths, sizes=sizes
    )


class _Done(NamedTuple):
    tag: int
    submit_ns: int
    start_ns: int
    end_ns: int
    nbytes: int
    error: OSError | None


class BatchTransfers:
    """`Transfers` whose READs are batches, by threads of their own; all else goes to `inner`, which is closed with it.

    Parameters
    ----------
    reader
        Asks for them; it is closed with this.
    threads
        Batches under way.
    missing_ok
        Go on where members are missing.
    """

    def __init__(self, inner: Transfers, reader: BatchReader, threads: int, missing_ok: bool) -> None:
        self._inner, self._reader, self._missing_ok = inner, reader, missing_ok
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mlstor-batch")
        self._done: queue.SimpleQueue[_Done] = queue.SimpleQueue()
        self._batches = 0
        self._cancelled = False
        self._received = self._requests = 0
        self._failures: list[Failure] = []
        self.workers = threads

    @property
    def outstanding(self) -> int:
        """See `Transfers`."""
        return self._batches + self._inner.outstanding

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        """See `Transfers.submit`."""
        array = records(transfers, TRANSFERS)
        mine = array["op"] == Op.READ
        count = self._inner.submit(array[~mine], names, buffer, pattern) if not mine.all() else 0
        text, now_ns = memoryview(names).cast("B"), time.monotonic_ns()
        self._cancelled = False
        for row in array[mine]:
            start = int(row["key_start"])
            keys = bytes(text[start : start + int(row["key_nbytes"])])
            self._batches += 1
            self._pool.submit(self._ask, int(row["tag"]), keys, now_ns)
        return count + int(mine.sum())

    def _ask(self, tag: int, keys: bytes, submit_ns: int) -> None:
        start_ns = time.monotonic_ns()
        error, nbytes = None, 0
        try:
            if self._cancelled:
                raise OSError(errno.ECANCELED, "cancelled")
            batch = self._reader.get([member(name) for name in keys.split(_JOINT)], missing_ok=self._missing_ok)
            start_ns, nbytes = batch.start_ns, batch.nbytes
        except OSError as failed:
            error = failed
        self._done.put(_Done(tag, submit_ns, start_ns, time.monotonic_ns(), nbytes, error))

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        """See `Transfers.reap`."""
        room = records(out, COMPLETIONS)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = min(min_done, self.outstanding, len(room))
        filled = 0
        while True:
            while filled < len(room) and not self._done.empty():
                room[filled] = self._completion(self._done.get())
                filled += 1
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            enough = filled >= wanted or left == 0
            if filled < len(room) and self._inner.outstanding:
                look = 0.0 if enough else left if not self._batches else min(_LOOK_S, left if left is not None else 1.0)
                rest: Any = room[filled:]
                filled += self._inner.reap(rest, 1, look)
                if enough:
                    return filled
            elif enough:
                return filled
            elif self._batches:
                try:
                    done = self._done.get(timeout=left)
                except queue.Empty:
                    return filled
                room[filled] = self._completion(done)
                filled += 1

    def _completion(self, done: _Done) -> Any:
        self._batches -= 1
        record = np.zeros((), COMPLETIONS)
        record["tag"], record["op"], record["attempts"] = done.tag, Op.READ, 1
        record["submit_ns"], record["end_ns"] = done.submit_ns, done.end_ns
        record["start_ns"] = record["attempt_ns"] = done.start_ns
        if done.error is None:
            record["result"] = record["object_nbytes"] = done.nbytes
            self._received += done.nbytes
            self._requests += 1
            return record
        code = done.error.errno or errno.EIO
        record["kind"] = Kind.CANCELLED if code == errno.ECANCELED else Kind.SYSTEM
        record["result"] = -code
        if code != errno.ECANCELED and len(self._failures) < _MOST_FAILURES:
            text, url = done.error.strerror or str(done.error), str(done.error.filename or "")
            self._failures.append(Failure(done.tag, Kind.SYSTEM, 0, url, text))
        return record

    def failures(self) -> list[Failure]:
        """See `Transfers.failures`."""
        mine, self._failures = self._failures, []
        return [*mine, *self._inner.failures()][:_MOST_FAILURES]

    def cancel(self) -> None:
        """See `Transfers.cancel`; a batch that was asked for comes to its end."""
        self._cancelled = True
        self._inner.cancel()

    def counters(self) -> TransferCounters:
        """Those of `inner`, and the batches: requests, and the bytes of their members."""
        inner = self._inner.counters()
        return inner._replace(
            received_bytes=inner.received_bytes + self._received, requests=inner.requests + self._requests
        )

    def close(self) -> None:
        """Wait for the batches under way, and end."""
        self._cancelled = True
        try:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._reader.close()
        finally:
            self._inner.close()


def member(name: bytes) -> Member:
    """What a name of a listing asks for: an object, or a file in an archive."""
    key, joint, query = name.partition(MEMBER)
    return Member(key.decode(), unquote(query.decode().removeprefix(_QUERY)) if joint else "")
