"""A store in memory for tests of what lies above stores: it lists, moves bytes, and fails where it is told to."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.storage.store import ObjectInfo, Page
from mlstor.storage.transfers import (
    COMPLETION_DTYPE,
    TRANSFER_DTYPE,
    WHOLE,
    Failure,
    Kind,
    Memory,
    Op,
    TransferCounters,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor._io import Pattern


class MemoryStore:
    """Objects in a dictionary.

    Attributes
    ----------
    faults : dict
        Keys whose reads fail, and with which completion fields (kind, status, result).
    opened : list
        All transfers that were made.
    """

    def __init__(self, objects: dict[str, bytes], page: int = 7, seed: int | None = None) -> None:
        self.url = "memory://objects"
        self.objects = dict(objects)
        self.faults: dict[str, dict[str, int]] = {}
        self.opened: list[MemoryTransfers] = []
        self.listings = 0
        self.closed = False
        self._page = page
        self._seed = seed

    def list(self, prefix: str = "") -> Iterator[Page]:
        self.listings += 1
        keys = [key for key in self.objects if key.startswith(prefix)]
        random.Random(self.listings).shuffle(keys)
        for at in range(0, len(keys), self._page):
            some = keys[at : at + self._page]
            yield Page(some, [len(self.objects[key]) for key in some])

    def stat(self, key: str) -> ObjectInfo:
        if key not in self.objects:
            raise FileNotFoundError(errno.ENOENT, "no such object", key)
        return ObjectInfo(len(self.objects[key]))

    def read(self, key: str, into: Buffer | None = None, offset: int = 0, nbytes: int | None = None) -> bytes | int:
        data = self.objects[key][offset : None if nbytes is None else offset + nbytes]
        if into is None:
            return data
        memoryview(into).cast("B")[: len(data)] = data
        return len(data)

    def write(self, key: str, source: Buffer) -> None:
        self.objects[key] = bytes(memoryview(source))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.objects.pop(key, None)

    def transfers(self, *, workers: int = 0, in_flight: int = 8) -> MemoryTransfers:
        made = MemoryTransfers(self, (workers or 1) * in_flight, self._seed)
        self.opened.append(made)
        return made

    def describe(self) -> dict[str, Any]:
        return {"scheme": "memory"}

    def close(self) -> None:
        self.closed = True


class MemoryTransfers:
    """Does its work when it is reaped: in the order of submission, or with a seed in any order of those in flight."""

    def __init__(self, store: MemoryStore, in_flight: int, seed: int | None) -> None:
        self._store = store
        self._in_flight = in_flight
        self._random = None if seed is None else random.Random(seed)
        self._queue: list[tuple[Any, memoryview, memoryview | None]] = []
        self._failures: list[Failure] = []
        self._cancelled = 0
        self.submitted_bytes: list[int] = []
        self.closed = False
        self.outstanding = 0

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        asked = np.frombuffer(memoryview(transfers), TRANSFER_DTYPE).copy()
        named = memoryview(names).cast("B")
        target = None if buffer is None else memoryview(buffer).cast("B")
        for one in asked:
            if int(one["key_start"]) + int(one["key_nbytes"]) > len(named):
                raise ValueError("a key lies outside of the names")
            if one["memory"] == Memory.BUFFER and (target is None or int(one["place"] + one["room"]) > len(target)):
                raise ValueError("a destination lies outside of the buffer")
        self.submitted_bytes.append(int(asked["object_nbytes"].sum()))
        self._queue += [(one, named, target) for one in asked]
        self.outstanding = len(self._queue)
        return len(asked)

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        rows = np.frombuffer(memoryview(out), COMPLETION_DTYPE)
        count = min(len(rows), len(self._queue), max(min_done, 1))
        for at in range(count):
            place = 0 if self._random is None else self._random.randrange(min(self._in_flight, len(self._queue)))
            rows[at] = self._done(*self._queue.pop(place))
        self.outstanding = len(self._queue)
        return count

    def _done(self, asked: Any, named: memoryview, target: memoryview | None) -> Any:
        key = bytes(named[int(asked["key_start"]) :][: int(asked["key_nbytes"])]).decode()
        row = np.zeros((), COMPLETION_DTYPE)
        row["tag"], row["op"], row["attempts"] = asked["tag"], asked["op"], 1
        fault = self._store.faults.get(key)
        data = self._store.objects.get(key)
        if self._cancelled:
            self._cancelled -= 1
            fault = {"kind": Kind.CANCELLED, "result": -errno.ECANCELED}
        if fault is None and data is None:
            fault = {"kind": Kind.HTTP, "status": 404}
        elif fault is None and data is not None and int(asked["object_nbytes"]) not in (WHOLE, len(data)):
            fault = {"kind": Kind.LENGTH} if asked["op"] == Op.READ else None
        if fault is not None:
            for name, value in fault.items():
                row[name] = value
            self._failures.append(Failure(int(row["tag"]), Kind(int(row["kind"])), int(row["status"]), key, "told to"))
            return row
        assert data is not None
        row["object_nbytes"] = len(data)
        if asked["op"] == Op.READ:
            row["result"] = len(data)
            if target is not None:
                place = int(asked["place"])
                target[place : place + len(data)] = data
        return row

    def failures(self) -> list[Failure]:
        found, self._failures = self._failures, []
        return found

    def cancel(self) -> None:
        self._cancelled = len(self._queue)

    def counters(self) -> TransferCounters:
        return TransferCounters(0, 0, 0, 0, 0, 0, 0)

    def close(self) -> None:
        assert not self._queue
        self.closed = True
