"""Runs of ``mlstor stream`` for the tests, and a store in memory: a whole implementation of the protocols, whose faults
a test chooses.
"""

from __future__ import annotations

import errno
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import launchers
import numpy as np
from checkpoint_support import Ran, Underway

from mlstor import _io, cli
from mlstor.results.record import StreamRecord, load_any
from mlstor.storage.store import ObjectInfo, Page
from mlstor.storage.transfers import (
    COMPLETION_DTYPE,
    TRANSFER_DTYPE,
    WHOLE,
    Digest,
    Failure,
    Kind,
    Memory,
    Op,
    TransferCounters,
)

MODULE = ["-m", "mlstor.stream"]

#: What lies under a URL, for all stores of this process.
BUCKETS: dict[str, dict[str, bytes]] = {}
#: What becomes of a transfer instead, by URL: given its op and key, a kind and an HTTP status, or None for nothing.
FAULTS: dict[str, Callable[[Op, str], tuple[Kind, int] | None]] = {}
#: Seconds that each transfer takes, by URL.
DELAYS: dict[str, float] = {}
#: Every operation that was carried out, in order.
DONE: list[tuple[Op, str]] = []


def open(url: str, *, memory: int = 0) -> MemoryStore:
    """What `open_store` calls for ``mem://NAME``."""
    return MemoryStore(url, memory)


class MemoryStore:
    """Objects in a dictionary."""

    def __init__(self, url: str, memory: int = 0) -> None:
        self.url = url
        self.objects = BUCKETS.setdefault(url, {})
        self._memory = memory

    def list(self, prefix: str = "") -> Iterator[Page]:
        found = sorted(key for key in self.objects if key.startswith(prefix))
        for at in range(0, len(found), 100):
            keys = found[at : at + 100]
            yield Page(keys, [len(self.objects[key]) for key in keys])

    def stat(self, key: str) -> ObjectInfo:
        return ObjectInfo(len(self._get(key)))

    def read(self, key: str, into: Any = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        data = self._get(key)[offset : None if nbytes is None else offset + nbytes]
        if into is None:
            return data
        memoryview(into).cast("B")[: len(data)] = data
        return len(data)

    def write(self, key: str, source: Any) -> None:
        self.objects[key] = bytes(source)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> MemoryTransfers:
        return MemoryTransfers(self)

    def digest(self) -> Digest:
        return Digest.CRC32C

    def memory_bytes(self) -> int | None:
        return self._memory or None

    def describe(self) -> dict[str, Any]:
        return {"scheme": "mem"}

    def close(self) -> None:
        return None

    def _get(self, key: str) -> bytes:
        try:
            return self.objects[key]
        except KeyError:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.url}/{key}") from None


class MemoryTransfers:
    """Carries out what is submitted in its order, one after the other, when it is reaped."""

    workers = 1

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self._queue: deque[tuple[Any, bytes, _io.Pattern | None]] = deque()
        self._failures: list[Failure] = []
        self._cancelled = False
        self._moved = [0, 0]
        self.outstanding = 0
        self.closed = False
        #: the most that was ever outstanding
        self.most = 0

    def submit(self, transfers: Any, names: Any, buffer: Any = None, pattern: Any = None) -> int:
        rows = np.frombuffer(transfers, TRANSFER_DTYPE)
        blob = bytes(memoryview(names).cast("B"))
        for row in rows:
            if int(row["key_start"]) + int(row["key_nbytes"]) > len(blob):
                raise ValueError("a key lies outside `names`")
        self._queue.extend((row.copy(), blob, pattern) for row in rows)
        self._cancelled = False
        self.outstanding += len(rows)
        self.most = max(self.most, self.outstanding)
        return len(rows)

    def reap(self, out: Any, min_done: int = 1, timeout_s: float | None = None) -> int:
        rows = np.frombuffer(out, COMPLETION_DTYPE)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        count = 0
        while self._queue and count < len(rows):
            wait_s = int(self._queue[0][0]["not_before_ns"]) / 1e9 - time.monotonic()
            if wait_s > 0 and not self._cancelled:
                if count >= min_done or (deadline is not None and time.monotonic() >= deadline):
                    break
                time.sleep(min(wait_s, 0.001))
                continue
            self._carry_out(rows[count], *self._queue.popleft())
            count += 1
            if deadline is not None and time.monotonic() >= deadline:
                break
        self.outstanding -= count
        return count

    def failures(self) -> list[Failure]:
        said, self._failures = self._failures, []
        return said[:256]

    def cancel(self) -> None:
        self._cancelled = True

    def counters(self) -> TransferCounters:
        return TransferCounters(self._moved[0], self._moved[1], 1, len(DONE), 0, 0, 0)

    def close(self) -> None:
        self.closed = True

    def _carry_out(self, done: Any, row: Any, blob: bytes, pattern: Any) -> None:
        op = Op(int(row["op"]))
        key = blob[int(row["key_start"]) : int(row["key_start"]) + int(row["key_nbytes"])].decode()
        now_ns = time.monotonic_ns()
        for name in ("submit_ns", "start_ns", "attempt_ns"):
            done[name] = now_ns
        done["tag"], done["op"], done["attempts"], done["kind"] = row["tag"], row["op"], 1, Kind.OK
        done["result"] = done["damaged_blocks"] = done["status"] = done["flags"] = 0
        if self._cancelled:
            done["kind"] = Kind.CANCELLED
        else:
            time.sleep(DELAYS.get(self._store.url, 0))
            self._do(done, row, op, key, pattern)
            DONE.append((op, key))
        done["first_byte_ns"] = done["end_ns"] = max(now_ns + 1, time.monotonic_ns())

    def _do(self, done: Any, row: Any, op: Op, key: str, pattern: Any) -> None:
        url, objects = self._store.url, self._store.objects
        fault = FAULTS[url](op, key) if url in FAULTS else None
        if fault is None and op in (Op.READ, Op.STAT) and key not in objects:
            fault = Kind.HTTP, 404
        if fault is not None:
            kind, status = fault
            done["kind"], done["status"] = kind, status
            self._failures.append(Failure(int(row["tag"]), kind, status, f"{url}/{key}", "as the test wants it"))
            return
        if op is Op.WRITE:
            data = bytearray(int(row["nbytes"]))
            file_pattern(pattern, int(row["place"])).fill(data, int(row["offset"]))
            objects[key] = bytes(data)
            self._moved[1] += len(data)
            done["result"] = len(data)
        elif op is Op.READ:
            start, nbytes = int(row["offset"]), int(row["nbytes"])
            whole = objects[key]
            read = whole[start:] if nbytes == WHOLE else whole[start : start + nbytes]
            done["result"], done["object_nbytes"] = len(read), len(whole)
            self._moved[0] += len(read)
            if row["memory"] == Memory.PATTERN:
                done["damaged_blocks"] = len(file_pattern(pattern, int(row["place"])).check(read, start))
            if row["digest"] != Digest.NONE:
                done["flags"] = 2
        elif op is Op.STAT:
            done["object_nbytes"] = len(objects[key])
        else:
            objects.pop(key, None)


