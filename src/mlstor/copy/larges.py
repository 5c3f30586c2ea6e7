"""The large objects of a copy: when their parts are read and written, and how they are begun and completed."""

from __future__ import annotations

import base64
import binascii
import errno
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mlstor.copy.large import Large, failed_row
from mlstor.copy.parts import FileParts, ServerParts
from mlstor.copy.resume import version_of
from mlstor.copy.tally import completion, completion_of
from mlstor.errors import UsageError
from mlstor.storage.store import ObjectInfo
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Digest, Failure, Kind, Memory, Op

if TYPE_CHECKING:
    from mlstor.copy.mover import Mover
    from mlstor.copy.parts import Target

_HAS_DIGEST, _COMPARED = 1, 2
#: Tags from here on are of large objects that are read once more; those of slots lie below.
_AGAIN = 1 << 40


def crc_said(info: ObjectInfo) -> int | None:
    """CRC32C of a whole object, as its store says; None if it says another checksum or none."""
    kind, value = info.checksum or ("", "")
    if kind.lower() != "crc32c" or "-" in value:  # of an object in parts: a checksum of checksums
        return None
    try:
        raw = (
            bytes.fromhex(value)
            if len(value) == 8 and not value.endswith("=")
            else base64.b64decode(value, validate=True)
        )
    except (ValueError, binascii.Error):
        return None
    return int.from_bytes(raw, "big") if len(raw) == 4 else None


