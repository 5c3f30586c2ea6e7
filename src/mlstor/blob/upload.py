"""A blob to an object: one PUT, or parts of which most are sent straight from the caller's memory."""

from __future__ import annotations

import errno
import threading
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlstor.blob.compose import Composition, group_digests, make_late
from mlstor.blob.pieces import checked
from mlstor.blob.types import DigestKind, LatePiece, Published
from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Digest, Kind, Memory, Op, zeros
from mlstor.storage.uploads import Part
from mlstor.stream.failures import failed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor._io import AlignedBuffer
    from mlstor.blob.channel import Channel
    from mlstor.storage.transfers import Transfers
    from mlstor.storage.uploads import Uploads

#: Up to here one PUT; larger ones in parts of that size, or as large as the store's number of parts asks for.
PART_BYTES = 16 << 20
_MIB = 1 << 20
#: Parts in flight, and the memory of those that had to be copied together.
_AT_ONCE = 16
_GATHERED_BYTES = 128 << 20
#: How often a wait looks whether it was cancelled, s.
_LOOK_S = 0.05


def upload(
    channel: Channel,
    key: str,
    name: str,
    nbytes: int,
    pieces: NDArray[Any],
    late: Sequence[LatePiece],
    *,
    digest: DigestKind,
    keep: object,
    max_bandwidth: int,
    cancel: threading.Event | None,
) -> Published:
    """See `types.Blob.publish`. An object can't be patched: digests come first, then late pieces, then all is sent."""
    start_ns = time.monotonic_ns()
    pieces = checked(pieces, name, nbytes, late)
    digests = group_digests(pieces, digest)
    whole = Composition(nbytes, pieces, make_late(late, digests), keep)
    sender = _Sender(channel, key, name, whole, max_bandwidth, cancel)
    uploads = channel.uploads() if nbytes > PART_BYTES else None
    etag = sender.in_parts(uploads) if uploads else sender.at_once()
    if max_bandwidth:
        sender.rest_until(start_ns + nbytes * 10**9 // max_bandwidth)
    return Published(
        name,
        nbytes,
        digests,
        etag or channel.stat(key).etag,
        start_ns,
        time.monotonic_ns(),
        nbytes - sender.gathered_bytes,
        sender.gathered_bytes,
        "no",
    )


class _Sender:
    def __init__(
        self,
        channel: Channel,
        key: str,
        name: str,
        whole: Composition,
        max_bandwidth: int,
        cancel: threading.Event | None,
    ) -> None:
        self._channel, self._key, self._name, self._whole = channel, key, name, whole
        self._max_bandwidth, self._cancel = max_bandwidth, cancel
        self.gathered_bytes = 0

    def at_once(self) -> str:
        """One PUT; the object's ETag."""
        nbytes = self._whole.nbytes
        item = self._item(self._channel.digest() if nbytes else Digest.NONE)
        memory: Any = self._whole.straight(0, nbytes)
        if memory is None:
            memory = self._gather(0, nbytes)
        item["nbytes"] = nbytes
        with self._channel.lease() as transfers:
            transfers.submit(item, self._key.encode(), memory)
            return str(self._reap(transfers)["etag"].decode())

    def in_parts(self, uploads: Uploads) -> str:
        """A multipart upload, which is aborted if anything goes wrong; the object's ETag, "" if it isn't told."""
        upload_id = uploads.begin(self._key, Digest.CRC32C)
        try:
            with self._channel.lease() as transfers:
                parts = self._send(transfers, uploads, upload_id)
            self._look()
            return uploads.complete(self._key, upload_id, parts)
        except BaseException:
            try:
                uploads.abort(self._key, upload_id)
            except OSError as error:
                warnings.warn(
                    f"{self._name}: a multipart upload was left behind: {error}", RuntimeWarning, stacklevel=2
                )
            raise

    def _send(self, transfers: Transfers, uploads: Uploads, upload_id: str) -> list[Part]:
        nbytes = self._whole.nbytes
        part_bytes = max(PART_BYTES, -(-nbytes // (uploads.most_parts * _MIB)) * _MIB)
        starts = range(0, nbytes, part_bytes)
        slots: list[AlignedBuffer | None] = [None] * max(2, min(_AT_ONCE, _GATHERED_BYTES // part_bytes))
        flying: dict[int, AlignedBuffer | None] = {}
        parts: list[Part | None] = [None] * len(starts)
        start_ns, at = time.monotonic_ns(), 0
        while at < len(starts) or flying:
            while at < len(starts) and len(flying) < _AT_ONCE:
                offset, size = starts[at], min(part_bytes, nbytes - starts[at])
                memory: Any = self._whole.straight(offset, size)
                slot: AlignedBuffer | None = None
                if memory is None:
                    if not slots:
                        break
                    slot = self._gather(offset, size, slots.pop() or _buffer(part_bytes))
                    memory = slot
                item, names = self._item(Digest.CRC32C), self._key.encode()
                query = uploads.query(upload_id, at + 1).encode()
                item["tag"], item["nbytes"] = at, size
                item["query_start"], item["query_nbytes"] = len(names), len(query)
                if self._max_bandwidth:
                    item["not_before_ns"] = start_ns + offset * 10**9 // self._max_bandwidth
                transfers.submit(item, names + query, memory)
                flying[at] = slot
                at += 1
            row = self._reap(transfers)
            number = int(row["tag"])
            size = min(part_bytes, nbytes - starts[number])
            parts[number] = Part(number + 1, size, row["etag"].decode(), int(row["digest_value"]))
            used = flying.pop(number)
            if used is not None:
                slots.append(used)
        return [part for part in parts if part is not None]

    def _item(self, digest: Digest) -> Any:
        item = zeros(1, TRANSFER_DTYPE)
        item["op"], item["memory"], item["digest"] = Op.WRITE, Memory.BUFFER, digest
        item["key_nbytes"], item["object_nbytes"] = len(self._key.encode()), WHOLE
        return item

    def _gather(self, offset: int, nbytes: int, into: AlignedBuffer | None = None) -> AlignedBuffer:
        memory = into or _buffer(max(1, nbytes))
        self._whole.gather(offset, nbytes, memory.address)
        self.gathered_bytes += nbytes
        return memory

    def rest_until(self, end_ns: int) -> None:
        """What goes at once (an object of one part, the last part of others) may be faster than the limit: what comes
        after it is not begun before its time.
        """
        while (left_ns := end_ns - time.monotonic_ns()) > 0:
            if self._cancel is None:
                time.sleep(left_ns / 1e9)
            elif self._cancel.wait(left_ns / 1e9):
                return  # it is complete all the same

    def _look(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise OSError(errno.ECANCELED, "it was cancelled before it was complete", self._name)

    def _reap(self, transfers: Transfers) -> Any:
        """The next completion, which is a good one."""
        done = zeros(1, COMPLETION_DTYPE)
        while True:
            self._look()
            if transfers.reap(done, 1, None if self._cancel is None else _LOOK_S):
                break
        if done["kind"][0] != Kind.OK:
            raise failed(transfers, done[0], self._name)
        return done[0]


def _buffer(nbytes: int) -> AlignedBuffer:
    from mlstor._io import AlignedBuffer

    return AlignedBuffer(nbytes)
