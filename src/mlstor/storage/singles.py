"""One object at a time, on top of `Transfers`: what `read`, `write` and `delete` of a store are made of."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Any

import numpy

from mlstor.storage.transfers import COMPLETION_DTYPE, TRANSFER_DTYPE, WHOLE, Digest, Failure, Kind, Memory, Op, zeros

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from mlstor.storage.transfers import Transfers

_DELETE_AT_ONCE = 1000

#: The errno of a transfer that failed otherwise than by the server's refusal.
ERRNO = {
    Kind.CONNECT: errno.ECONNREFUSED,
    Kind.RESET: errno.ECONNRESET,
    Kind.STALLED: errno.ETIMEDOUT,
    Kind.SHORT: errno.EIO,
    Kind.LENGTH: errno.EIO,
    Kind.CHECKSUM: errno.EBADMSG,
    Kind.REDIRECT: errno.ELOOP,
    Kind.CANCELLED: errno.ECANCELED,
    Kind.TLS: errno.EPROTO,
    Kind.RESOLVE: errno.EHOSTUNREACH,
}


class Singles:
    """Any thread may call it; one call is carried out at a time.

    Parameters
    ----------
    make
        Makes the transfers, when they are first needed.
    error
        The `OSError` of a failure.
    """

    def __init__(self, make: Callable[[], Transfers], error: Callable[[Failure], OSError]) -> None:
        self._make = make
        self._error = error
        self._lock = threading.Lock()
        self._transfers: Transfers | None = None

    def read(
        self,
        key: str,
        into: Buffer,
        offset: int = 0,
        nbytes: int = WHOLE,
        object_nbytes: int = WHOLE,
        digest: Digest = Digest.NONE,
    ) -> int:
        """Read into a writable buffer; returns how many bytes came.

        Raises
        ------
        OSError
            Also if there is more than the buffer holds, or the object has not `object_nbytes`.
        """
        return self._one(
            Op.READ,
            key,
            into,
            offset=offset,
            nbytes=nbytes,
            object_nbytes=object_nbytes,
            room=memoryview(into).nbytes,
            digest=digest,
        )

    def write(self, key: str, source: Buffer, digest: Digest = Digest.NONE) -> None:
        """Write an object; its checksum is sent with it if `digest` says which."""
        self._one(Op.WRITE, key, source, nbytes=memoryview(source).nbytes, object_nbytes=WHOLE, digest=digest)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects, many at once; what isn't there is no error."""
        chunk: list[str] = []
        for key in keys:
            chunk.append(key)
            if len(chunk) == _DELETE_AT_ONCE:
                self._delete(chunk)
                chunk = []
        if chunk:
            self._delete(chunk)

    def close(self) -> None:
        if self._transfers is not None:
            self._transfers.close()

    def _delete(self, keys: Sequence[str]) -> None:
        batch = zeros(len(keys), TRANSFER_DTYPE)
        names = [key.encode() for key in keys]
        batch["key_nbytes"] = [len(name) for name in names]
        batch["key_start"] = numpy.cumsum(batch["key_nbytes"]) - batch["key_nbytes"]
        batch["op"] = Op.DELETE
        batch["tag"] = numpy.arange(len(keys))
        _, failures = self._run(batch, b"".join(names), None)
        for failure in failures:
            if failure.kind != Kind.HTTP or failure.status != 404:
                raise self._error(failure)

    def _one(self, op: Op, key: str, buffer: Buffer, **fields: int) -> int:
        name = key.encode()
        batch = zeros(1, TRANSFER_DTYPE)
        batch["op"], batch["key_nbytes"], batch["memory"] = op, len(name), Memory.BUFFER
        for field, value in fields.items():
            batch[field] = value
        done, failures = self._run(batch, name, buffer)
        if done["kind"][0] != Kind.OK:
            kind = Kind(int(done["kind"][0]))
            raise self._error(failures[0] if failures else Failure(0, kind, int(done["status"][0]), key, kind.name))
        return int(done["result"][0])

    def _run(self, batch: Any, names: bytes, buffer: Buffer | None) -> tuple[Any, list[Failure]]:
        done = zeros(len(batch), COMPLETION_DTYPE)
        with self._lock:
            if self._transfers is None:
                self._transfers = self._make()
            try:
                self._transfers.submit(batch, names, buffer)
                count = 0
                while count < len(batch):
                    count += self._transfers.reap(done[count:], len(batch) - count)
                return done, self._transfers.failures()
            except BaseException:
                # what is still under way must not come back to the next call
                transfers, self._transfers = self._transfers, None
                transfers.close()
                raise
