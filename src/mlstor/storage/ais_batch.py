"""GetBatch: many objects, or members of archives, or ranges of them, by one request; they come back as one TAR stream.

AIStore's api/apc/ml.go describes the request. A target assembles the answer and sends it as it does so: where it has to
give up in the middle it ends the answer early, with no error (xact/xs/moss.go: streamwi.asm). So an answer counts only
if it holds each member that was asked for, in its order, and the end that a TAR has.
"""

from __future__ import annotations

import errno
import json
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy

from mlstor._http import HttpEngine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import TracebackType

    import numpy.typing
    from typing_extensions import Self

    from mlstor.storage.ais_client import AisClient

# POSIX.1-1988 "ustar": blocks of 512 bytes; size at 124 as octal digits, kind of member at 156,
# magic at 257, and at 345 the beginning of a name that is too long for the 100 bytes at 0.
_BLOCK = 512
_SIZE_AT, _SIZE_END, _KIND_AT, _MAGIC_AT, _PREFIX_AT = 124, 136, 156, 257, 345
_REGULAR = (ord("0"), 0)
_EXTENDED, _GLOBAL, _LONG_NAME = ord("x"), ord("g"), ord("L")
_END = bytes(2 * _BLOCK)

#: Directory in which what is missing lies, as a member of no bytes (apc.MossMissingDir).
_MISSING = b"__404__/"


class Member(NamedTuple):
    """What is asked for: an object, or with `archpath` a member of an archive; or a range of either."""

    key: str
    archpath: str = ""
    offset: int = 0
    #: None: to its end
    nbytes: int | None = None


class Batch:
    """What a GetBatch brought, in the order of what was asked for. Times are ns on CLOCK_MONOTONIC."""

    def __init__(
        self,
        data: bytes,
        starts: numpy.typing.NDArray[numpy.uint64],
        sizes: numpy.typing.NDArray[numpy.uint64],
        missing: numpy.typing.NDArray[numpy.bool_],
        start_ns: int,
        end_ns: int,
    ) -> None:
        #: the whole TAR
        self.data = data
        #: where in it each member's bytes begin, and how many they are
        self.starts, self.sizes = starts, sizes
        #: those that the cluster hasn't got
        self.missing = missing
        self.start_ns, self.end_ns = start_ns, end_ns

    @property
    def nbytes(self) -> int:
        """Of the members, without the TAR around them."""
        return int(self.sizes.sum())

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> memoryview:
        """The bytes of a member, not copied."""
        start = int(self.starts[index])
        return memoryview(self.data)[start : start + int(self.sizes[index])]

    def __iter__(self) -> Iterator[memoryview]:
        return (self[index] for index in range(len(self)))


