"""Zips of torch's kind, made and read in memory."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

from mlstor.errors import CorruptionError
from mlstor.formats.zip_directory import data_offsets, read_directory
from mlstor.formats.zip_layout import Layout, Record, directory, header, lay_out


def make_zip(
    stem: str, records: Sequence[tuple[str, bytes, int]], start: int = 0, sums: bool = True
) -> tuple[bytes, Layout]:
    """An archive of (name, content, residue), from `start` of a file on, whose bytes before it are zeros."""
    layout = lay_out(stem, [Record(name, len(data), residue) for name, data, residue in records], start)
    crcs = [zlib.crc32(data) if sums else 0 for _, data, _ in records]
    out = bytearray(start)
    for placed, (_, data, _), crc in zip(layout.placed, records, crcs, strict=True):
        assert len(out) == placed.header_offset
        out += header(stem, placed, crc)
        assert len(out) == placed.offset
        out += data
    assert len(out) == layout.directory_offset
    out += directory(stem, layout, crcs)
    assert len(out) == start + layout.nbytes
    return bytes(out), layout


def contents(raw: bytes) -> dict[str, bytes]:
    """The records of an archive, verified; CorruptionError if one is not what was written."""
    found = read_directory(lambda at, nbytes: raw[at : at + nbytes], len(raw), "f.pt")
    offsets = data_offsets(found, lambda wanted: [raw[at : at + nbytes] for at, nbytes in wanted], "f.pt")
    records = {}
    for name, entry in found.entries.items():
        records[name] = raw[offsets[name] : offsets[name] + entry.nbytes]
        if found.has_crc and zlib.crc32(records[name]) != entry.crc:
            raise CorruptionError(f"f.pt: record {name!r} is damaged")
    return records
