"""Transfers and multipart uploads of objects in a dictionary: real ones, small, whose failures can be chosen."""

from __future__ import annotations

import errno
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import google_crc32c
import numpy as np

from mlstor._io import Pattern
from mlstor.storage.parts import PartedTransfers
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
from mlstor.storage.uploads import Part

PART = 4096
THRESHOLD = 3 * PART


class InMemory:
    """Transfers of objects in a dictionary. Each is carried out when it is reaped; `spoil` may make one fail."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.asked: list[Any] = []
        self.most_outstanding = 0
        self.closed = False
        self.spoil: Callable[[Any, str, str], Kind] = lambda record, key, query: Kind.OK
        self._queue: list[tuple[Any, Any, Any, Any, int]] = []
        self._failures: list[Failure] = []

    @property
    def outstanding(self) -> int:
        return len(self._queue)

    def submit(self, transfers: Any, names: Any, buffer: Any = None, pattern: Any = None) -> int:
        array = np.frombuffer(transfers, TRANSFER_DTYPE).copy()
        now = time.monotonic_ns()
        self._queue.extend((record, bytes(names), buffer, pattern, now) for record in array)
        self.asked.extend(array)
        self.most_outstanding = max(self.most_outstanding, self.outstanding)
        return len(array)

    def reap(self, out: Any, min_done: int = 1, timeout_s: float | None = None) -> int:
        room = np.frombuffer(out, COMPLETION_DTYPE)
        if not self._queue and timeout_s:
            time.sleep(min(timeout_s, 0.001))
        count = min(len(room), len(self._queue), 3)
        for i in range(count):
            room[i] = self._carry_out(*self._queue.pop(0))
        return count

    def _carry_out(self, record: Any, names: bytes, buffer: Any, pattern: Pattern | None, now: int) -> Any:
        def text(name: str) -> str:
            start = int(record[f"{name}_start"])
            return names[start : start + int(record[f"{name}_nbytes"])].decode()

        done = np.zeros((), COMPLETION_DTYPE)
        done["tag"], done["op"], done["submit_ns"], done["attempts"] = record["tag"], record["op"], now, 1
        done["start_ns"] = done["attempt_ns"] = done["first_byte_ns"] = now
        done["end_ns"] = time.monotonic_ns()
        key, query = text("key"), text("query")
        kind = self.spoil(record, key, query)
        if kind is not Kind.OK:
            return self._failed(done, kind, key)
        place, offset = int(record["place"]), int(record["offset"])
        if record["op"] == Op.WRITE:
            nbytes = int(record["nbytes"])
            if pattern is not None:
                body = bytearray(nbytes)
                pattern.fill(body, offset)
            else:
                body = bytearray(memoryview(buffer)[place : place + nbytes])
            if query:
                upload, number = query.split("&")
                self.uploads[upload][int(number)] = bytes(body)
            else:
                self.objects[key] = bytes(body)
        else:
            body = bytearray(self.objects[key][offset:])
            if record["nbytes"] != WHOLE:
                body = body[: int(record["nbytes"])]
            if record["memory"] == Memory.BUFFER:
                assert len(body) <= int(record["room"])
                memoryview(buffer)[place : place + len(body)] = body
            done["object_nbytes"] = len(self.objects[key])
        if record["digest"] == Digest.CRC32C:
            done["digest_value"] = google_crc32c.value(bytes(body))
        elif record["digest"] == Digest.CRC32:
            done["digest_value"] = zlib.crc32(body)
        done["result"], done["status"] = len(body), 200
        done["etag"] = f"etag of {len(body)}" if query else "etag"
        return done

    def _failed(self, done: Any, kind: Kind, key: str) -> Any:
        done["kind"], done["result"], done["status"] = kind, -errno.EIO, 500 if kind is Kind.HTTP else 0
        self._failures.append(Failure(int(done["tag"]), kind, int(done["status"]), key, "spoiled"))
        return done

    def failures(self) -> list[Failure]:
        found, self._failures = self._failures, []
        return found

    def cancel(self) -> None:
        self.spoil = lambda record, key, query: Kind.CANCELLED

    def counters(self) -> TransferCounters:
        return TransferCounters(0, 0, 0, len(self.asked), 0, 0, 0)

    def close(self) -> None:
        self.closed = True


class InMemoryUploads:
    """Multipart uploads for `InMemory`; `refuse` names calls that fail, `hold` keeps them waiting."""

    def __init__(self, store: InMemory, most_parts: int = 100) -> None:
        self.most_parts = most_parts
        self.calls: list[str] = []
        self.digests: list[Digest] = []
        self.parts: list[Part] = []
        self.refuse: dict[str, OSError] = {}
        self.hold = threading.Event()
        self.hold.set()
        self._store = store
        self._lock = threading.Lock()

    def _called(self, name: str) -> None:
        with self._lock:
            self.calls.append(name)
        assert self.hold.wait(60)
        if name in self.refuse:
            raise self.refuse[name]

    def begin(self, key: str, digest: Digest) -> str:
        self._called("begin")
        upload = f"upload-{key}"
        self._store.uploads[upload] = {}
        self.digests.append(digest)
        return upload

    def query(self, upload_id: str, number: int) -> str:
        return f"{upload_id}&{number}"

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> str:
        self._called("complete")
        self.parts = list(parts)
        pieces = self._store.uploads.pop(upload_id)
        assert [part.number for part in parts] == sorted(pieces)
        self._store.objects[key] = b"".join(pieces[part.number] for part in parts)
        return "etag of the whole"

    def abort(self, key: str, upload_id: str) -> None:
        self._called("abort")
        self._store.uploads.pop(upload_id)


class Rig:
    def __init__(self, window: int = 4, most_parts: int = 100, payload_bytes: int = WHOLE) -> None:
        self.store = InMemory()
        self.uploads = InMemoryUploads(self.store, most_parts)
        self.transfers = PartedTransfers(
            self.store,
            self.uploads,
            part_bytes=PART,
            threshold_bytes=THRESHOLD,
            window=window,
            payload_bytes=payload_bytes,
        )