class Larges:
    """Those under way.

    Parameters
    ----------
    mover : Mover
        Has the sides, the memory and the counts.
    target : Target or None

    Attributes
    ----------
    under_way : set of Large
    """

    def __init__(self, mover: Mover, target: Target | None) -> None:
        self._mover, self._target = mover, target
        self.under_way: set[Large] = set()
        self._queue: deque[Large] = deque()
        self._parts: dict[int, tuple[Large, int]] = {}
        self._again: dict[int, Large] = {}
        self._next_again = _AGAIN

    def target_for(self, name: str) -> Target:
        """What makes this object.

        Raises
        ------
        UsageError
            If the destination makes no objects of parts.
        """
        if self._target is None:
            raise UsageError(
                f"{self._mover.destination.store.url} takes no objects in parts, and {name!r} is larger than one: "
                "give a larger --part"
            )
        return self._target

    # ---- begun ----

    def add(self, large: Large) -> None:
        """Begin it; its parts are read when there are slots for them."""
        self.under_way.add(large)
        self._queue.append(large)
        mover = self._mover
        asks = mover.how.verify != "no" and mover.source.digest is not Digest.NONE

        def begin() -> tuple[str, ObjectInfo | None]:
            info = mover.source.store.stat(large.key) if asks else None
            return large.target.begin(large.key, large.nbytes), info

        large.begins = True
        mover.calls.make(begin, partial(self._has_begun, large))

    def _has_begun(self, large: Large, answer: Any) -> None:
        large.begins = False
        if isinstance(answer, OSError):
            row, failure = completion_of(answer, Op.WRITE, large.wrote, time.monotonic_ns())
            large.fail("put", row, failure)
        else:
            large.upload_id, info = answer
            self._mover.proven.begun(large.key, large.upload_id)
            if info is not None:
                large.source_crc = crc_said(info)
                large.version = version_of((info.checksum or ("", ""))[1].encode())
        waiting, large.waiting = large.waiting, []
        for slot in waiting:
            self._write(large, slot)
        self._advance(large)

    def next_part(self, slot: int) -> bool:
        """Begin to read the next part into a slot; False if no large object has one."""
        while self._queue and (self._queue[0].failure is not None or self._queue[0].next == self._queue[0].count):
            self._queue.popleft()
        if not self._queue:
            return False
        large, mover = self._queue[0], self._mover
        number = large.next
        offset, nbytes = large.span(number)
        mover.hold(slot)
        large.next += 1
        large.flying += 1
        item: Any = np.zeros(1, TRANSFER_DTYPE)
        name = large.key.encode("utf-8", "surrogateescape")
        item["tag"], item["op"], item["memory"] = self._tag(slot), Op.READ, Memory.BUFFER
        item["key_nbytes"], item["offset"], item["nbytes"] = len(name), offset, nbytes
        item["object_nbytes"], item["place"] = large.nbytes, slot * mover.how.part_bytes
        item["room"] = mover.how.part_bytes
        item["digest"] = Digest.NONE if mover.how.verify == "no" else Digest.CRC32C
        self._parts[self._tag(slot)] = large, number
        mover.source.transfers.submit(item, name, mover.memory)
        return True

    @staticmethod
    def _tag(slot: int) -> int:
        from mlstor.copy.mover import PER_SLOT

        return slot * PER_SLOT

    # ---- read ----

    def were_read(self, rows: Any, said: dict[int, Failure]) -> Any:
        """Take the completions that are of parts; the others come back."""
        kept = np.ones(len(rows), bool)
        for at, tag in enumerate(rows["tag"].tolist()):
            if tag not in self._parts:
                continue
            kept[at] = False
            large, number = self._parts[tag]
            large.read[number] = rows[at]
            if rows[at]["kind"] != Kind.OK:
                large.fail("get", rows[at], said.get(tag), rows[at]["kind"] == Kind.CHECKSUM)
            slot = tag // self._tag(1)
            if large.begins and large.failure is None:
                large.waiting.append(slot)
            else:
                self._write(large, slot)
        return rows[kept]

    def _write(self, large: Large, slot: int) -> None:
        """Write the part in a slot, unless the object has failed."""
        mover = self._mover
        if large.failure is not None:
            self._let_go(large, slot)
            return
        number = self._parts[self._tag(slot)][1]
        offset, nbytes = large.span(number)
        if isinstance(large.target, FileParts):
            memory = mover.hold(slot)[:nbytes]
            start_ns = time.monotonic_ns()
            mover.calls.make(
                partial(large.target.write, large.upload_id, offset, memory),
                partial(self._range_written, large, slot, number, start_ns),
            )
            return
        assert isinstance(large.target, ServerParts)
        key = large.key.encode()
        query = large.target.query(large.upload_id, number + 1).encode()
        item: Any = np.zeros(1, TRANSFER_DTYPE)
        item["tag"], item["op"], item["memory"] = self._tag(slot), Op.WRITE, Memory.BUFFER
        item["key_nbytes"], item["query_start"], item["query_nbytes"] = len(key), len(key), len(query)
        item["nbytes"], item["object_nbytes"], item["place"] = nbytes, WHOLE, slot * mover.how.part_bytes
        if mover.how.verify != "no":
            item["digest"], item["flags"] = Digest.CRC32C, _HAS_DIGEST
            item["digest_value"] = large.read[number]["digest_value"]
        mover.destination.transfers.submit(item, key + query, mover.memory)

    # ---- written ----

    def were_written(self, rows: Any, said: dict[int, Failure]) -> Any:
        """Take the completions that are of parts, or of objects that were read again; the others come back."""
        kept = np.ones(len(rows), bool)
        for at, tag in enumerate(rows["tag"].tolist()):
            if tag in self._again:
                kept[at] = False
                self._read_again(self._again.pop(tag), rows[at], said.get(tag))
            elif tag in self._parts:
                kept[at] = False
                self._part_written(*self._parts[tag], tag // self._tag(1), rows[at], said.get(tag))
        return rows[kept]

    def _range_written(self, large: Large, slot: int, number: int, start_ns: int, answer: Any) -> None:
        """A range of a file; nobody else makes a completion of it."""
        if isinstance(answer, OSError):
            row, failure = completion_of(answer, Op.WRITE, large.wrote, time.monotonic_ns())
            self._part_written(large, number, slot, row, failure)
            return
        row = np.zeros((), COMPLETION_DTYPE)
        row["op"], row["attempts"], row["result"] = Op.WRITE, 1, large.span(number)[1]
        row["start_ns"] = row["attempt_ns"] = start_ns
        row["first_byte_ns"] = row["end_ns"] = time.monotonic_ns()
        self._part_written(large, number, slot, row, None)

    def _part_written(self, large: Large, number: int, slot: int, row: Any, failure: Failure | None) -> None:
        large.wrote[number] = row
        if row["kind"] == Kind.OK:
            large.written += 1
        else:
            large.fail("put", row, failure)
        self._let_go(large, slot)

    def _let_go(self, large: Large, slot: int) -> None:
        self._parts.pop(self._tag(slot))
        large.flying -= 1
        self._mover.release(slot)
        self._advance(large)

    # ---- its end ----

    def _advance(self, large: Large) -> None:
        if large.flying or large.begins or large.ended:
            return
        if large.failure is None and large.written == large.count:
            self._complete(large)
        elif large.failure is not None:
            large.ended = True
            if not large.upload_id:
                self._end(large)
                return
            abort = partial(large.target.abort, large.key, large.upload_id)
            self._mover.calls.make(abort, partial(self._was_aborted, large))

    def _complete(self, large: Large) -> None:
        mover = self._mover
        large.ended = True
        now_ns = time.monotonic_ns()
        crc = large.crc() if mover.how.verify != "no" else None
        text = ""
        if large.changed():
            text = "the object was replaced while it was read in parts"
            large.fail("get", failed_row(Op.READ, Kind.OTHER, -errno.ESTALE, now_ns), _failure(Kind.OTHER, text))
        elif crc is not None and large.source_crc not in (None, crc):
            text = f"CRC32C of what was read is {crc:08x}, and its store says {large.source_crc:08x}"
            row = failed_row(Op.READ, Kind.CHECKSUM, -errno.EBADMSG, now_ns)
            large.fail("get", row, _failure(Kind.CHECKSUM, text), damaged=True)
        if text:
            large.ended = False
            self._advance(large)
            return
        parts = large.parts(with_crc=crc is not None)

        def complete() -> ObjectInfo:
            large.target.complete(large.key, large.upload_id, parts)
            return mover.destination.store.stat(large.key)

        mover.calls.make(complete, partial(self._was_completed, large, crc))

    def _was_completed(self, large: Large, crc: int | None, answer: Any) -> None:
        mover, now_ns = self._mover, time.monotonic_ns()
        if isinstance(answer, OSError):
            row, failure = completion_of(answer, Op.WRITE, large.wrote, now_ns)
            large.fail("put", row, failure)
            large.ended = False
            self._advance(large)
            return
        said = crc_said(answer)
        if answer.nbytes != large.nbytes or (crc is not None and said not in (None, crc)):
            self._differs(
                large, f"the destination says {answer.nbytes} bytes, CRC32C {said}; read were {large.nbytes}, {crc}"
            )
        elif mover.how.verify == "read":
            self._begin_again(large, crc)
        else:
            self._arrived(large, crc, compared=said is not None and crc is not None)

    def _begin_again(self, large: Large, crc: int | None) -> None:
        tag, self._next_again = self._next_again, self._next_again + 1
        item: Any = np.zeros(1, TRANSFER_DTYPE)
        name = large.key.encode("utf-8", "surrogateescape")
        item["tag"], item["op"], item["memory"], item["key_nbytes"] = tag, Op.READ, Memory.DROP, len(name)
        item["nbytes"], item["object_nbytes"] = WHOLE, large.nbytes
        item["digest"], item["flags"], item["digest_value"] = Digest.CRC32C, _HAS_DIGEST, crc or 0
        self._again[tag] = large
        self._mover.destination.transfers.submit(item, name)

    def _read_again(self, large: Large, row: Any, failure: Failure | None) -> None:
        if row["kind"] == Kind.OK:
            self._arrived(large, int(row["digest_value"]), compared=True)
        elif row["kind"] in (Kind.CHECKSUM, Kind.LENGTH):
            self._differs(large, failure.message if failure is not None else "other bytes were read than were written")
        else:
            large.fail("put", row, failure)
            self._end(large)

    def _differs(self, large: Large, text: str) -> None:
        row = failed_row(Op.READ, Kind.CHECKSUM, -errno.EBADMSG, time.monotonic_ns())
        large.fail("put", row, _failure(Kind.CHECKSUM, text), damaged=True)
        self._mover.spoilt(large.key, large.nbytes)
        self._end(large)

    def _arrived(self, large: Large, crc: int | None, compared: bool) -> None:
        tally, now_ns = self._mover.tally, time.monotonic_ns()
        got = completion(Op.READ, large.read, large.nbytes, int(large.read["end_ns"].max()))
        put = completion(Op.WRITE, large.wrote, large.nbytes, now_ns)
        if large.source_crc is not None:
            got["flags"] |= _COMPARED
        if compared:
            put["flags"] |= _COMPARED
        tally.got(np.atleast_1d(got))
        tally.arrived(np.atleast_1d(put), large.nbytes if compared else 0, now_ns)
        mover = self._mover
        [version] = mover.proven.versions(mover.source.scheme, large.read["etag"][:1].tolist())
        mover.proven.add([large.key], [large.nbytes], [crc or 0], [version or large.version])
        self.under_way.discard(large)

    def _was_aborted(self, large: Large, answer: Any) -> None:
        if isinstance(answer, OSError):
            row, failure = completion_of(answer, Op.DELETE, large.wrote, time.monotonic_ns())
            text = f"its upload was left behind, for it could not be aborted: {failure.message}"
            self._mover.tally.note(row, failure._replace(message=text), large.key)
        self._end(large)

    def _end(self, large: Large) -> None:
        """It has failed, and nothing of it is left."""
        self.under_way.discard(large)
        assert large.failure is not None
        op, row, failure, damaged = large.failure
        tally, mover = self._mover.tally, self._mover
        if op == "put" and large.is_read:
            tally.got(np.atleast_1d(completion(Op.READ, large.read, large.nbytes, int(large.read["end_ns"].max()))))
        tally.fail(op, row, failure, large.key, bool(damaged))
        mover.fatal(op, row, failure, large.key)

    def abort_all(self) -> None:
        """Uploads that were begun are aborted as soon as nothing of them is under way; no new ones are begun."""
        self._queue.clear()
        for large in list(self.under_way):
            row = failed_row(Op.WRITE, Kind.CANCELLED, -errno.ECANCELED, time.monotonic_ns())
            large.fail("put", row, None)
            self._advance(large)

    def abort_rest(self) -> None:
        """Abort here and now the uploads of which an interrupt has lost track."""
        for upload_id, key in list(self._target.begun.items()) if self._target is not None else []:
            assert self._target is not None
            try:
                self._target.abort(key, upload_id)
            except OSError as error:
                row, failure = completion_of(error, Op.DELETE, np.zeros(0, COMPLETION_DTYPE), time.monotonic_ns())
                text = f"its upload was left behind, for it could not be aborted: {failure.message}"
                self._mover.tally.note(row, failure._replace(message=text), key)


def _failure(kind: Kind, text: str) -> Failure:
    return Failure(0, kind, 0, "", text)
