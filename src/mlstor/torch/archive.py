"""A checkpoint file that is read: its records, fetched in parallel into memory that is given, and verified."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlstor._io import AlignedBuffer, crc_pieces
from mlstor.blob.types import Blob, BlobInfo, make_pieces, require_same
from mlstor.errors import CorruptionError, MlstorError
from mlstor.formats.zip_directory import (
    Directory,
    Entry,
    data_offsets,
    expected_offset,
    header_nbytes,
    local_offset,
    read_directory,
)
from mlstor.formats.zip_layout import LOCAL

#: From here on a record is read straight to its place; smaller ones come with their neighbours in one read.
_DIRECT_BYTES = 256 << 10
#: Bytes of one read of neighbours, and of all such reads that are in memory at one time.
_RUN_BYTES = 8 << 20
_ROUND_BYTES = 256 << 20


class Target(NamedTuple):
    """Where the bytes of a record go; address 0: they are only verified."""

    record: str
    address: int


class Archive:
    """A zip of torch's kind.

    Parameters
    ----------
    blob
    info
        Its size and ETag, as they were when it was opened: a file that is replaced while it is read is an error.
    verify
        Compare the CRC-32 of what is read. Nothing is compared where the file holds none.
    """

    def __init__(self, blob: Blob, info: BlobInfo, *, verify: bool) -> None:
        self.name = blob.name
        self._blob = blob
        self._etag = info.etag
        try:
            self.directory: Directory = read_directory(blob.read, info.nbytes, blob.name)
        except (MlstorError, OSError):
            require_same(blob, info.etag)
            raise
        self.verifies = verify and self.directory.has_crc
        #: where the data of the records lie that were read
        self.offsets: dict[str, int] = {}

    def entry(self, record: str) -> Entry:
        """A record of the directory.

        Raises
        ------
        CorruptionError
            If there is none of that name.
        """
        try:
            return self.directory.entries[record]
        except KeyError:
            raise CorruptionError(f"{self.name}: the file refers to the record {record!r} but holds none") from None

    def read(self, records: Iterable[str]) -> dict[str, bytes]:
        """The contents of some records, verified. For small ones."""
        buffers = {record: bytearray(self.entry(record).nbytes) for record in records}
        damaged = self.fetch([Target(record, address_of(buffer)) for record, buffer in buffers.items()], buffers)
        if damaged:
            raise self.damage(damaged)
        return {record: bytes(buffer) for record, buffer in buffers.items()}

    def find_offsets(self) -> None:
        """Read the local headers alone, for the offsets of all records."""

        def heads(wanted: Sequence[tuple[int, int]]) -> list[bytes]:
            buffers = [bytearray(nbytes) for _, nbytes in wanted]
            rows = [(at, n, address_of(buffer), -1) for (at, n), buffer in zip(wanted, buffers, strict=True)]
            self._fetch(rows, buffers)
            return [bytes(buffer) for buffer in buffers]

        self.offsets.update(data_offsets(self.directory, heads, self.name))

    def fetch(self, targets: Sequence[Target], keep: object) -> list[str]:
        """Read records to their targets, in parallel.

        Parameters
        ----------
        targets
        keep
            Owns the memory; held until nothing is in flight.

        Returns
        -------
        list of str
            The records whose CRC-32 is not what the file says.

        Raises
        ------
        CorruptionError
            If a local header is damaged.
        OSError
            If the storage fails, the file is cut short, or it was replaced.
        """
        places = {target.record: target.address for target in targets}
        entries = sorted((self.entry(record) for record in places), key=lambda entry: entry.header_offset)
        small = [entry for entry in entries if entry.nbytes < _DIRECT_BYTES]
        direct = [entry for entry in entries if entry.nbytes >= _DIRECT_BYTES]
        wrong: list[str] = []
        for runs in _rounds(small) or [[]]:
            wrong += self._round(runs, direct, places, keep)
            direct = []
        return wrong

    def damage(
        self, records: Sequence[str], owners: Mapping[str, Sequence[str]] | None = None, advice: str = ""
    ) -> CorruptionError:
        """The error for damaged records, with the tensors that lie in them, if known."""
        texts = []
        for record in records[:_NAMED]:
            entry = self.entry(record)
            start = self.offsets.get(record, entry.header_offset)
            owner = ", ".join((owners or {}).get(record, ())[:_NAMED])
            where = f"record {record}, bytes {start} to {start + entry.nbytes} of the file"
            texts.append(f"tensor {owner} ({where})" if owner else where)
        more = f" and {len(records) - _NAMED} more records" if len(records) > _NAMED else ""
        verb = "is" if len(records) == 1 else "are"
        return CorruptionError(
            f"{self.name}: {'; '.join(texts)}{more} {verb} not what was written: the CRC-32 differs. "
            + (advice or "Load an older checkpoint; verify=False loads it with the damage")
        )

    def _round(
        self, runs: list[list[Entry]], direct: list[Entry], places: Mapping[str, int], keep: object
    ) -> list[str]:
        stem = self.directory.stem
        scratch = _Scratch(runs, [_head_nbytes(entry, stem) for entry in direct])
        rows = scratch.run_rows()
        groups: list[Entry] = []
        for entry, (place, nbytes) in zip(direct, scratch.heads, strict=True):
            rows.append((entry.header_offset, nbytes, place, -1))
            rows.append((expected_offset(entry), entry.nbytes, places[entry.name], self._group(groups, entry)))
        digests = self._fetch(rows, (keep, scratch.buffer))
        moved: list[tuple[int, int, int, int]] = []
        for entry, (place, nbytes) in zip(direct, scratch.heads, strict=True):
            offset = local_offset(entry, stem, scratch.at(place, nbytes), self.name)
            self.offsets[entry.name] = offset
            if offset != expected_offset(entry):  # a writer that leaves holes: read what it really is
                moved.append((offset, entry.nbytes, places[entry.name], self._group(groups, entry)))
        if moved:
            digests.update(self._fetch(moved, keep))
        found = {entry.name: digests[group] for group, entry in enumerate(groups)}
        wrong = [record for record, crc in found.items() if crc != self.entry(record).crc]
        return wrong + self._take_small(scratch, places)

    def _group(self, groups: list[Entry], entry: Entry) -> int:
        if not self.verifies:
            return -1
        groups.append(entry)
        return len(groups) - 1

    def _fetch(self, rows: list[tuple[int, int, int, int]], keep: object) -> dict[int, int]:
        return dict(self._blob.fetch(make_pieces(rows), digest="crc32", keep=keep, etag=self._etag).digests)

    def _take_small(self, scratch: _Scratch, places: Mapping[str, int]) -> list[str]:
        """Verify the records that came in runs, and move them to their places."""
        stem = self.directory.stem
        entries = [entry for run in scratch.runs for entry in run]
        sources = np.zeros(len(entries), np.uint64)
        for index, (entry, start) in enumerate(scratch.entries()):
            offset = local_offset(entry, stem, scratch.at(start, header_nbytes(entry, stem)), self.name)
            self.offsets[entry.name] = offset
            sources[index] = start + offset - entry.header_offset
        wrong: list[str] = []
        if self.verifies:
            crcs = np.zeros(len(entries), np.uint32)
            sizes = np.array([entry.nbytes for entry in entries], np.uint64)
            crc_pieces("crc32", sources.data, sizes.data, crcs.data)
            wanted = np.array([entry.crc for entry in entries], np.uint32)
            wrong = [entries[index].name for index in np.flatnonzero(crcs != wanted)]
        if not wrong:  # of damage nothing is kept
            move = ctypes.memmove
            for entry, source in zip(entries, sources.tolist(), strict=True):
                place = places[entry.name]
                if place and entry.nbytes:
                    move(place, source, entry.nbytes)
        return wrong


#: How many damaged records, and tensors of one, a message names.
_NAMED = 4


class _Scratch:
    """Memory for runs of small records, and for the headers of large ones."""

    def __init__(self, runs: list[list[Entry]], heads: Sequence[int]) -> None:
        self.runs = runs
        sizes = [_reach(run[-1]) - run[0].header_offset for run in runs]
        nbytes = 0
        places = []
        for run, size in zip(runs, sizes, strict=True):
            # congruent with its place in the file: read without a copy
            nbytes += (run[0].header_offset - nbytes) % 4096
            places.append(nbytes)
            nbytes += size
        head_places = []
        for size in heads:
            head_places.append((nbytes, size))
            nbytes += size
        self.buffer = AlignedBuffer(max(nbytes, 1))
        base = self.buffer.address
        self._places = [base + place for place in places]
        self._sizes = sizes
        #: address and bytes of each header
        self.heads = [(base + place, size) for place, size in head_places]

    def run_rows(self) -> list[tuple[int, int, int, int]]:
        starts = (run[0].header_offset for run in self.runs)
        return [
            (offset, size, place, -1) for offset, size, place in zip(starts, self._sizes, self._places, strict=True)
        ]

    def entries(self) -> Iterator[tuple[Entry, int]]:
        """Each small record and the address of its local header."""
        for run, place in zip(self.runs, self._places, strict=True):
            for entry in run:
                yield entry, place + entry.header_offset - run[0].header_offset

    def at(self, address: int, nbytes: int) -> memoryview:
        start = address - self.buffer.address
        return memoryview(self.buffer)[start : start + nbytes]


def _rounds(entries: Iterable[Entry]) -> list[list[list[Entry]]]:
    """Runs of neighbours, each one read; a round of runs is in memory at one time."""
    rounds: list[list[list[Entry]]] = []
    run_start = end = in_round = 0
    for entry in entries:
        span = _reach(entry) - entry.header_offset
        if not rounds or in_round + span > _ROUND_BYTES:
            rounds.append([])
            in_round = 0
        runs = rounds[-1]
        if not runs or entry.header_offset != end or _reach(entry) - run_start > _RUN_BYTES:
            runs.append([])
            run_start = entry.header_offset
        runs[-1].append(entry)
        in_round += span
        end = _reach(entry)
    return rounds


def _reach(entry: Entry) -> int:
    """Where a record ends at the latest: not at the next header if a hole, of whatever size, lies before that."""
    return min(entry.limit, entry.header_offset + LOCAL.size + 2 * 0xFFFF + entry.nbytes)


def _head_nbytes(entry: Entry, stem: str) -> int:
    """Bytes of a local header to read beside the data, which may start before its longest form would end."""
    return min(header_nbytes(entry, stem), expected_offset(entry) - entry.header_offset)


def address_of(buffer: bytearray) -> int:
    """Where a buffer lies; 0 if it is empty."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else 0
