"""Transfers by s3torchconnector: as many Python threads as there are transfers in flight."""

from __future__ import annotations

import errno
import itertools
import queue
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.errors import UsageError
from mlstor.storage.parted import COMPLETIONS, TRANSFERS, records
from mlstor.storage.transfers import (
    WHOLE,
    Failure,
    Kind,
    Memory,
    Op,
    TransferCounters,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Buffer, Self

    from mlstor._io import Pattern
    from mlstor.storage.s3_connector import S3ConnectorStore

#: A body made by a pattern is made before its clock starts up to this size, and piece by piece beyond it.
_PAYLOAD_BYTES = 64 << 20
#: `Pattern.check` describes so many blocks of so many bytes at most.
_CHECKED, _BLOCK_BYTES = 16, 4096
#: As `Transfers.failures` promises.
_MOST_FAILURES = 256


# csrc/pattern.h: magic, version, compressibility, checkpoint, check, run, file, offset
_STAMP = struct.Struct("<IHHIIQQQ")


def _by_file(pattern: Pattern) -> Callable[[int], Pattern]:
    """Makes the pattern of another file id: its other parameters are read from a block's stamp."""
    from mlstor._io import Pattern

    block = bytearray(4096)
    pattern.fill(block)
    _, _, compressibility, checkpoint, _, run_id, _, _ = _STAMP.unpack_from(block)
    return lambda file_id: Pattern(run_id, checkpoint, file_id, compressibility)


class _Job:
    """One transfer for a thread: its record, and what it moves."""

    __slots__ = ("buffer", "generation", "key", "pattern", "record", "submit_ns")

    def __init__(
        self,
        record: Any,
        key: str,
        buffer: memoryview | None,
        pattern: Callable[[int], Pattern] | None,
        generation: int,
    ) -> None:
        self.record = record
        self.key = key
        self.buffer = buffer
        self.pattern = pattern
        self.generation = generation
        self.submit_ns = time.monotonic_ns()


class _Mismatch(Exception):
    """The bytes that came are not those that were asked for."""

    def __init__(self, kind: Kind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class ConnectorTransfers:
    """See `transfers.Transfers`. What runs when it is cancelled ends with its next part."""

    def __init__(self, store: S3ConnectorStore, threads: int) -> None:
        self.outstanding = 0
        self._store = store
        self._generation = 0
        self._moved = [0, 0]
        self._busy_ns = self._wait_ns = 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[NDArray[Any]] = queue.SimpleQueue()
        self._failures: list[Failure] = []
        self._threads = [threading.Thread(target=self._work, name="mlstor-s3", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        """See `Transfers.submit`.

        Raises
        ------
        UsageError
            If a transfer asks for a checksum: the connector has none.
        """
        if not memoryview(transfers).nbytes:
            return 0
        array = records(transfers, TRANSFERS).copy()
        if array["digest"].any():
            raise UsageError("s3torchconnector sends and compares no checksums: ask for none (--no-checksum)")
        text = memoryview(names).cast("B")
        memory = None if buffer is None else memoryview(buffer).cast("B")
        _check(array, text.nbytes, memory, pattern)
        by_file = None if pattern is None else _by_file(pattern)
        for record in array:
            start = int(record["key_start"])
            key = str(text[start : start + int(record["key_nbytes"])], "utf-8")
            self._jobs.put(_Job(record, self._store.place.prefix + key, memory, by_file, self._generation))
        self.outstanding += len(array)
        return len(array)

    # ---- in the threads ----

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            completion = np.zeros((), COMPLETIONS)
            completion["tag"], completion["op"] = job.record["tag"], job.record["op"]
            completion["submit_ns"], completion["attempts"] = job.submit_ns, 1
            completion["object_nbytes"] = WHOLE
            begun = time.thread_time_ns()
            try:
                self._wait_for_start(job)
                completion["result"] = self._carry_out(job, completion)
            except Exception as error:
                self._fail(job, completion, error)
            completion["end_ns"] = time.monotonic_ns()
            if not completion["first_byte_ns"]:
                completion["first_byte_ns"] = completion["end_ns"]
            busy_ns = time.thread_time_ns() - begun
            with self._lock:
                self._busy_ns += busy_ns
                self._wait_ns += max(0, int(completion["end_ns"]) - int(completion["start_ns"]) - busy_ns)
            self._done.put(completion)

    def _wait_for_start(self, job: _Job) -> None:
        while (left_ns := int(job.record["not_before_ns"]) - time.monotonic_ns()) > 0:
            self._stop_if_cancelled(job)
            time.sleep(min(0.1, left_ns / 1e9))
        self._stop_if_cancelled(job)

    def _stop_if_cancelled(self, job: _Job) -> None:
        if job.generation != self._generation:
            raise _Mismatch(Kind.CANCELLED, "cancelled")

    def _carry_out(self, job: _Job, completion: NDArray[Any]) -> int:
        op = Op(int(job.record["op"]))
        if op is Op.WRITE:
            pieces = self._pieces(job)
            self._begin(completion)
            self._store.put(job.key, pieces)
            nbytes = int(job.record["nbytes"])
            completion["object_nbytes"] = nbytes
            self._count(0, nbytes)
            return nbytes
        self._begin(completion)
        if op is Op.READ:
            return self._read(job, completion)
        if op is Op.STAT:
            completion["object_nbytes"] = self._store.client.head_object(self._store.place.bucket, job.key).size
        else:
            self._store.client.delete_object(self._store.place.bucket, job.key)
        return 0

    def _begin(self, completion: NDArray[Any]) -> None:
        completion["start_ns"] = completion["attempt_ns"] = time.monotonic_ns()

    def _pieces(self, job: _Job) -> Iterable[memoryview]:
        """The body of a WRITE, made now if it isn't too large for that."""
        nbytes, place = int(job.record["nbytes"]), int(job.record["place"])
        if job.record["memory"] == Memory.BUFFER:
            assert job.buffer is not None
            return [job.buffer[place : place + nbytes]]
        assert job.pattern is not None
        pattern, offset = job.pattern(place), int(job.record["offset"])

        def made() -> Iterator[memoryview]:
            for at in range(0, nbytes, self._store.part_bytes):
                piece = bytearray(min(self._store.part_bytes, nbytes - at))
                pattern.fill(piece, offset + at)
                yield memoryview(piece)

        return list(made()) if nbytes <= _PAYLOAD_BYTES else made()

    def _read(self, job: _Job, completion: NDArray[Any]) -> int:
        record = job.record
        offset, nbytes, known = int(record["offset"]), int(record["nbytes"]), int(record["object_nbytes"])
        room = int(record["room"]) if record["memory"] == Memory.BUFFER else WHOLE
        due = nbytes if nbytes != WHOLE else known - offset if known != WHOLE else WHOLE
        start, end = (
            (None, None) if nbytes == WHOLE and not offset else (offset, offset + due if due != WHOLE else None)
        )
        pattern = job.pattern(int(record["place"])) if record["memory"] == Memory.PATTERN and job.pattern else None
        at = 0
        for chunk in self._store.chunks(job.key, start, end):
            if not at:
                completion["first_byte_ns"] = time.monotonic_ns()
            self._stop_if_cancelled(job)
            if at + len(chunk) > min(due, room):
                raise _Mismatch(Kind.LENGTH, f"more than {min(due, room)} bytes came")
            if record["memory"] == Memory.BUFFER:
                assert job.buffer is not None
                place = int(record["place"]) + at
                job.buffer[place : place + len(chunk)] = chunk
            elif pattern is not None:
                completion["damaged_blocks"] += _damaged(pattern, chunk, offset + at)
            at += len(chunk)
        self._count(at, 0)
        if due not in (WHOLE, at):
            raise _Mismatch(Kind.SHORT, f"{at} of {due} bytes came")
        completion["object_nbytes"] = known if known != WHOLE else at if start is None else WHOLE
        return at

    def _count(self, received: int, sent: int) -> None:
        with self._lock:
            self._moved[0] += received
            self._moved[1] += sent

    def _fail(self, job: _Job, completion: NDArray[Any], error: Exception) -> None:
        kind, number, text = Kind.OTHER, errno.EIO, f"{type(error).__name__}: {error}"
        if isinstance(error, _Mismatch):
            kind, text = error.kind, str(error)
        elif isinstance(error, self._store.exception):
            said = self._store.error(job.key, error)
            number, text = said.errno or errno.EIO, said.strerror or ""
        if not completion["start_ns"]:
            self._begin(completion)
        completion["kind"], completion["result"] = kind, -number
        with self._lock:
            if len(self._failures) < _MOST_FAILURES:
                url = f"s3://{self._store.place.bucket}/{job.key}"
                self._failures.append(Failure(int(job.record["tag"]), kind, 0, url, text))

    # ---- out ----

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        """See `Transfers.reap`."""
        room = records(out, COMPLETIONS)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        wanted = min(min_done, self.outstanding, len(room))
        count = 0
        try:
            while count < min(len(room), self.outstanding):
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    room[count] = self._done.get(timeout=left) if count < wanted else self._done.get_nowait()
                except queue.Empty:
                    break
                count += 1
        except KeyboardInterrupt:
            for completion in room[:count]:
                self._done.put(completion.copy())
            self.cancel()
            raise
        self.outstanding -= count
        return count

    def failures(self) -> list[Failure]:
        with self._lock:
            found, self._failures = self._failures, []
        return found

    def cancel(self) -> None:
        self._generation += 1

    def counters(self) -> TransferCounters:
        """Bytes and times; `busy_ns` is CPU of these threads, not that of the connector's own."""
        return TransferCounters(self._moved[0], self._moved[1], 0, 0, 0, self._busy_ns, self._wait_ns)

    def close(self) -> None:
        self.cancel()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def _damaged(pattern: Pattern, chunk: bytes, offset: int) -> int:
    """Blocks that differ; one check counts 16 of them, so that a chunk full of them is looked at in pieces."""
    count = len(pattern.check(chunk, offset))
    if count < _CHECKED:
        return count
    view, step = memoryview(chunk), _CHECKED * _BLOCK_BYTES
    first = step - offset % _BLOCK_BYTES
    edges = [0, *range(first, len(chunk), step), len(chunk)]
    return sum(len(pattern.check(view[a:b], offset + a)) for a, b in itertools.pairwise(edges))


def _check(array: NDArray[Any], names_nbytes: int, memory: memoryview | None, pattern: Pattern | None) -> None:
    """Raise a ValueError for a transfer outside of its names or memory."""
    if (array["key_start"] + array["key_nbytes"] > names_nbytes).any():
        raise ValueError("a key lies outside `names`")
    patterned = array["memory"] == Memory.PATTERN
    if patterned.any() and pattern is None:
        raise ValueError("a transfer names a pattern, and none was given")
    for record in array[array["memory"] == Memory.BUFFER]:
        nbytes = record["nbytes"] if record["op"] == Op.WRITE else record["room"]
        if memory is None or int(record["place"]) + int(nbytes) > memory.nbytes:
            raise ValueError("a transfer lies outside its buffer")
        if record["op"] == Op.READ and memory.readonly:
            raise ValueError("the buffer to read into is read-only")
