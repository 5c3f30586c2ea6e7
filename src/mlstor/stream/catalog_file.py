"""The catalog's file: its header, its digest, and how sorted entries become columns in bounded memory.

Little-endian: a header of 4096 bytes, the sizes (u64 each), where each name begins and the last one ends (u64, n + 1 of
them), and the names as UTF-8, one after the other, sorted by their bytes.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import marshal
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from mlstor.errors import UsageError
from mlstor.storage.store import Page
from mlstor.storage.transfers import WHOLE

MAGIC = b"mlstorCT"
VERSION = 1
HEADER_BYTES = 4096
DIGEST_BYTES = 16
#: magic, version, reserved, objects, bytes of their names, bytes of all objects (WHOLE: some are not known), digest
_FIELDS = struct.Struct("<8sIIQQQ16s")
_CHECK_BYTES = 8  # of the fields, behind them

_ENTRY_BYTES = 32  # what an entry of a run counts beside its name
_BLOCK_ENTRIES = 1024  # of a run, read back at once
_BLOCK_HEAD = struct.Struct("<Q")
_COLUMN_ENTRIES = 1 << 13

Entry = tuple[bytes, int]
"""A name and a size."""


class Header(NamedTuple):
    """What is known of a catalog before anything else of it is read."""

    n: int
    names_nbytes: int
    #: WHOLE if some sizes are not known
    total_bytes: int
    digest: bytes

    @property
    def starts_at(self) -> int:
        """Offset of the column of starts, bytes."""
        return HEADER_BYTES + 8 * self.n

    @property
    def names_at(self) -> int:
        """Offset of the names, bytes."""
        return HEADER_BYTES + 16 * self.n + 8


def read_header(path: str, fd: int) -> Header:
    """The header of an open file.

    Raises
    ------
    UsageError
        If it is not a whole catalog of this version.
    """
    head = os.pread(fd, _FIELDS.size + _CHECK_BYTES, 0)
    nbytes = os.fstat(fd).st_size
    if not head.startswith(MAGIC):
        raise UsageError(f"{path} is not a catalog of objects; a text file of names has to be made into one first")
    if len(head) < _FIELDS.size + _CHECK_BYTES or _check(head[: _FIELDS.size]) != head[_FIELDS.size :]:
        raise UsageError(f"{path} is a catalog with a damaged header: make it anew")
    _, version, _, *rest = _FIELDS.unpack_from(head)
    if version != VERSION:
        raise UsageError(f"{path} is a catalog of version {version}, and this is version {VERSION}: make it anew")
    header = Header(*rest)
    if nbytes != header.names_at + header.names_nbytes:
        raise UsageError(
            f"{path} has {nbytes} bytes where a catalog of {header.n} objects has "
            f"{header.names_at + header.names_nbytes}: make it anew"
        )
    return header


def _check(fields: bytes) -> bytes:
    return hashlib.blake2b(fields, digest_size=_CHECK_BYTES).digest()


class Digest:
    """blake2b of the columns, each fed in pieces of any size, then of the three together."""

    def __init__(self) -> None:
        self.sizes, self.ends, self.names = (hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in range(3))

    def value(self, n: int) -> bytes:
        """Of `n` objects whose columns have been fed."""
        parts = b"".join(part.digest() for part in (self.sizes, self.ends, self.names))
        return hashlib.blake2b(n.to_bytes(8, "little") + parts, digest_size=DIGEST_BYTES).digest()


class Runs:
    """Entries as they come, sorted in memory as long as they fit, and in runs in a spool file beyond that.

    Parameters
    ----------
    spool
        A file of its own, open for reading and writing.
    run_bytes
        Bytes of names, and 32 for each, that are sorted in memory at once.
    """

    def __init__(self, spool: BinaryIO, run_bytes: int) -> None:
        self._spool = spool
        self._run_bytes = run_bytes
        self._entries: list[Entry] = []
        self._held_bytes = 0
        self._spooled: list[tuple[int, int]] = []
        self.n = 0
        self.names_nbytes = 0

    def add(self, page: Page) -> None:
        """Take a page of a listing."""
        names = [key.encode("utf-8", "surrogateescape") for key in page.keys]
        self._entries += zip(names, page.sizes, strict=True)
        nbytes = sum(map(len, names))
        self.n += len(names)
        self.names_nbytes += nbytes
        self._held_bytes += nbytes + _ENTRY_BYTES * len(names)
        if self._held_bytes >= self._run_bytes:
            self._spill()

    def _spill(self) -> None:
        self._entries.sort()
        start = self._spool.tell()
        for first in range(0, len(self._entries), _BLOCK_ENTRIES):
            block = marshal.dumps(self._entries[first : first + _BLOCK_ENTRIES])
            self._spool.write(_BLOCK_HEAD.pack(len(block)))
            self._spool.write(block)
        self._spooled.append((start, self._spool.tell()))
        self._entries.clear()
        self._held_bytes = 0

    def _read(self, start: int, end: int) -> Iterator[Entry]:
        fd = self._spool.fileno()
        while start < end:
            (nbytes,) = _BLOCK_HEAD.unpack(os.pread(fd, _BLOCK_HEAD.size, start))
            start += _BLOCK_HEAD.size
            block = os.pread(fd, nbytes, start)
            if len(block) != nbytes:
                raise OSError(errno.EIO, "names that were spooled could not be read again", str(self._spool.name))
            start += nbytes
            yield from marshal.loads(block)

    def merged(self) -> Iterator[Entry]:
        """All entries by name; nothing may be added any more."""
        if not self._spooled:
            self._entries.sort()
            return iter(self._entries)
        self._spill()
        self._spool.flush()
        return heapq.merge(*(self._read(start, end) for start, end in self._spooled))


def write(target: Path, runs: Runs) -> None:
    """Write the catalog of `runs` at `target`; it appears there when it is whole.

    Raises
    ------
    UsageError
        If a name comes twice, or the sizes add up to 2^64 bytes or more.
    OSError
        If the file can't be written.
    """
    descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with open(descriptor, "wb") as file:
            _Columns(file.fileno(), runs.n, runs.names_nbytes).write(runs.merged())
            os.fchmod(file.fileno(), 0o666 & ~_umask())  # mkstemp's files are for their owner alone
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


class _Columns:
    """Three columns of one file, each written from its beginning to its end."""

    def __init__(self, fd: int, n: int, names_nbytes: int) -> None:
        self._fd = fd
        self._header = Header(n, names_nbytes, 0, b"")
        self._digest = Digest()
        self._sizes_at = HEADER_BYTES
        self._ends_at = self._header.starts_at + self._put(bytes(8), self._header.starts_at)
        self._names_at = self._header.names_at

    def _put(self, data: bytes, offset: int) -> int:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done
        return len(data)

    def write(self, entries: Iterator[Entry]) -> None:
        total, unknown = 0, False
        names: list[bytes] = []
        sizes: list[int] = []
        before = None
        for name, size in entries:
            if name == before:
                raise UsageError(
                    f"{name.decode('utf-8', 'replace')!r} is listed twice, and no epoch could read it once: remove it "
                    "from the list, or list again when nobody changes the objects"
                )
            before = name
            names.append(name)
            sizes.append(size)
            if size == WHOLE:
                unknown = True
            else:
                total += size
            if len(names) == _COLUMN_ENTRIES:
                self._flush(names, sizes)
        self._flush(names, sizes)
        if total >= WHOLE:
            raise UsageError(f"the objects' sizes add up to {total} bytes, which no store holds: correct the list")
        header = self._header
        fields = _FIELDS.pack(
            MAGIC, VERSION, 0, header.n, header.names_nbytes, WHOLE if unknown else total, self._digest.value(header.n)
        )
        head = fields + _check(fields)
        self._put(head + bytes(HEADER_BYTES - len(head)), 0)

    def _flush(self, names: list[bytes], sizes: list[int]) -> None:
        blob = b"".join(names)
        end = self._names_at - self._header.names_at
        ends = (np.cumsum(np.fromiter(map(len, names), np.uint64, len(names))) + np.uint64(end)).astype("<u8").tobytes()
        column = np.array(sizes, "<u8").tobytes()
        self._digest.names.update(blob)
        self._digest.ends.update(ends)
        self._digest.sizes.update(column)
        self._sizes_at += self._put(column, self._sizes_at)
        self._ends_at += self._put(ends, self._ends_at)
        self._names_at += self._put(blob, self._names_at)
        names.clear()
        sizes.clear()
