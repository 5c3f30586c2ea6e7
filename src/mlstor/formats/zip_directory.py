"""What a zip of torch's kind says of its records: the directory at its end, and local headers checked against it.

Pure functions of bytes that somebody else reads. Nothing is taken on trust: numbers that contradict one another or
the file's size are damage.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from mlstor.errors import CorruptionError, UsageError
from mlstor.formats.zip_layout import CENTRAL, END, END64, LOCAL, LOCATOR, MANY, ZIP64

#: Read from the end first: holds the end records, and the directory of up to some hundred tensors.
_TAIL_BYTES = 64 << 10
_ENCRYPTED = 0x1
#: Sizes and CRC-32 follow the data, and stand in the directory; the local header's may be zeros.
DESCRIPTOR = 0x8
#: What torch.save wrote before zips: a pickled number comes first, as a binary integer or as text.
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_LEGACY_MAGIC_TEXT = b"L119547037146038801333356L\n"

Kind = Literal["zip", "legacy", "tar", "unknown"]


class RecordError(CorruptionError):
    """A record whose local header is damaged; `record` is its name, without the archive's."""

    def __init__(self, message: str, record: str) -> None:
        super().__init__(message)
        self.record = record

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        return RecordError, (str(self), self.record)


class Entry(NamedTuple):
    """A record as the directory describes it."""

    #: without the archive's name
    name: str
    nbytes: int
    #: CRC-32 of the data
    crc: int
    #: where the local header starts
    header_offset: int
    flags: int
    #: where the next record's header starts, or the directory: header and data lie below it
    limit: int


class Directory(NamedTuple):
    """The records of an archive; offsets are relative to its first byte."""

    entries: dict[str, Entry]
    #: False if every CRC-32 is zero: torch's ``save.compute_crc32=False``; such a file can't be verified
    has_crc: bool
    #: the archive's name
    stem: str
    nbytes: int
    directory_offset: int


def kind_of(first: bytes) -> Kind:
    """What a file is whose first 512 bytes (or all, if it has less) are `first`.

    ``zip``: what torch.save writes; ``legacy`` and ``tar``: what it wrote before 1.6 and before 0.1.10.
    """
    if first[:4] == b"PK\3\4":
        return "zip"
    if first[:1] in (b"\x80", b"L") and (_LEGACY_MAGIC in first[:32] or _LEGACY_MAGIC_TEXT in first[:64]):
        return "legacy"
    return "tar" if first[257:262] == b"ustar" else "unknown"


def read_directory(read: Callable[[int, int], bytes], nbytes: int, name: str) -> Directory:
    """Read and check the directory.

    Parameters
    ----------
    read
        ``read(offset, nbytes)`` gives that many bytes of the archive.
    nbytes
        Size of the archive.
    name
        Of the file, for messages.

    Raises
    ------
    CorruptionError
        The end records or the directory are damaged, or contradict the file's size.
    UsageError
        A zip that torch.save does not write: deflated, encrypted, or in several volumes.
    """
    tail_offset = max(0, nbytes - _TAIL_BYTES)
    tail = read(tail_offset, nbytes - tail_offset)
    count, offset, size = _end(tail, tail_offset, name)
    body = tail[offset - tail_offset :][:size] if offset >= tail_offset else read(offset, size)
    return _entries(body, count, offset, nbytes, name)


def _end(tail: bytes, tail_offset: int, name: str) -> tuple[int, int, int]:
    """How many records there are, and offset and bytes of the directory."""
    at = _find_end(tail)
    if at < 0:
        raise CorruptionError(f"{name}: the zip's end record is missing or damaged; was its writer interrupted?")
    _, disk, first_disk, here, count, size, offset, _ = END.unpack_from(tail, at)
    end = tail_offset + at
    locator = at - LOCATOR.size
    if locator >= 0 and tail[locator : locator + 4] == b"PK\6\7":
        _, _, where, _ = LOCATOR.unpack_from(tail, locator)
        known = where == tail_offset + locator - END64.size and where >= tail_offset
        if not known or tail[where - tail_offset :][:4] != b"PK\6\6":
            raise CorruptionError(f"{name}: the zip64 end record is not at offset {where}, where its locator says")
        found = END64.unpack_from(tail, where - tail_offset)
        short = (min(found[6], MANY), min(found[7], MANY), min(found[8], ZIP64), min(found[9], ZIP64))
        if (here, count, size, offset) != short:
            raise CorruptionError(f"{name}: the zip's two end records contradict each other")
        here, count, size, offset = found[6:]
        end = where
    if disk or first_disk or here != count:
        raise CorruptionError(f"{name}: the zip's end record speaks of several volumes, or is damaged")
    if offset + size != end:
        raise CorruptionError(
            f"{name}: the zip's directory should end at offset {offset + size}, but its end record is at {end}"
        )
    return count, offset, size


