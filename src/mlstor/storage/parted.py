"""One large transfer while it is carried out in parts: where they lie, how far they are, what became of the whole."""

from __future__ import annotations

import errno
import os
import time
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor._io import crc_combine
from mlstor.errors import UsageError
from mlstor.storage.transfers import (
    COMPLETION_DTYPE,
    IN_PARTS,
    TRANSFER_DTYPE,
    WHOLE,
    Digest,
    Failure,
    Kind,
    Memory,
    Op,
)
from mlstor.units import format_gib

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from mlstor._io import Pattern

# Made once: numpy takes 12 us to understand the lists.
TRANSFERS, COMPLETIONS = np.dtype(TRANSFER_DTYPE), np.dtype(COMPLETION_DTYPE)

_HAS_DIGEST = 1  # TRANSFER_DTYPE's flags
_COMBINED = {Digest.CRC32C: "crc32c", Digest.CRC32: "crc32"}
_CONNECTED, _COMPARED = 1, 2  # COMPLETION_DTYPE's flags
_MIB = 1 << 20
#: How a call of the store failed, by errno.
_KINDS = {
    errno.ECONNREFUSED: Kind.CONNECT,
    errno.ECONNRESET: Kind.RESET,
    errno.EPIPE: Kind.RESET,
    errno.ETIMEDOUT: Kind.STALLED,
}


class State(Enum):
    """What a whole waits for."""

    #: its intended start, or parts
    PARTS = auto()
    #: calls of the store
    BEGIN = auto()
    CHECK = auto()
    COMPLETE = auto()
    ABORT = auto()


