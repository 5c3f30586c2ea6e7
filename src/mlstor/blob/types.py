"""What a blob is asked and what it answers. A blob is a file or an object of a store."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Fields of an array of pieces: `nbytes` bytes at `offset` of the blob lie at `address` in memory. Pieces with the same
#: `group` are digested as one sequence, in the order of the array; group -1: no digest. Address 0 in a fetch: the bytes
#: are read and dropped.
PIECE_DTYPE = [("offset", "<u8"), ("nbytes", "<u8"), ("address", "<u8"), ("group", "<i8")]

#: How often a blob is read that others replace.
_ATTEMPTS = 5

DigestKind = Literal["crc32", "crc32c", "crc32+crc32c"]
"""crc32 is zlib's; both are in one value of 64 bits: CRC32C in the upper half, CRC-32 in the lower."""


class LatePiece(NamedTuple):
    """Bytes that are known only when all digests are, as an archive's headers and its directory."""

    offset: int
    nbytes: int
    #: called once with ``{group: digest}`` of all groups, in any thread; returns exactly `nbytes` bytes
    make: Callable[[Mapping[int, int]], bytes]


class Published(NamedTuple):
    """What a publication did. Times in ns on CLOCK_MONOTONIC; a byte is counted as zero-copy or as staged."""

    name: str
    nbytes: int
    digests: dict[int, int]
    etag: str
    start_ns: int
    end_ns: int
    zero_copy_bytes: int
    staged_bytes: int
    #: yes, no or unverified, as of an engine's result; "no" for objects
    direct: str


class Fetched(NamedTuple):
    """What a fetch did; as `Published`. `nbytes` are those of the pieces."""

    name: str
    nbytes: int
    digests: dict[int, int]
    etag: str
    start_ns: int
    end_ns: int
    zero_copy_bytes: int
    staged_bytes: int
    direct: str


class BlobInfo(NamedTuple):
    """Size, and what changes when the content does: of a file, device, inode, time of change and size."""

    nbytes: int
    etag: str


class Blob(Protocol):
    """One file or object, which need not exist. Any thread may call it; it pickles, and works again after a fork.

    Errors of the storage are `OSError` with errno and name.
    """

    #: as in messages: path or URL, without credentials
    name: str

    def stat(self) -> BlobInfo:
        """Size and ETag; ENOENT if it isn't there."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """A short stretch; ENODATA if the blob ends before it does."""

    def publish(
        self,
        nbytes: int,
        pieces: NDArray[Any],
        late: Sequence[LatePiece] = (),
        *,
        digest: DigestKind = "crc32",
        keep: object = None,
        max_bandwidth: int = 0,
        block_bytes: int = 0,
        cancel: threading.Event | None = None,
    ) -> Published:
        """Make or replace the blob by `pieces`; it shows whole and durable, or not at all.

        Parameters
        ----------
        nbytes
            Size of the blob. What no piece covers is zeros.
        pieces
            An array of `PIECE_DTYPE`; they don't overlap.
        late
            Bytes that depend on the digests.
        digest
            Of the groups.
        keep
            Held until the memory of the pieces is not used any more, also after Ctrl-C.
        max_bandwidth
            Bytes per second; 0: no limit.
        block_bytes
            Of one write to a file; 0: the engine's choice. Objects have parts instead.
        cancel
            Once set, nothing more is begun, and OSError ECANCELED is raised.

        Raises
        ------
        OSError
            The old blob, if there was one, is as it was, and nothing else is left.
        ValueError
            For pieces that overlap or lie outside.
        """

    def fetch(
        self, pieces: NDArray[Any], *, digest: DigestKind = "crc32", keep: object = None, etag: str = ""
    ) -> Fetched:
        """Fill the memory of `pieces`, an array of `PIECE_DTYPE`; they may lie in any order, but don't overlap.

        Raises
        ------
        OSError
            ENODATA if the blob ends before a piece does; ESTALE if it is not the one that `etag` says, or was
            replaced meanwhile.
        """

    def delete(self) -> None:
        """Remove it; one that isn't there is no error."""


class BlobDirectory(Protocol):
    """A directory, or what is under a prefix of a store. Pickles, as blobs do."""

    name: str

    def blob(self, relative: str) -> Blob:
        """The one of that name in it, which need not exist."""

    def names(self) -> list[str]:
        """Of the blobs directly in it, sorted; leftovers of killed writers are among them. Empty if it is missing."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove blobs, durably; one that isn't there is no error."""

    def make(self) -> None:
        """Make the directory and those above it, durably; one that is there is no error. Stores need none."""


def require_same(blob: Blob, etag: str) -> None:
    """Compare a blob with what it was: what looks damaged may be half of one file and half of another.

    Raises
    ------
    OSError
        ESTALE if it was replaced since it had `etag`.
    """
    if blob.stat().etag != etag:
        raise OSError(errno.ESTALE, "it was replaced while it was read: read it again", blob.name)


def read_all(blob: Blob) -> bytes:
    """The content of a small blob, all of one moment: read again where it is replaced meanwhile.

    Raises
    ------
    OSError
        As from `Blob.read`; ESTALE if it is replaced again and again.
    """
    for _ in range(_ATTEMPTS):
        info = blob.stat()
        try:
            content = blob.read(0, info.nbytes)
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ESTALE) or blob.stat().etag == info.etag:
                raise
            continue
        if blob.stat().etag == info.etag:
            return content
    raise OSError(errno.ESTALE, f"it was replaced while it was read, {_ATTEMPTS} times", blob.name)


def make_pieces(rows: Sequence[tuple[int, int, int, int]] | int) -> NDArray[Any]:
    """An array of pieces from tuples (offset, nbytes, address, group), or of that many zeros."""
    import numpy as np

    return np.zeros(rows, PIECE_DTYPE) if isinstance(rows, int) else np.array(rows, PIECE_DTYPE)