class TracedPattern:
    """Stands for `_io.Pattern` while a test runs, so that a store in memory can make the pattern of each object."""

    def __init__(self, run_id: int, checkpoint: int = 0, file_id: int = 0, compressibility: int = 0) -> None:
        self.fields = run_id, checkpoint, file_id, compressibility
        self._pattern = _REAL(*self.fields)

    def fill(self, buffer: Any, offset: int = 0) -> None:
        self._pattern.fill(buffer, offset)

    def check(self, buffer: Any, offset: int = 0, limit: int = 16) -> list[Any]:
        return self._pattern.check(buffer, offset, limit)


_REAL = _io.Pattern


def file_pattern(pattern: Any, file_id: int) -> _io.Pattern:
    """The pattern of one object: `place` of a transfer is its file id."""
    run_id, checkpoint, _, compressibility = pattern.fields
    return _REAL(run_id, checkpoint, file_id, compressibility)


class StreamBench:
    """A place to measure, a directory for results, and ways to run a stream on them."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url
        self.results = directory / "results"
        #: of every run
        self.options: tuple[str, ...] = ()

    @property
    def newest(self) -> StreamRecord:
        """The record that was written last."""
        found = load_any(max(self.results.glob("*/record.json"), key=lambda path: path.stat().st_mtime_ns))
        assert isinstance(found, StreamRecord)
        return found

    @property
    def objects(self) -> dict[str, bytes]:
        """What lies in the memory store, without what mlstor put beside it."""
        found = BUCKETS.get(self.url, {})
        return {key: data for key, data in found.items() if ".mlstor-" not in key}

    def put(self, count: int, nbytes: int | Callable[[int], int] = 1000) -> None:
        """Objects that were there before."""
        size = nbytes if callable(nbytes) else lambda index: nbytes
        BUCKETS.setdefault(self.url, {}).update({f"in/{i:05d}": bytes(size(i)) for i in range(count)})

    def arguments(self, *options: object) -> list[str]:
        words = [str(option) for option in options]
        return [*words, *self.options, "--no-live", "--results", str(self.results), self.url]

    def run(self, *options: object) -> StreamRan:
        """A run in this process."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["stream", *self.arguments(*options)])
        return StreamRan(code, out.getvalue(), err.getvalue(), self.results)

    def refused(self, *options: object) -> str:
        """What a run says that does not begin."""
        ran = self.run(*options)
        assert ran.code == 2, (ran.code, ran.out, ran.err)
        return ran.sentence

    def __call__(self, *options: object) -> StreamRan:
        """A run in this process, which must succeed."""
        ran = self.run(*options)
        assert ran.code == 0, ran.err + ran.out
        return ran

    def mpi_words(self, nranks: int, *options: object) -> list[str]:
        mpi = launchers.find("openmpi")
        return [*mpi.mpirun, *mpi.unbound, "-n", str(nranks), mpi.python, *MODULE, *self.arguments(*options)]

    def mpi(self, nranks: int, *options: object) -> StreamRan:
        """A run of so many ranks."""
        done = launchers.run(self.mpi_words(nranks, *options), self.directory)
        return StreamRan(done.returncode, done.stdout, done.stderr, self.results)

    def start(self, words: list[str]) -> Underway:
        """Begin a run that a test will disturb."""
        return Underway(self, launchers.Running(words, self.directory))  # type: ignore[arg-type]


class StreamRan(Ran):
    """What a stream has said and left."""

    @property
    def stream(self) -> StreamRecord:
        """The newest record."""
        return StreamBench(self.results.parent, "").newest
