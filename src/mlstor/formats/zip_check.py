"""A zip of torch's kind, read through and compared with its CRC-32s; nothing is kept, and nothing unpickled."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlstor.blob.types import require_same
from mlstor.errors import CorruptionError
from mlstor.formats.finding import Finding, Status, reason
from mlstor.formats.inert_pickle import stored
from mlstor.formats.zip_directory import (
    Directory,
    Entry,
    expected_offset,
    header_nbytes,
    local_offset,
    read_directory,
)

if TYPE_CHECKING:
    from mlstor.blob.types import Blob

#: The record that describes the tensors.
_PICKLE = "data.pkl"


class Extent(NamedTuple):
    """Where an archive lies in a blob: all of it, or an item of a distributed checkpoint."""

    offset: int
    nbytes: int


class _Checked(NamedTuple):
    entry: Entry
    #: in the archive
    offset: int
    #: empty if the record is as it was written
    why: str


def check_zip(blob: Blob, extent: Extent, etag: str = "") -> Iterator[Finding]:
    """Read every record and compare it; one finding each, or one for the whole archive if its directory is damaged.

    Parameters
    ----------
    blob
    extent
        Where the archive lies in it.
    etag
        The blob is not to be another one than this.

    Raises
    ------
    OSError
        If the blob is gone or was replaced. Bytes that can't be read (EIO) are findings.
    UsageError
        A zip that torch.save does not write.
    """
    try:
        directory = read_directory(lambda at, nbytes: blob.read(extent.offset + at, nbytes), extent.nbytes, blob.name)
    except CorruptionError as error:
        if etag:
            require_same(blob, etag)
        yield Finding(blob.name, "", "", extent.offset, extent.nbytes, "damaged", reason(error, blob.name))
        return
    check = _Check(blob, extent, etag, directory)
    entries = list(directory.entries.values())
    try:
        checked: list[_Checked] = check.examine(entries)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        checked = []
        for entry in entries:
            try:
                checked += check.examine([entry])
            except OSError as again:
                yield check.finding(_Checked(entry, entry.header_offset, reason(again, blob.name)), "error", "")
    names = check.names(checked) if any(one.why for one in checked) else {}
    for one in checked:
        if one.why:
            yield check.finding(one, "damaged", names.get(one.entry.name, ""))
        elif directory.has_crc:
            yield check.finding(one, "ok", "")
        else:
            yield check.finding(one._replace(why="it was written without CRC-32s"), "unverified", "")


class _Check:
    def __init__(self, blob: Blob, extent: Extent, etag: str, directory: Directory) -> None:
        self._blob, self._extent, self._etag, self._directory = blob, extent, etag, directory

    def examine(self, entries: Sequence[Entry]) -> list[_Checked]:
        """Read headers and data of some records in one go. `OSError` if any of it can't be read."""
        stem = self._directory.stem
        sizes = [min(header_nbytes(entry, stem), expected_offset(entry) - entry.header_offset) for entry in entries]
        scratch = bytearray(sum(sizes))
        address = _address(scratch)
        rows = []
        place = 0
        for group, (entry, nbytes) in enumerate(zip(entries, sizes, strict=True)):
            rows.append((entry.header_offset, nbytes, address + place, -1))
            rows.append((expected_offset(entry), entry.nbytes, 0, self._group(group)))
            place += nbytes
        digests = self._fetch(rows, scratch)
        checked = []
        place = 0
        for group, (entry, nbytes) in enumerate(zip(entries, sizes, strict=True)):
            head = memoryview(scratch)[place : place + nbytes]
            place += nbytes
            try:
                offset = local_offset(entry, stem, head, self._blob.name)
            except CorruptionError as error:
                checked.append(_Checked(entry, entry.header_offset, _bare(error, self._blob.name, entry.name)))
                continue
            crc = digests.get(group, 0)
            if offset != expected_offset(entry):  # a writer that leaves holes: look where the data really are
                crc = self._fetch([(offset, entry.nbytes, 0, self._group(0))], None).get(0, 0)
            checked.append(_Checked(entry, offset, self._compared(entry, crc)))
        return checked

    def _group(self, number: int) -> int:
        return number if self._directory.has_crc else -1

    def _compared(self, entry: Entry, crc: int) -> str:
        if not self._directory.has_crc or crc == entry.crc:
            return ""
        return f"its CRC-32 is {crc:08x}, not {entry.crc:08x} as the file says: it is not what was written"

    def _fetch(self, rows: list[tuple[int, int, int, int]], keep: object) -> dict[int, int]:
        from mlstor.blob.types import make_pieces

        pieces = make_pieces(rows)
        pieces["offset"] += self._extent.offset
        return self._blob.fetch(pieces, keep=keep, etag=self._etag).digests

    def names(self, checked: Sequence[_Checked]) -> dict[str, str]:
        """The tensor in each record; empty if the record that describes them is damaged itself."""
        described = next((one for one in checked if one.entry.name == _PICKLE and not one.why), None)
        if described is None:
            return {}
        try:
            found = stored(self._blob.read(self._extent.offset + described.offset, described.entry.nbytes))
        except ValueError:  # of another program's making: the damage is told without the name
            return {}
        return {f"data/{key}": one.tensor for key, one in found.items()}

    def finding(self, one: _Checked, status: Status, tensor: str) -> Finding:
        offset = self._extent.offset + one.offset
        return Finding(self._blob.name, one.entry.name, tensor, offset, one.entry.nbytes, status, one.why)


def _bare(error: CorruptionError, name: str, record: str) -> str:
    return reason(error, name).removeprefix(f"record {record!r}: ")


def _address(buffer: bytearray) -> int:
    import numpy as np

    return int(np.frombuffer(buffer, np.uint8).ctypes.data) if buffer else 0
