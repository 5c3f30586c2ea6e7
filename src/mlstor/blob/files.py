"""Files as blobs, on the native engine: zero-copy where memory and offset agree modulo the direct I/O alignment."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlstor.blob.gather import STRAIGHT_BYTES, Batch, Small
from mlstor.blob.memory import Window
from mlstor.blob.pieces import by_group, checked, joined
from mlstor.blob.types import BlobInfo, DigestKind, Fetched, LatePiece, Published
from mlstor.operations import DURABLE, Extent, Late, ReadFile, WriteFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mlstor._io import AlignedBuffer, Engine, Request
    from mlstor.operations import Result

#: Small pieces so close together are read at once: less than 50 us of a fast device's time lie between them.
_GAP_BYTES = 64 << 10
#: Of each of the two buffers that they are read into.
_SCRATCH_BYTES = 32 << 20
#: How often a wait looks whether it was cancelled, s.
_LOOK_S = 0.05


class FileBlob:
    """See `types.Blob`. The directory must exist.

    Parameters
    ----------
    path
    engine
        By default, and in a child process, the process's own.
    """

    def __init__(self, path: str | os.PathLike[str], engine: Engine | None = None) -> None:
        self.name = os.fsdecode(path)
        self._engine = engine
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<FileBlob {self.name}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return FileBlob, (self.name,)

    def _here(self) -> Engine:
        """An engine that is given is the parent's in a child process, which can't use it."""
        from mlstor._io import default_engine

        return self._engine if self._engine is not None and self._pid == os.getpid() else default_engine()

    def stat(self) -> BlobInfo:
        found = os.stat(self.name)
        return BlobInfo(found.st_size, f"{found.st_dev}-{found.st_ino}-{found.st_mtime_ns}-{found.st_size}")

    def read(self, offset: int, nbytes: int) -> bytes:
        # By the engine, past the page cache: pages that a plain read leaves would be taken for those of a direct one.
        memory = bytearray(nbytes)
        if nbytes:
            self._here().submit([ReadFile(self.name, [Extent(offset, nbytes, memory)])])[0].wait()
        return bytes(memory)

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
        target = _target(self.name)
        pieces = joined(checked(pieces, self.name, nbytes, late))
        extents = _extents(pieces, Window(pieces, keep), digest)
        extents += [Extent(piece.offset, piece.nbytes, Late(piece.make)) for piece in late if piece.nbytes]
        operation = WriteFile(
            target, extents, DURABLE, nbytes=nbytes, block_bytes=block_bytes, bytes_per_s=max_bandwidth
        )
        result = waited(self._here().submit([operation])[0], cancel)
        return Published(
            self.name,
            nbytes,
            result.digests,
            self.stat().etag,
            result.start_ns,
            result.end_ns,
            result.zero_copy_bytes,
            result.staged_bytes,
            result.direct,
        )

    def fetch(
        self, pieces: NDArray[Any], *, digest: DigestKind = "crc32", keep: object = None, etag: str = ""
    ) -> Fetched:
        start_ns = time.monotonic_ns()
        before = self.stat()
        self._compare(etag or before.etag, before.etag)
        pieces = checked(pieces, self.name)
        reads = _Reads(self.name, self._here(), pieces, digest, keep, before.nbytes)
        try:
            reads.run()
        except OSError as error:
            if error.errno == errno.ENODATA:  # short, or replaced by a shorter one
                self._compare(before.etag, self.stat().etag)
            raise
        # The file was opened between the two looks: by its path, which may have been given to another.
        self._compare(before.etag, self.stat().etag)
        nbytes = int(pieces["nbytes"].sum())
        return Fetched(
            self.name,
            nbytes,
            by_group(pieces, reads.values, digest),
            before.etag,
            start_ns,
            time.monotonic_ns(),
            reads.zero_copy_bytes,
            nbytes - reads.zero_copy_bytes,
            reads.direct,
        )

    def delete(self) -> None:
        try:
            os.unlink(self.name)
        except FileNotFoundError:
            return
        sync_directory(os.path.dirname(self.name) or ".")

    def _compare(self, wanted: str, found: str) -> None:
        if wanted != found:
            raise OSError(errno.ESTALE, "the file changed while it was read: read it again", self.name)


def _target(path: str) -> str:
    """The file that is replaced: where a link leads, as `open` has it."""
    return os.path.realpath(path) if os.path.islink(path) else path


class _Reads:
    """One fetch: large pieces straight to their places, small ones by way of two scratch buffers.

    Attributes
    ----------
    values : array of uint64
        The pieces' digests.
    """

    def __init__(
        self, name: str, engine: Engine, pieces: NDArray[Any], digest: DigestKind, keep: object, nbytes: int
    ) -> None:
        import numpy as np

        self._name, self._engine, self._digest = name, engine, digest
        self.values: NDArray[Any] = np.zeros(len(pieces), "<u8")
        self._small = Small(pieces, pieces["nbytes"] < STRAIGHT_BYTES)
        self._batches = self._small.batches(
            nbytes, gap_bytes=_GAP_BYTES, run_bytes=_SCRATCH_BYTES, batch_bytes=_SCRATCH_BYTES, align=True
        )
        large = pieces.copy()
        large["group"] = np.where(pieces["group"] >= 0, np.arange(len(pieces)), -1)
        large = large[pieces["nbytes"] >= STRAIGHT_BYTES]
        large = joined(large[np.argsort(large["offset"], kind="stable")])
        self._straight = _extents(large, Window(large, keep), digest)
        self._flying: deque[tuple[Batch, AlignedBuffer, Request]] = deque()
        self.zero_copy_bytes = 0
        self._ways: set[str] = set()

    @property
    def direct(self) -> str:
        """As of an engine's result; no if any read went through the page cache."""
        return next((way for way in ("no", "unverified", "yes") if way in self._ways), "unverified")

    def run(self) -> None:
        straight: Request | None = None
        try:
            # The small ones first: they are copied while the large ones come.
            self._begin()
            self._begin()
            if self._straight:
                straight = self._engine.submit([ReadFile(self._name, self._straight)])[0]
            while self._flying:
                batch, scratch, request = self._flying[0]
                self._ways.add(request.wait().direct)
                self._flying.popleft()
                batch.scatter(self._small, scratch, self._digest, self.values)
                self._begin()
            if straight:
                result = straight.wait()
                self._ways.add(result.direct)
                self.zero_copy_bytes += result.zero_copy_bytes
                for number, value in result.digests.items():
                    self.values[number] = value
        except BaseException as error:
            left = [request for _, _, request in self._flying] + ([straight] if straight else [])
            end_all(left, wait=isinstance(error, Exception))
            raise

    def _begin(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            return
        scratch = batch.scratch()
        memory = memoryview(scratch)
        extents = [Extent(offset, nbytes, memory[place : place + nbytes]) for offset, nbytes, place in batch.runs]
        self._flying.append((batch, scratch, self._engine.submit([ReadFile(self._name, extents)])[0]))


def end_all(requests: Sequence[Request], wait: bool) -> None:
    """Submit nothing more of them, and wait until nothing is in flight, so that their memory is the caller's again.
    After Ctrl-C there is no waiting: the engine holds the memory until it is done.
    """
    for request in requests:
        request.cancel()
    for request in requests if wait else ():
        with contextlib.suppress(OSError):  # what ended the fetch is raised; these were cancelled for it
            request.wait()


def waited(request: Request, cancel: threading.Event | None = None) -> Result:
    """The result; once `cancel` is set, OSError ECANCELED unless it was done before."""
    if cancel is None:
        return request.wait()
    while not request.done:
        if cancel.is_set():
            request.cancel()
            break
        try:
            return request.wait(_LOOK_S)
        except TimeoutError:  # of this wait, or ETIMEDOUT of the storage: then it is done
            if request.done:
                raise
    return request.wait()


def _extents(pieces: NDArray[Any], window: Window, digest: DigestKind) -> list[Extent]:
    extents = []
    for offset, nbytes, address, group in pieces.tolist():
        data = window.slice(address, nbytes) if address else None
        extents.append(Extent(offset, nbytes, data, digest, group) if group >= 0 else Extent(offset, nbytes, data))
    return extents


def sync_directory(path: str) -> None:
    """Makes what was renamed, made or removed in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