def _find_end(tail: bytes) -> int:
    """Where the end record starts in `tail`; -1 if there is none. A comment may follow it."""
    at = len(tail)
    while (at := tail.rfind(b"PK\5\6", 0, at)) >= 0:
        if at + END.size <= len(tail) and at + END.size + int.from_bytes(tail[at + 20 : at + 22], "little") == len(
            tail
        ):
            return at
    return -1


def _entries(body: bytes, count: int, directory_offset: int, nbytes: int, name: str) -> Directory:
    found: list[tuple[str, int, int, int, int]] = []
    stem = ""
    position = 0
    for number in range(count):
        if position + CENTRAL.size > len(body):
            raise CorruptionError(f"{name}: the zip's directory ends after {number} of {count} records")
        (
            signature,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            packed,
            size,
            name_nbytes,
            extra_nbytes,
            comment_nbytes,
            disk,
            *_,
            at,
        ) = CENTRAL.unpack_from(body, position)
        start = position + CENTRAL.size
        position = start + name_nbytes + extra_nbytes + comment_nbytes
        if signature != b"PK\1\2" or position > len(body):
            raise CorruptionError(f"{name}: record {number} of {count} in the zip's directory is damaged")
        full = body[start : start + name_nbytes].decode(errors="surrogateescape")
        if size == ZIP64 or packed == ZIP64 or at == ZIP64:
            extra = body[start + name_nbytes : start + name_nbytes + extra_nbytes]
            size, packed, at = _zip64(extra, size, packed, at, f"{name}: record {full!r}")
        if method or flags & _ENCRYPTED:
            raise UsageError(
                f"{name}: record {full!r} is compressed or encrypted: this is not a file of torch.save; "
                "unpack it, and save its content anew"
            )
        if packed != size or disk:
            raise CorruptionError(f"{name}: record {full!r}: the sizes in the zip's directory contradict each other")
        if not stem:
            stem = full.partition("/")[0] + "/"
        if not full.startswith(stem):
            raise CorruptionError(f"{name}: record {full!r} does not lie in {stem!r} as the others do")
        found.append((full[len(stem) :], size, crc, at, flags))
    if position != len(body):
        raise CorruptionError(f"{name}: the zip's directory holds more than the {count} records that it counts")
    return _checked(found, stem, directory_offset, nbytes, name)


def _checked(
    found: list[tuple[str, int, int, int, int]], stem: str, directory_offset: int, nbytes: int, name: str
) -> Directory:
    """The entries with their limits; refused if names are alike, or if places overlap or are outside of the file."""
    order = sorted(range(len(found)), key=lambda index: found[index][3])
    limits = [0] * len(found)
    limit = directory_offset
    for index in reversed(order):
        record, size, _, at, _ = found[index]
        if at + LOCAL.size + len(stem) + len(record) + size > limit:
            raise CorruptionError(
                f"{name}: record {record!r} ({size} bytes at {at}) would reach over offset {limit}, where the next "
                "record or the directory starts"
            )
        limits[index] = limit
        limit = at
    entries = {entry[0]: Entry(*entry, limit) for entry, limit in zip(found, limits, strict=True)}
    if len(entries) != len(found):
        twice = next(one for one, count in Counter(entry[0] for entry in found).items() if count > 1)
        raise CorruptionError(f"{name}: the zip's directory names {twice!r} more than once")
    has_crc = any(entry.crc for entry in entries.values())
    return Directory(entries, has_crc, stem[:-1], nbytes, directory_offset)