class Parted:
    """A READ or WRITE and its parts. `PartedTransfers` moves it on; this knows no other transfer.

    Raises
    ------
    ValueError
        If the transfer lies outside `names` or `buffer`, or the buffer of a READ is read-only.
    UsageError
        If it would need parts that can't be made of a pattern.
    """

    def __init__(
        self,
        record: NDArray[Any],
        names: Buffer,
        buffer: Buffer | None,
        pattern: Pattern | None,
        part_bytes: int,
        most_parts: int,
        payload_bytes: int,
    ) -> None:
        self.record = record.copy()
        self.tag = int(record["tag"])
        self.op = Op(int(record["op"]))
        self.digest = Digest(int(record["digest"]))
        self.not_before_ns = int(record["not_before_ns"])
        self.buffer = buffer
        self.pattern = pattern
        self._key = _slice(names, int(record["key_start"]), int(record["key_nbytes"]))
        self._query = _slice(names, int(record["query_start"]), int(record["query_nbytes"]))
        self.key = self._key.decode()
        self._start = int(record["offset"])
        self._nbytes = int(record["nbytes"])
        if self._nbytes == WHOLE:
            self._nbytes = int(record["object_nbytes"]) - self._start
        self._check_memory()
        if record["flags"] & IN_PARTS:
            part_bytes = int(record["room"])
            if part_bytes < 4096 or part_bytes % 4096:
                raise ValueError(f"parts of {part_bytes} bytes: `room` is to be a multiple of 4096")
        self._edges = self._cut(part_bytes, most_parts, payload_bytes)
        self.count = len(self._edges) - 1
        self._done = np.zeros(self.count, COMPLETIONS)

        self.state = State.PARTS
        self.next = 0
        self.flying = 0
        self.upload_id = ""
        self.etag = ""
        self.failure: Failure | None = None
        self._flags = 0
        self.is_to_compare = (
            self.op is Op.READ
            and self.digest is Digest.CRC32C
            and not record["flags"] & _HAS_DIGEST
            and not self._start
            and self._nbytes == int(record["object_nbytes"])
        )
        self._kind = Kind.OK
        self._result = 0
        self._status = 0
        self._submit_ns = self.started_ns = time.monotonic_ns()

    def _check_memory(self) -> None:
        memory = Memory(int(self.record["memory"]))
        if memory is Memory.PATTERN and self.pattern is None:
            raise ValueError("a transfer names a pattern, and none was given")
        if memory is not Memory.BUFFER:
            return
        if self.buffer is None:
            raise ValueError("a transfer names a buffer, and none was given")
        view, place = memoryview(self.buffer), int(self.record["place"])
        if self.op is Op.READ and view.readonly:
            raise ValueError("the buffer to read into is read-only")
        if place + self._nbytes > view.nbytes or (self.op is Op.READ and self._nbytes > int(self.record["room"])):
            raise ValueError(f"{self.key}: {self._nbytes} bytes at {place} lie outside the buffer or its room")

    def _cut(self, part_bytes: int, most_parts: int, payload_bytes: int) -> NDArray[np.uint64]:
        """Where the parts begin and the last one ends: of a READ at multiples of `part_bytes` of the object, of a
        WRITE all of one size (S3 asks it of all but the last to be 5 MiB at least).
        """
        end = self._start + self._nbytes
        first = self._start + part_bytes
        if self.op is Op.READ:
            first -= self._start % part_bytes
        elif self._nbytes > part_bytes * most_parts:
            part_bytes = -(-self._nbytes // (most_parts * _MIB)) * _MIB
            first = self._start + part_bytes
        if self.op is Op.WRITE and self.record["memory"] == Memory.PATTERN and part_bytes > payload_bytes:
            raise UsageError(
                f"{format_gib(self._nbytes)} are more than {most_parts} parts of at most "
                f"{format_gib(payload_bytes)}: write smaller objects"
            )
        inner = np.arange(first, end, part_bytes, dtype=np.uint64)
        return np.concatenate([np.array([self._start], np.uint64), inner, np.array([end], np.uint64)])

    # ---- its parts ----

    def parts(self, count: int, first_tag: int, queries: list[str]) -> tuple[Any, bytes]:
        """The next `count` transfers and their names; `queries` of a WRITE, one for each."""
        at = slice(self.next, self.next + count)
        starts, ends = self._edges[at], self._edges[self.next + 1 : self.next + count + 1]
        array = np.zeros(count, TRANSFERS)
        array[:] = self.record
        array["tag"] = np.arange(count, dtype=np.uint64) + np.uint64(first_tag)
        array["offset"] = starts
        array["nbytes"] = ends - starts
        if self.record["memory"] == Memory.BUFFER:
            array["place"] += starts - np.uint64(self._start)
            array["room"] = ends - starts
        # What was given is of the whole: it is compared when all parts are there.
        array["flags"] &= 0xFF ^ (_HAS_DIGEST | IN_PARTS)
        array["digest_value"] = 0
        array["key_start"] = 0
        names = [self._key, self._query]
        array["query_start"] = len(self._key)
        if self.op is Op.WRITE:
            array["not_before_ns"] = 0
            array["object_nbytes"] = WHOLE
            encoded = [query.encode() for query in queries]
            lengths = np.array([len(query) for query in encoded], np.uint64)
            array["query_nbytes"] = lengths
            array["query_start"] += np.cumsum(lengths) - lengths
            names = [self._key, *encoded]
        return array, b"".join(names)

    def take(self, index: int, completion: NDArray[Any]) -> bool:
        """A part has ended. True if it is the first one that failed, which decides what became of the whole."""
        self._done[index] = completion
        self.flying -= 1
        if completion["kind"] == Kind.OK or self.stopped:
            return False
        self._kind = Kind(int(completion["kind"]))
        self._result = int(completion["result"])
        self._status = int(completion["status"])
        return True

    def written(self) -> list[tuple[int, int, str, int | None]]:
        """Number, bytes, ETag and CRC32C of each part."""
        with_crc = self.digest is Digest.CRC32C
        sizes = np.diff(self._edges).tolist()
        etags = self._done["etag"].tolist()
        crcs = self._done["digest_value"].tolist()
        return [(i + 1, sizes[i], etags[i].decode(), crcs[i] if with_crc else None) for i in range(self.count)]

    # ---- how it ends ----

    @property
    def stopped(self) -> bool:
        """A part failed, or it was cancelled: nothing more is to be begun."""
        return self._kind is not Kind.OK

    def cancel(self) -> None:
        """End it, unless it is being completed or has failed before."""
        if self.state is not State.COMPLETE and not self.stopped:
            self._fail(Kind.CANCELLED, -errno.ECANCELED, 0, "cancelled")

    def fail_by(self, error: OSError) -> None:
        """End it for an error of one of the store's calls, unless it has ended before."""
        if not self.stopped:
            status = int(getattr(error, "status", 0))
            code = error.errno or errno.EIO
            text = getattr(error, "answer", "") or error.strerror or os.strerror(code)
            kind = Kind.HTTP if status else _KINDS.get(code, Kind.SYSTEM)
            self._fail(kind, -code, status, text, str(error.filename or self.key))

    def check(self) -> None:
        """All parts are there: do they belong together, and is their checksum the one that was given?"""
        etags = np.unique(self._done["etag"])
        if self.op is Op.READ and len(etags) > 1:
            self._fail(Kind.OTHER, -errno.EIO, 0, "the object was replaced while it was read in ranges")
        elif self.digest in _COMBINED and self.record["flags"] & _HAS_DIGEST:
            self._expect(int(self.record["digest_value"]))

    def compare(self, stored: int | None) -> None:
        """With the checksum that the store has, if it has one."""
        self.is_to_compare = False
        if stored is not None and not self.stopped:
            self._flags = _COMPARED
            self._expect(stored)

    def _expect(self, expected: int) -> None:
        if (found := self._combined()) != expected:
            self._fail(Kind.CHECKSUM, -errno.EBADMSG, 0, f"{self.digest.name} is {found:08x}, should be {expected:08x}")

    def _fail(self, kind: Kind, result: int, status: int, message: str, url: str = "") -> None:
        self._kind, self._result, self._status = kind, result, status
        self.failure = Failure(self.tag, kind, status, url or self.key, message)

    def _combined(self) -> int:
        """The CRC of the whole, from those of its parts."""
        crcs, sizes = self._done["digest_value"].tolist(), np.diff(self._edges).tolist()
        crc: int = crcs[0]
        for i in range(1, self.count):
            crc = crc_combine(_COMBINED[self.digest], crc, crcs[i], sizes[i])
        return crc

    def completion(self, now_ns: int) -> NDArray[Any]:
        """A record of COMPLETION_DTYPE for the whole: bytes added up, first and last times, most attempts."""
        answered = self._done[self._done["attempts"] > 0]
        record = np.zeros((), COMPLETIONS)
        record["tag"], record["op"] = self.tag, self.op
        record["kind"], record["status"], record["result"] = self._kind, self._status, self._result
        record["submit_ns"] = self._submit_ns
        record["attempts"] = 1
        start_ns, end_ns = self.started_ns, now_ns
        attempt_ns, first_byte_ns = start_ns, end_ns
        if len(answered):
            worst = answered[np.argmax(answered["attempts"])]
            if self.op is Op.READ:
                start_ns = attempt_ns = int(answered["start_ns"].min())
                end_ns = int(answered["end_ns"].max())
                first_byte_ns = int(answered["first_byte_ns"].min())
            if worst["attempts"] > 1:
                attempt_ns = int(worst["attempt_ns"])
                if self.op is Op.READ:
                    first_byte_ns = int(worst["first_byte_ns"])
            for name in ("attempts", "first_kind", "first_status"):
                record[name] = worst[name]
            for name in ("redirect_ns", "object_nbytes"):
                record[name] = answered[name].max()
            record["damaged_blocks"] = answered["damaged_blocks"].sum(dtype=np.uint64)
            record["endpoint"] = answered["endpoint"][0]
            compared = _COMPARED if (answered["flags"] & _COMPARED).all() else 0
            connected = _CONNECTED if (answered["flags"] & _CONNECTED).any() else 0
            record["flags"] = self._flags | compared | connected
        for name, value in (("start_ns", start_ns), ("attempt_ns", attempt_ns)):
            record[name] = value
        record["first_byte_ns"], record["end_ns"] = first_byte_ns, end_ns
        if self.stopped:
            return record
        record["result"] = self._done["result"].sum()
        record["status"] = self._done["status"][0]
        record["etag"] = self.etag.encode() if self.op is Op.WRITE else self._done["etag"][0]
        if self.op is Op.WRITE:
            record["object_nbytes"] = self._nbytes
        if self.digest in _COMBINED:
            record["digest_value"] = self._combined()
        return record


def _slice(names: Buffer, start: int, nbytes: int) -> bytes:
    view = memoryview(names).cast("B")
    if start + nbytes > view.nbytes:
        raise ValueError("a key lies outside `names`")
    return bytes(view[start : start + nbytes])


def records(array: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array of records as a numpy array, without a copy. (numpy's types know fewer buffers than it takes.)"""
    return np.frombuffer(array, dtype)
