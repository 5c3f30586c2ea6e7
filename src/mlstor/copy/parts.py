"""Large objects of parts at the destination: multipart uploads of a server, ranges of one file of a directory."""

from __future__ import annotations

import errno
import os
import secrets
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mlstor.operations import TEMPORARY_SUFFIX
from mlstor.storage.transfers import Digest
from mlstor.storage.uploads import Part

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from mlstor.storage.uploads import Uploads

#: File systems that know fallocate; elsewhere glibc would write a byte into every block.
_ALLOCATE = ("ext4", "xfs", "btrfs", "tmpfs", "f2fs")
_ALIGN_BYTES = 4096


class Target(Protocol):
    """Makes objects of parts. Errors are `OSError`; any thread may call it."""

    most_parts: int
    #: uploads that were begun and not ended: their keys by id
    begun: dict[str, str]

    def begin(self, key: str, nbytes: int) -> str:
        """Start an object; its upload's id."""

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        """All parts are there: from now on the object shows."""

    def abort(self, key: str, upload_id: str) -> None:
        """Forget it; one that isn't there any more is no error."""


class ServerParts:
    """Multipart uploads; the parts are WRITEs of the destination's transfers, with the query that `query` gives."""

    def __init__(self, uploads: Uploads, digest: Digest) -> None:
        self._uploads, self._digest = uploads, digest
        self.most_parts = uploads.most_parts
        self.begun: dict[str, str] = {}

    def begin(self, key: str, nbytes: int) -> str:
        upload_id = self._uploads.begin(key, self._digest)
        self.begun[upload_id] = key
        return upload_id

    def query(self, upload_id: str, number: int) -> str:
        """Of the PUT of a part, from 1 on."""
        return self._uploads.query(upload_id, number)

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        self._uploads.complete(key, upload_id, parts)
        self.begun.pop(upload_id, None)

    def abort(self, key: str, upload_id: str) -> None:
        self._uploads.abort(key, upload_id)
        self.begun.pop(upload_id, None)


class FileParts:
    """Files below a directory, written in ranges under a temporary name: with O_DIRECT but for a tail that is not a
    multiple of 4 KiB, allocated before the first range, synced and renamed at the end. An upload's id is the temporary
    file's path.

    Parameters
    ----------
    direct
        auto, require or off, as the setting says. auto: where the file system refuses, through the page cache.
    """

    most_parts = 1 << 40

    def __init__(self, root: str, direct: str) -> None:
        from mlstor import _io

        self._root, self._mode = root, direct
        self._allocates = _io.alignment(root)["fs_type"] in _ALLOCATE
        self._lock = threading.Lock()
        self.begun: dict[str, str] = {}
        #: by id: for whole blocks (direct where granted), and for tails
        self._open: dict[str, tuple[int, int]] = {}
        self._writing: dict[str, int] = {}
        #: whether all that was written went by O_DIRECT
        self.direct = True

    def begin(self, key: str, nbytes: int) -> str:
        directory, name = os.path.split(os.path.join(self._root, key))
        os.makedirs(directory, exist_ok=True)
        path = os.path.join(directory, f".{name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
        self.begun[path] = key
        tails = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        blocks = -1
        try:
            blocks = self._blocks(path)
            if self._allocates:
                os.posix_fallocate(tails, 0, nbytes)
            else:
                os.ftruncate(tails, nbytes)
        except OSError as error:
            for fd in (blocks, tails):
                if fd >= 0:
                    os.close(fd)
            os.unlink(path)
            self.begun.pop(path, None)
            raise OSError(error.errno, error.strerror, os.path.join(directory, name)) from None
        with self._lock:
            self._open[path] = blocks, tails
            self._writing[path] = 0
        return path

    def _blocks(self, path: str) -> int:
        if self._mode != "off":
            try:
                return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                if self._mode == "require" or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
        self.direct = False
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def write(self, upload_id: str, offset: int, source: Buffer) -> None:
        """Put a range into its place; offset and memory lie at multiples of 4 KiB, else it can't be direct."""
        with self._lock:
            blocks, tails = self._open[upload_id]
            self._writing[upload_id] += 1
        view = memoryview(source).cast("B")
        whole = view.nbytes // _ALIGN_BYTES * _ALIGN_BYTES
        try:
            _write_all(blocks, view[:whole], offset, upload_id)
            _write_all(tails, view[whole:], offset + whole, upload_id)
        finally:
            with self._lock:
                self._writing[upload_id] -= 1

    def complete(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        path = os.path.join(self._root, key)
        with self._lock:
            blocks, tails = self._open.pop(upload_id)
        try:
            os.fsync(tails)
        finally:
            os.close(blocks)
            os.close(tails)
        os.rename(upload_id, path)
        self.begun.pop(upload_id, None)
        # the name lies in the directory, and new directories in those above
        above = os.path.dirname(path)
        while True:
            _sync_directory(above)
            if above == self._root or os.path.dirname(above) == above:
                return
            above = os.path.dirname(above)

    def abort(self, key: str, upload_id: str) -> None:
        with self._lock:
            # A number that is closed while another thread still writes to it may be another file's by then.
            opened = () if self._writing.get(upload_id) else self._open.pop(upload_id, ())
        for fd in opened:
            os.close(fd)
        self.begun.pop(upload_id, None)
        if os.path.basename(upload_id).endswith(TEMPORARY_SUFFIX):
            try:
                os.unlink(upload_id)
            except FileNotFoundError:
                return


def _write_all(fd: int, view: memoryview, offset: int, path: str) -> None:
    while view:
        try:
            count = os.pwrite(fd, view, offset)
        except OSError as error:
            raise OSError(error.errno, error.strerror, path) from None
        view, offset = view[count:], offset + count


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
