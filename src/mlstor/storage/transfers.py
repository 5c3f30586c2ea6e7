"""Many transfers at once: arrays of what is asked in, arrays of what became of it out.

One Python object per operation costs 25 us, so that the loops that matter hand over arrays. Every store has this
interface; single reads and writes are thin layers on top of it.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor._io import Pattern

WHOLE = 2**64 - 1
"""As ``nbytes`` of a READ: the object to its end. As ``object_nbytes``: not known."""


IN_PARTS = 2
"""In ``flags`` of a READ or WRITE: in parts of ``room`` bytes, a multiple of 4096, whatever its size; where the store
has parts, and not of or into a buffer.
"""


class Op(IntEnum):
    """What is done with an object."""

    READ = 0
    WRITE = 1
    STAT = 2
    DELETE = 3


class Memory(IntEnum):
    """Where the bytes of a READ go and those of a WRITE come from."""

    #: read and dropped
    DROP = 0
    #: at ``place`` of the buffer given to `submit`
    BUFFER = 1
    #: compared with, or made by, the pattern given to `submit`, with ``place`` as its file id
    PATTERN = 2


class Digest(IntEnum):
    """A checksum computed in the worker while the bytes are hot."""

    NONE = 0
    CRC32C = 1
    XXH64 = 2
    #: zlib's; computed and combined, neither sent to a store nor compared with what one has
    CRC32 = 3


class Kind(IntEnum):
    """How a transfer ended."""

    OK = 0
    #: ``result`` is -errno
    SYSTEM = 1
    #: ``status`` is a refusal by the server
    HTTP = 2
    CONNECT = 3
    RESET = 4
    #: nothing moved for the stall timeout
    STALLED = 5
    #: the body ended before its length
    SHORT = 6
    #: the object has another length than `object_nbytes` said, or than there is room for
    LENGTH = 7
    CHECKSUM = 8
    #: a redirect loop, or a redirect that can't be followed
    REDIRECT = 9
    CANCELLED = 10
    TLS = 11
    RESOLVE = 12
    OTHER = 13


#: Fields of what is handed to `Transfers.submit`; csrc/transfer.h has the same as a C structure (96 bytes).
#: Sizes in bytes. Keys and queries lie in `names` as UTF-8, keys unescaped, queries in canonical form.
#: WRITE: nbytes of the body; offset is that of the body in the pattern. READ: offset and nbytes are the range.
#: object_nbytes is what the catalog says (WHOLE: not known). room: bytes there are at `place`. not_before_ns:
#: intended start on CLOCK_MONOTONIC, 0: at once. digest_value: of a WRITE the checksum that is sent if `flags` has 1,
#: of a READ the one that must result if `flags` has 1, of a STAT the one that the store must have, if it has one of
#: that type.
TRANSFER_DTYPE = [
    ("tag", "<u8"),
    ("key_start", "<u8"),
    ("query_start", "<u8"),
    ("key_nbytes", "<u4"),
    ("query_nbytes", "<u4"),
    ("offset", "<u8"),
    ("nbytes", "<u8"),
    ("object_nbytes", "<u8"),
    ("place", "<u8"),
    ("room", "<u8"),
    ("not_before_ns", "<u8"),
    ("digest_value", "<u8"),
    ("endpoint", "<u4"),
    ("op", "u1"),
    ("memory", "u1"),
    ("digest", "u1"),
    ("flags", "u1"),
]

#: Fields of what `Transfers.reap` gives back (176 bytes). result: bytes moved, or -errno. Times on CLOCK_MONOTONIC:
#: submitted; first attempt begun, its payload ready; last attempt begun; first byte of the last attempt's answer; end.
#: redirect_ns: duration of the last attempt's way by a proxy, 0 if there was none. object_nbytes: as the store says.
#: digest_value: as computed. endpoint: who served it. attempts: 1 if there was no retry. flags: 1 a new connection was
#: made, 2 a checksum of the store was compared. first_kind: of the first attempt that failed (OK if none did).
COMPLETION_DTYPE = [
    ("tag", "<u8"),
    ("result", "<i8"),
    ("submit_ns", "<u8"),
    ("start_ns", "<u8"),
    ("attempt_ns", "<u8"),
    ("redirect_ns", "<u8"),
    ("first_byte_ns", "<u8"),
    ("end_ns", "<u8"),
    ("object_nbytes", "<u8"),
    ("digest_value", "<u8"),
    ("etag", "S72"),
    ("damaged_blocks", "<u4"),
    ("endpoint", "<u4"),
    ("status", "<u2"),
    ("attempts", "<u2"),
    ("op", "u1"),
    ("kind", "u1"),
    ("first_kind", "u1"),
    ("flags", "u1"),
    ("first_status", "<u2"),
    ("reserved", "V6"),
]


class Failure(NamedTuple):
    """What is to be said of a transfer that failed, at its last attempt; never holds a secret."""

    tag: int
    kind: Kind
    status: int
    #: of the object, without credentials or signature
    url: str
    #: of the server's answer (an S3 error code, AIStore's message), or the transport's error
    message: str


class TransferCounters(NamedTuple):
    """What the workers did since they were made. Only ever grows."""

    received_bytes: int
    sent_bytes: int
    connections: int
    requests: int
    retries: int
    #: ns of all workers: working, and waiting for the store
    busy_ns: int
    wait_ns: int


class Transfers(Protocol):
    """Transfers on their way. One thread at a time submits and reaps; an instance does not outlive a fork."""

    @property
    def outstanding(self) -> int:
        """Transfers that were submitted and not yet reaped."""

    def submit(
        self, transfers: Buffer, names: Buffer, buffer: Buffer | None = None, pattern: Pattern | None = None
    ) -> int:
        """Take an array of TRANSFER_DTYPE; returns how many. `names` and `buffer` are held until all are done.

        Raises
        ------
        ValueError
            If a transfer lies outside `names` or `buffer`; then none was taken.
        """

    def reap(self, out: Buffer, min_done: int = 1, timeout_s: float | None = None) -> int:
        """Fill `out`, an array of COMPLETION_DTYPE; returns how many. Waits for `min_done`, or as many as are
        outstanding. Ctrl-C cancels what has not begun, and raises KeyboardInterrupt.
        """

    def failures(self) -> list[Failure]:
        """Of the failures since the last call the first 256."""

    def cancel(self) -> None:
        """What has not begun, and what waits for a retry, comes back as CANCELLED."""

    def counters(self) -> TransferCounters: ...

    def close(self) -> None: ...


def zeros(count: int, dtype: list[Any]) -> Any:
    """A numpy array of `count` records; numpy is imported here, when it is first needed."""
    import numpy

    return numpy.zeros(count, dtype)
