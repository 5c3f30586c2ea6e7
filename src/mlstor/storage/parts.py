"""Large objects in parts: a WRITE as a multipart upload, a READ as ranges, many at once; still one completion each.

What is not above the threshold goes straight through. Of a large WRITE the upload is begun, its parts are written in
parallel, and it is completed, or aborted where anything fails or is cancelled. A few threads make these calls.
"""

from __future__ import annotations

import errno
import heapq
import itertools
import queue
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.storage.parted import COMPLETIONS, TRANSFERS, Parted, State, records
from mlstor.storage.transfers import IN_PARTS, WHOLE, Digest, Failure, Kind, Op
from mlstor.storage.uploads import Part

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Buffer, Self

    from mlstor._io import Pattern
    from mlstor.storage.transfers import TransferCounters, Transfers
    from mlstor.storage.uploads import Uploads

#: Tags from here on are those of parts; those of the caller lie below.
PART_TAG = 1 << 63
_MOST_FAILURES = 256  # as `Transfers.failures` promises
#: How often the loop looks for the end of a call while parts are under way too; SeaweedFS takes 1.5 ms for one.
_LOOK_S = 0.002
#: How long `close` waits for uploads to be aborted.
_CLOSE_S = 60.0


class PartedTransfers:
    """`Transfers` that split what is large.

    Parameters
    ----------
    inner
        Does the transfers; it is closed with this.
    uploads
        None: a WRITE is never split.
    part_bytes
        Size of a part, a multiple of 4096; larger where an object would have too many.
    threshold_bytes
        Objects and ranges above it are split. None: READs never are.
    window
        Parts of one transfer that are handed to `inner` at once. Twice what `inner` has in flight keeps it busy; what
        is in the window when a part fails is transferred in vain.
    payload_bytes
        Largest part that `inner` can make of a pattern.
    checksum
        What the store says is the CRC32C of a whole object, None if it doesn't say. It is asked for, and compared,
        when a whole object was read in ranges with that digest: answers to these have no checksum to compare.
    threads
        That call `uploads` and `checksum`.

    Notes
    -----
    A READ is split only if its length is known (``nbytes``, or ``object_nbytes``) and its digest is not XXH64, which
    does not combine; of a WRITE with XXH64 each part is sent with its own, and none is given back. A WRITE that has a
    query is not split. Times are those of the whole: begun with the upload, ended when it was completed. Attempts are
    those of the part that needed most.
    """

    def __init__(
        self,
        inner: Transfers,
        uploads: Uploads | None,
        *,
        part_bytes: int,
        threshold_bytes: int,
        window: int,
        payload_bytes: int = WHOLE,
        split_reads: bool = True,
        checksum: Callable[[str], int | None] | None = None,
        threads: int = 4,
    ) -> None:
        if part_bytes < 4096 or part_bytes % 4096 or window < 1:
            raise ValueError(f"part_bytes ({part_bytes}) must be a multiple of 4096, window ({window}) positive")
        self.outstanding = 0
        self._inner = inner
        self._uploads = uploads
        self._part_bytes = part_bytes
        self._threshold_bytes = threshold_bytes
        self._window = window
        self._payload_bytes = payload_bytes
        self._split_reads = split_reads
        self._checksum = checksum
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._wholes: set[Parted] = set()
        self._parts: dict[int, tuple[Parted, int]] = {}
        self._told: dict[int, Failure] = {}
        self._next_tag = PART_TAG
        self._later: list[tuple[int, int, Parted]] = []
        self._serial = itertools.count()
        self._ready: list[NDArray[Any]] = []
        self._failures: list[Failure] = []
        self._calls = 0
        self._running = 0
        self._answers: queue.SimpleQueue[tuple[Parted, State, Any]] = queue.SimpleQueue()
        self._left: list[str] = []
        self._closed = False

    @property
    def uploads(self) -> Uploads | None:
        """Who begins and ends multipart uploads; None where a WRITE is never split."""
        return self._uploads

    # ---- in ----

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        """See `Transfers.submit`. Tags lie below 2^63."""
        if not memoryview(transfers).nbytes:
            return 0
        array = records(transfers, TRANSFERS)
        if int(array["tag"].max()) >= PART_TAG:
            raise ValueError("a tag of 2**63 or more is taken by parts")
        large = self._large(array)
        if not large.any():
            taken = self._inner.submit(transfers, names, buffer, pattern)
            self.outstanding += taken
            return taken
        limits = (self._part_bytes, self._uploads.most_parts if self._uploads else 1, self._payload_bytes)
        wholes = [Parted(array[i], names, buffer, pattern, *limits) for i in np.flatnonzero(large)]
        small: Any = array[~large]
        taken = self._inner.submit(small, names, buffer, pattern) if len(small) else 0
        self.outstanding += taken + len(wholes)
        self._wholes.update(wholes)
        for whole in wholes:
            if whole.op == Op.READ:
                self._advance(whole)
            elif whole.not_before_ns > time.monotonic_ns():
                heapq.heappush(self._later, (whole.not_before_ns, next(self._serial), whole))
            else:
                self._begin(whole)
        return taken + len(wholes)

    def _large(self, array: NDArray[Any]) -> NDArray[np.bool_]:
        if not array["flags"].any():  # most batches are of small objects, and each look at a column costs 2 us
            asked = np.where(array["nbytes"] != WHOLE, array["nbytes"], array["object_nbytes"])
            if int(asked.max()) <= self._threshold_bytes:
                return np.zeros(len(array), bool)
        rest = array["object_nbytes"] - np.minimum(array["offset"], array["object_nbytes"])
        asked = np.where(array["nbytes"] != WHOLE, array["nbytes"], np.where(array["object_nbytes"] != WHOLE, rest, 0))
        chosen = (array["flags"] & IN_PARTS).astype(bool)
        reads = (array["op"] == Op.READ) & (array["digest"] != Digest.XXH64) & (chosen | self._split_reads)
        writes = (array["op"] == Op.WRITE) & (array["query_nbytes"] == 0) & (self._uploads is not None)
        result: NDArray[np.bool_] = (reads | writes) & (asked > np.where(chosen, 0, self._threshold_bytes))
        return result

    # ---- one transfer on its way ----

    def _begin(self, whole: Parted) -> None:
        assert self._uploads
        whole.started_ns = time.monotonic_ns()
        self._call(whole, State.BEGIN, self._uploads.begin, whole.key, whole.digest)

    def _call(self, whole: Parted, state: State, function: Callable[..., Any], *arguments: Any) -> None:
        """Have a thread call `function`; `_answer` is told what came of it."""
        whole.state = state
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mlstor-uploads")

        def run() -> None:
            try:
                answer = function(*arguments)
            except Exception as error:
                answer = error
            self._answers.put((whole, state, answer))

        self._calls += 1
        self._running += 1
        self._pool.submit(run)

    def _answer(self, whole: Parted, state: State, answer: Any) -> None:
        self._running -= 1
        if isinstance(answer, Exception) and not isinstance(answer, OSError):
            raise answer  # not of the storage: a mistake in the store's module
        if state is State.ABORT:
            if isinstance(answer, OSError):
                self._left.append(f"{whole.key} ({answer.strerror})")
            self._finish(whole)
            return
        if isinstance(answer, OSError):
            whole.fail_by(answer)
        elif state is State.BEGIN:
            whole.upload_id = answer
        elif state is State.CHECK:
            whole.compare(answer)
        else:
            whole.etag = answer
            self._finish(whole)
            return
        whole.state = State.PARTS
        self._advance(whole)

    def _advance(self, whole: Parted) -> None:
        """Hand over more parts, or go on to what follows the last one."""
        if whole.state is not State.PARTS:
            return
        if not whole.stopped:
            self._hand_over(whole, self._window - whole.flying)
        if whole.flying:
            return
        if not whole.stopped:
            whole.check()
        if not whole.stopped and self._checksum and whole.is_to_compare:
            self._call(whole, State.CHECK, self._checksum, whole.key)
        elif not self._uploads or not whole.upload_id:  # a READ, or a WRITE that could not be begun
            self._finish(whole)
        elif whole.stopped:
            self._call(whole, State.ABORT, self._uploads.abort, whole.key, whole.upload_id)
        else:
            parts = [Part(*part) for part in whole.written()]
            self._call(whole, State.COMPLETE, self._uploads.complete, whole.key, whole.upload_id, parts)

    def _hand_over(self, whole: Parted, most: int) -> None:
        count = min(most, whole.count - whole.next)
        if count < 1:
            return
        queries: list[str] = []
        if whole.op == Op.WRITE:
            assert self._uploads
            numbers = range(whole.next + 1, whole.next + 1 + count)
            queries = [self._uploads.query(whole.upload_id, number) for number in numbers]
        first = self._next_tag
        parts, names = whole.parts(count, first, queries)
        self._next_tag += count
        self._parts.update((first + i, (whole, whole.next + i)) for i in range(count))
        self._inner.submit(parts, names, whole.buffer, whole.pattern)
        whole.next += count
        whole.flying += count

    def _finish(self, whole: Parted) -> None:
        self._ready.append(whole.completion(time.monotonic_ns()))
        if whole.failure and len(self._failures) < _MOST_FAILURES:
            self._failures.append(whole.failure)
        self._wholes.discard(whole)

    # ---- out ----

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        """See `Transfers.reap`."""
        if not self._wholes and not self._ready:
            count = self._inner.reap(out, min_done, timeout_s)
            self.outstanding -= count
            return count
        room = records(out, COMPLETIONS)
        if not room.flags.writeable:
            raise BufferError("the array for completions must be writable")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        filled = 0 if min_done > 0 else self._collect(room, 0.0)
        try:
            while True:
                filled += self._deliver(room[filled:])
                if filled == len(room) or filled >= min(min_done, filled + self.outstanding):
                    return filled
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                filled += self._collect(room[filled:], left)
                if left == 0:
                    return filled + self._deliver(room[filled:])
        except KeyboardInterrupt:
            self._ready.extend(room[i].copy() for i in range(filled))
            self.outstanding += filled
            self.cancel()
            raise

    def _deliver(self, room: NDArray[Any]) -> int:
        count = min(len(room), len(self._ready))
        for i in range(count):
            room[i] = self._ready[i]
        del self._ready[:count]
        self.outstanding -= count
        return count

    def _collect(self, room: NDArray[Any], wait_s: float | None) -> int:
        """Wait once for parts or calls and see to them; what needed no parts goes into `room`, whose count it is."""
        now_ns = time.monotonic_ns()
        while self._later and self._later[0][0] <= now_ns:
            self._begin(heapq.heappop(self._later)[2])
        while not self._answers.empty():
            self._answer(*self._answers.get())
        if self._ready:
            return 0
        waits = [] if wait_s is None else [wait_s]
        if self._later:
            waits.append((self._later[0][0] - now_ns) / 1e9)
        if self._inner.outstanding:
            if self._running:
                waits.append(_LOOK_S)
            return self._sort_out(room, min(waits, default=None))
        if self._running:
            try:
                answer = self._answers.get(timeout=min(waits, default=None))
            except queue.Empty:
                return 0
            self._answer(*answer)
        elif waits:
            time.sleep(min(waits))
        return 0

    def _sort_out(self, room: NDArray[Any], wait_s: float | None) -> int:
        """Reap from `inner`: parts go to their whole, the others to `room`."""
        done: Any = np.zeros(len(room), COMPLETIONS)
        done = done[: self._inner.reap(done, 1, wait_s)]
        mine = done["tag"] >= PART_TAG
        singles = done[~mine]
        room[: len(singles)] = singles
        self.outstanding -= len(singles)
        touched: dict[Parted, None] = {}
        if (done["kind"][mine] != Kind.OK).any():
            self._hear()
        for completion in done[mine]:
            tag = int(completion["tag"])
            whole, index = self._parts.pop(tag)
            told = self._told.pop(tag, None)
            if whole.take(index, completion) and told:  # of a whole the first part to fail counts
                whole.failure = told._replace(tag=whole.tag)
            touched[whole] = None
        for whole in touched:
            self._advance(whole)
        return len(singles)

    def _hear(self) -> None:
        """Take what `inner` says of failures. It may tell of a part before that has come back."""
        for failure in self._inner.failures():
            if failure.tag in self._parts:
                self._told[failure.tag] = failure
            elif failure.tag < PART_TAG and len(self._failures) < _MOST_FAILURES:
                self._failures.append(failure)

    def failures(self) -> list[Failure]:
        """See `Transfers.failures`."""
        self._hear()
        mine, self._failures = self._failures, []
        return mine

    def cancel(self) -> None:
        """See `Transfers.cancel`; uploads that were begun are aborted, those that are being completed are left."""
        for whole in self._wholes:
            whole.cancel()
        self._inner.cancel()
        later, self._later = self._later, []
        for _, _, whole in later:
            self._finish(whole)
        for whole in list(self._wholes):
            self._advance(whole)

    def counters(self) -> TransferCounters:
        """Those of `inner`, and the calls that begin and end uploads among its requests."""
        inner = self._inner.counters()
        return inner._replace(requests=inner.requests + self._calls)

    def close(self) -> None:
        """Cancel what is under way, wait until its uploads are aborted, and end.

        Raises
        ------
        OSError
            EIO if uploads were left behind, with their keys.
        """
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + _CLOSE_S
        scratch = np.zeros(64, COMPLETIONS)
        self.cancel()
        try:
            while self._wholes and (left := deadline - time.monotonic()) > 0:
                for whole in [whole for whole in self._wholes if whole.flying and not self._inner.outstanding]:
                    whole.flying = 0  # Ctrl-C took its parts away on their way from `inner`
                    self._advance(whole)
                self._collect(scratch, left)
                self._ready.clear()
        finally:
            self._left.extend(f"{whole.key} (no answer)" for whole in self._wholes if whole.upload_id)
            self._wholes.clear()
            if self._pool:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._inner.close()
        if self._left:
            more = f" and {len(self._left) - 8} more" if len(self._left) > 8 else ""
            raise OSError(errno.EIO, f"multipart uploads were left behind: {', '.join(self._left[:8])}{more}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