class BatchReader:
    """GetBatch requests to one bucket, from any thread, each call one request. Made by `AisStore.batches`.

    Parameters
    ----------
    client
        Says bucket and cluster.
    key_prefix
        Goes before each key.
    workers, in_flight
        Threads of the engine, and requests under way on each.
    tries
        Attempts per request.
    """

    def __init__(
        self, client: AisClient, key_prefix: str, workers: int = 1, in_flight: int = 8, tries: int = 5
    ) -> None:
        self._client = client
        self._key_prefix = key_prefix
        self._engine = HttpEngine(workers, in_flight, tries=tries, **client.tls)
        self._proxy = client.add(self._engine, client.endpoint, follow=True)

    def get(
        self, members: Sequence[Member | str], *, missing_ok: bool = False, colocated: int = 0, timeout_s: float = 300.0
    ) -> Batch:
        """Read `members` (keys, or `Member`) by one request.

        Parameters
        ----------
        members
            At least one.
        missing_ok
            Go on without those that aren't there, and mark them; a cluster allows 8 of them unless its
            ``get_batch.max_soft_errs`` says otherwise.
        colocated
            0: the members lie anywhere; 1: on few targets, which the proxy then looks for; 2: in few archives, too.
        timeout_s
            For the whole request.

        Raises
        ------
        FileNotFoundError
            If a member is marked as missing, and that isn't `missing_ok`.
        OSError
            EIO if the answer ended early, which it mostly does where a member is missing and that isn't `missing_ok`.
        """
        asked = [Member(member) if isinstance(member, str) else member for member in members]
        request = {
            "in": [self._entry(member) for member in asked],
            "mime": ".tar",
            "coer": missing_ok,
            "onob": True,
            "strm": True,
            "coloc": colocated,
        }
        query = [self._client.query, f"coloc={colocated}" if colocated else ""]
        start_ns = time.monotonic_ns()
        answer = self._client.call(
            "GET",
            f"v1/ml/moss/{self._client.bucket}",
            "&".join(sorted(filter(None, query))),
            body=json.dumps(request).encode(),
            timeout_s=timeout_s,
            engine=self._engine,
            endpoint=self._proxy,
        )
        end_ns = time.monotonic_ns()
        try:
            starts, sizes, missing = walk(answer.body, len(asked))
        except ValueError as error:
            text = f"GetBatch gave {error}; is a member missing?"
            if missing_ok:
                text = f"GetBatch gave {error}; are more missing than the cluster's get_batch.max_soft_errs allows?"
            raise OSError(errno.EIO, text, answer.url) from None
        if missing.any() and not missing_ok:  # AIStore 5.0 was seen to give all members all the same
            key = asked[int(missing.argmax())].key
            raise FileNotFoundError(errno.ENOENT, f"GetBatch found {missing.sum()} of {len(asked)} missing", key)
        return Batch(answer.body, starts, sizes, missing, start_ns, end_ns)

    def _entry(self, member: Member) -> dict[str, Any]:
        entry: dict[str, Any] = {"objname": self._key_prefix + member.key}
        if member.archpath:
            entry["archpath"] = member.archpath
        if member.offset or member.nbytes is not None:
            entry["start"] = member.offset
            entry["length"] = -1 if member.nbytes is None else member.nbytes
        return entry

    def close(self) -> None:
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def walk(
    data: bytes, count: int
) -> tuple[numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.uint64], numpy.typing.NDArray[numpy.bool_]]:
    """Where the `count` members of a TAR begin, their sizes, and which of them are missing.

    Long and non-ASCII names come in extra blocks ("x", "L"), which are only looked at for ``__404__``.

    Raises
    ------
    ValueError
        If it has another number of members, ends early, or is no TAR.
    """
    starts: list[int] = []
    sizes: list[int] = []
    missing: list[bool] = []
    at, nbytes = 0, len(data)
    extra = b""
    while at + _BLOCK <= nbytes:
        if not data[at]:
            if data[at : at + len(_END)] != _END:
                raise ValueError(f"no TAR at byte {at}" if at + len(_END) <= nbytes else "a TAR without its end")
            if len(sizes) != count:
                raise ValueError(f"{len(sizes)} members of {count}")
            return (
                numpy.array(starts, numpy.uint64),
                numpy.array(sizes, numpy.uint64),
                numpy.array(missing, numpy.bool_),
            )
        size, kind = _size(data, at), data[at + _KIND_AT]
        body = at + _BLOCK
        at = body + -(-size // _BLOCK) * _BLOCK
        if kind in _REGULAR:
            starts.append(body)
            sizes.append(size)
            missing.append(size == 0 and (extra or _name(data, body - _BLOCK)).startswith(_MISSING))
            extra = b""
        elif kind == _EXTENDED:
            extra = _path_of(data[body : body + size])
        elif kind == _LONG_NAME:
            extra = data[body : body + size]
        elif kind != _GLOBAL:
            raise ValueError(f"a member of an unknown kind {kind} at byte {body - _BLOCK}")
    raise ValueError(f"a TAR that ends after {len(sizes)} members of {count}")


def _name(data: bytes, at: int) -> bytes:
    """How the name in a header begins; a long one begins in the prefix, which only POSIX has."""
    if data[at + _MAGIC_AT : at + _PREFIX_AT].startswith(b"ustar\0") and data[at + _PREFIX_AT]:
        return data[at + _PREFIX_AT : at + _BLOCK]
    return data[at : at + _BLOCK]


def _size(data: bytes, at: int) -> int:
    field = data[at + _SIZE_AT : at + _SIZE_END]
    if field[0] & 0x80:  # base 256, beyond 8 GiB
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.rstrip(b" \0") or b"0", 8)
    except ValueError:
        raise ValueError(f"no TAR at byte {at}") from None


def _path_of(records: bytes) -> bytes:
    """The name in an extended header's records, each "LENGTH KEY=VALUE\\n"."""
    at = 0
    while at < len(records):
        digits, _, _ = records[at : at + 20].partition(b" ")
        length = int(digits)
        key, _, value = records[at + len(digits) + 1 : at + length - 1].partition(b"=")
        if key == b"path":
            return value
        at += max(length, 1)
    return b""