def _zip64(extra: bytes, size: int, packed: int, at: int, what: str) -> tuple[int, int, int]:
    """Size, packed size and offset with those that did not fit taken from the zip64 extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if kind == 1:
            wanted = [value == ZIP64 for value in (size, packed, at)]
            if length < 8 * sum(wanted) or position + length > len(extra):
                break
            values = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, position))
            return (
                next(values) if wanted[0] else size,
                next(values) if wanted[1] else packed,
                next(values) if wanted[2] else at,
            )
        position += length
    raise CorruptionError(f"{what}: its size or offset should stand in a zip64 field, which is missing or damaged")


def header_nbytes(entry: Entry, stem: str) -> int:
    """How many bytes of a local header `local_offset` wants to see: all but the padding."""
    name_nbytes = len(f"{stem}/{entry.name}".encode(errors="surrogateescape"))
    return min(LOCAL.size + name_nbytes + 20, entry.limit - entry.header_offset)


def expected_offset(entry: Entry) -> int:
    """Where the data of a record start if nothing but a data descriptor follows them, as torch and mlstor write.

    A reader may fetch header and data at once with it, and look at `local_offset` afterwards.
    """
    descriptor_nbytes = 0
    if entry.flags & DESCRIPTOR:
        descriptor_nbytes = 24 if entry.header_offset >= ZIP64 or entry.nbytes >= ZIP64 else 16
    return max(entry.limit - descriptor_nbytes - entry.nbytes, entry.header_offset + LOCAL.size)


def local_offset(entry: Entry, stem: str, head: bytes | memoryview, name: str) -> int:
    """Where the data of a record start, from its local header, which is checked against the directory.

    Parameters
    ----------
    stem
        The archive's name.
    head
        At least the first `header_nbytes` of the local header.
    name
        Of the file, for messages.

    Raises
    ------
    RecordError
        Header and directory contradict each other, or the data would reach into the next record.
    """
    full = f"{stem}/{entry.name}".encode(errors="surrogateescape")
    signature, _, flags, method, _, _, crc, packed, size, name_nbytes, extra_nbytes = LOCAL.unpack_from(head)
    if signature != b"PK\3\4" or method:
        raise _damaged(entry, name, "is damaged")
    if name_nbytes != len(full) or head[LOCAL.size : LOCAL.size + name_nbytes] != full:
        raise _damaged(entry, name, "has another name than the zip's directory")
    if not flags & DESCRIPTOR:
        if size == ZIP64 and packed == ZIP64:
            first = LOCAL.size + name_nbytes
            extra = bytes(head[first : first + min(extra_nbytes, 20)])
            size, packed, _ = _zip64(extra, size, packed, 0, f"{name}: record {entry.name!r}")
        if (crc, packed, size) != (entry.crc, entry.nbytes, entry.nbytes):
            raise _damaged(entry, name, "has another CRC-32 or size than the zip's directory")
    start: int = entry.header_offset + LOCAL.size + name_nbytes + extra_nbytes
    if start + entry.nbytes > entry.limit:
        raise _damaged(
            entry, name, f"is damaged: {entry.nbytes} bytes from {start} on would reach into the next record"
        )
    return start


def _damaged(entry: Entry, name: str, how: str) -> RecordError:
    text = f"{name}: record {entry.name!r}: the local header at offset {entry.header_offset} {how}"
    return RecordError(text, entry.name)


def data_offsets(
    directory: Directory, read_many: Callable[[Sequence[tuple[int, int]]], Sequence[bytes | memoryview]], name: str
) -> dict[str, int]:
    """Where the data of each record start, by name; the local headers are read in one call, and checked.

    Parameters
    ----------
    read_many
        Takes ``(offset, nbytes)`` of each header and gives their bytes; those that lie near one another should be
        read together.
    name
        Of the file, for messages.

    Raises
    ------
    RecordError
        As `local_offset`.
    """
    entries, stem = directory.entries.values(), directory.stem
    heads = read_many([(entry.header_offset, header_nbytes(entry, stem)) for entry in entries])
    return {entry.name: local_offset(entry, stem, head, name) for entry, head in zip(entries, heads, strict=True)}
