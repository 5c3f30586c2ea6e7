"""Where everything lies in a zip that `torch.load` reads, known before the first byte is written.

The records are stored, not deflated. Each starts where its writer wants it: padding hides in the local header, in an
extra field that readers skip. True CRC-32s and sizes stand in the local headers as in the directory, so there are no
data descriptors. The numbers are those of PKWARE's APPNOTE.TXT 6.3, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

#: Sizes and offsets from here on are written as this, and in 64 bits elsewhere.
ZIP64 = 0xFFFFFFFF
#: The same for the number of records.
MANY = 0xFFFF

#: signature, version, flags, method, time, date, crc, size, size, bytes of the name, bytes of the extra fields
LOCAL = struct.Struct("<4sHHHHHIIIHH")
#: signature, made by, version, flags, method, time, date, crc, size, size, name, extra, comment, disk, internal and
#: external attributes, offset of the local header
CENTRAL = struct.Struct("<4sHHHHHHIIIHHHHHII")
#: signature, bytes that follow, made by, version, disk, disk of the directory, records here, records, bytes and
#: offset of the directory
END64 = struct.Struct("<4sQHHIIQQQQ")
#: signature, disk of the zip64 end record, its offset, disks
LOCATOR = struct.Struct("<4sIQI")
#: signature, disk, disk of the directory, records here, records, bytes and offset of the directory, bytes of a comment
END = struct.Struct("<4sHHHHIIH")

#: Names are UTF-8.
_FLAGS = 0x0800
#: 1980-01-01, the earliest that there is: the same state gives the same bytes.
_DATE = 0x21
_ZIP64_VERSION = 45
#: Identifier of the extra field that holds padding; torch takes it too.
_PADDING = b"FB"
_PADDING_HEAD = struct.Struct("<2sH")
_LOCAL_ZIP64 = struct.Struct("<HHQQ")

#: Records whose place is not asked for start at a multiple of it, as torch's own do: the width of a cache line.
ALIGNMENT = 64
PAGE = 4096


class Record(NamedTuple):
    """What is to be laid out."""

    #: as torch names it, without the archive's name: ``data.pkl``, ``data/0``
    name: str
    nbytes: int
    #: wanted file offset modulo 4096: the tensor's address modulo 4096 lets direct I/O skip a copy; -1: any multiple
    #: of 64
    residue: int = -1


class Placed(NamedTuple):
    """A record and its place in the file."""

    name: str
    nbytes: int
    #: where the local header starts; it reaches up to `offset`
    header_offset: int
    #: where the data start
    offset: int


class Layout(NamedTuple):
    """Where everything lies; offsets are those of the file, also of an archive inside of it."""

    placed: tuple[Placed, ...]
    #: where the directory starts, which goes to the end
    directory_offset: int
    #: of the whole archive, from `start` on: the file's size if `start` is 0
    nbytes: int
    #: where the archive starts in the file; what the zip itself says of offsets is relative to it
    start: int


def lay_out(stem: str, records: Sequence[Record], start: int = 0) -> Layout:
    """Give each record its place, in the order given, without holes between them.

    Parameters
    ----------
    stem
        The archive's name, a prefix of each record's: torch takes the file's name without its extension, "archive"
        where there is none.
    records
        Names must differ.
    start
        Where the archive starts in its file: an item of a distributed checkpoint is one of several.

    Returns
    -------
    Layout
    """
    placed = []
    position = start
    stem_nbytes = len(_encoded(stem)) + 1
    directory_nbytes = 0
    for name, nbytes, residue in records:
        name_nbytes = stem_nbytes + len(_encoded(name))
        first = position + LOCAL.size + name_nbytes + _PADDING_HEAD.size
        if nbytes >= ZIP64:
            first += _LOCAL_ZIP64.size
        padding = -first % ALIGNMENT if residue < 0 else (residue - first) % PAGE
        placed.append(Placed(name, nbytes, position, first + padding))
        directory_nbytes += CENTRAL.size + name_nbytes + len(_central_zip64(nbytes, position - start))
        position = first + padding + nbytes
    end = position + directory_nbytes + END64.size + LOCATOR.size + END.size
    return Layout(tuple(placed), position, end - start, start)


def header(stem: str, placed: Placed, crc: int) -> bytes:
    """The local header of a record, padding included: the bytes from ``header_offset`` up to ``offset``.

    Parameters
    ----------
    crc
        CRC-32 of the data, zlib's.
    """
    name = _encoded(f"{stem}/{placed.name}")
    size, version, extra = placed.nbytes, 0, b""
    if size >= ZIP64:
        extra = _LOCAL_ZIP64.pack(1, 16, size, size)
        size, version = ZIP64, _ZIP64_VERSION
    extra_nbytes = placed.offset - placed.header_offset - LOCAL.size - len(name)
    padding = extra_nbytes - len(extra) - _PADDING_HEAD.size
    fixed = LOCAL.pack(b"PK\3\4", version, _FLAGS, 0, 0, _DATE, crc, size, size, len(name), extra_nbytes)
    return b"".join((fixed, name, extra, _PADDING_HEAD.pack(_PADDING, padding), bytes(padding)))


def directory(stem: str, layout: Layout, crcs: Sequence[int]) -> bytes:
    """The directory and the end records: the bytes from ``directory_offset`` to the end.

    Parameters
    ----------
    crcs
        CRC-32 of each record, in the order of ``layout.placed``.
    """
    stem += "/"
    pieces = []
    for (record, nbytes, header_offset, _), crc in zip(layout.placed, crcs, strict=True):
        name = _encoded(stem + record)
        offset = header_offset - layout.start
        size, version, extra = nbytes, 0, b""
        if nbytes >= ZIP64 or offset >= ZIP64:
            extra = _central_zip64(nbytes, offset)
            size, offset, version = min(nbytes, ZIP64), min(offset, ZIP64), _ZIP64_VERSION
        pieces.append(
            CENTRAL.pack(
                *(b"PK\1\2", 0, version, _FLAGS, 0, 0, _DATE, crc, size, size),
                *(len(name), len(extra), 0, 0, 0, 0, offset),
            )
        )
        pieces += (name, extra)
    body = b"".join(pieces)
    count, nbytes, offset = len(layout.placed), len(body), layout.directory_offset - layout.start
    versions = (_ZIP64_VERSION, _ZIP64_VERSION)
    end64 = END64.pack(b"PK\6\6", END64.size - 12, *versions, 0, 0, count, count, nbytes, offset)
    locator = LOCATOR.pack(b"PK\6\7", 0, offset + nbytes, 1)
    few = min(count, MANY)
    return body + end64 + locator + END.pack(b"PK\5\6", 0, 0, few, few, min(nbytes, ZIP64), min(offset, ZIP64), 0)


def serialization_id(names: Sequence[str], crcs: Sequence[int]) -> bytes:
    """The content of the record ``.data/serialization_id``: 40 digits that tell one state from another.

    torch makes them of hashes of the names and of the CRC-32s, without saying of which; nobody compares them but for
    equality. Here the halves are BLAKE2b of the names and of the CRC-32s, modulo 10^20.
    """
    of_names = hashlib.blake2b("\0".join(names).encode(errors="surrogateescape"), digest_size=16)
    of_crcs = hashlib.blake2b(struct.pack(f"<{len(crcs)}I", *crcs), digest_size=16)
    halves = (int.from_bytes(half.digest(), "little") % 10**20 for half in (of_names, of_crcs))
    return "".join(f"{half:020d}" for half in halves).encode()


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")  # file names that are no UTF-8 become names of archives too


def _central_zip64(nbytes: int, offset: int) -> bytes:
    """The extra field of a directory's entry: those numbers that do not fit, in this order; empty if all fit."""
    large = [value for value in (nbytes, nbytes, offset) if value >= ZIP64]
    return struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
